"""Every drafter: whatever it proposes, the answer is the same; it follows what was kept; its draft must be its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.config import TRAINED
from model.engine import Engine
from model.native import library
from tests.model import tiny
from tests.model.guided import guided
from tests.model.test_equality import mixed

NAMES = (*TRAINED, "ngram")


@pytest.fixture(scope="module")
def drafts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with an untrained draft of every kind."""
    folder = tmp_path_factory.mktemp("drafts")
    return {name: tiny.save_network(folder / name, name, tiny_checkpoint) for name in TRAINED}


@pytest.fixture(scope="module")
def expected(plain_engine: Engine) -> dict[str, list[int]]:
    """Each answer alone and without a draft."""
    return {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in mixed()}


def engine_of(name: str, model: Path, drafts: dict[str, Path], **settings: Any) -> Engine:
    draft = str(drafts[name]) if name in drafts else None
    given = {"max_num_seqs": 8, "prefill_chunk": 16, **settings}
    return Engine(tiny.config(model, drafter=name, draft=draft, **given))


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Path, drafts: dict[str, Path]) -> Engine:
    return engine_of(request.param, tiny_checkpoint, drafts)


# -- the answer stays the same


def test_alone(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Greedy and sampled; images, videos, text alone; nearly all that is proposed is refused."""
    for request in mixed(8):
        assert tiny.answers(engine, [request])[request.request_id] == expected[request.request_id]
    stats = engine.pop_stats()
    assert stats.drafts > 0
    assert engine.info.drafter == engine.config.drafter


@pytest.mark.parametrize("every", [0, 2], ids=["at once", "each second step"])
def test_in_a_crowd_that_comes_and_goes(engine: Engine, expected: dict[str, list[int]], every: int) -> None:
    assert tiny.answers(engine, mixed(), every=every) == expected


def test_in_a_crowd_of_which_some_are_aborted(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Slots are freed in the middle of prompts and answers, and taken again by others."""
    coming, got, victims = mixed(), dict[str, list[int]](), {"r2", "r5", "r6", "r9", "r12"}
    steps = 0
    while coming or engine.has_work:
        if coming and steps % 2 == 0:
            engine.add(coming.pop(0))
        steps += 1
        if steps % 7 == 0 and victims:
            last = engine.abort(victims.pop())
            assert last is None or last.finish_reason == "abort"
            engine.check_integrity()
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
        engine.check_integrity()
    tiny.assert_idle(engine)
    for request_id, tokens in got.items():
        whole = expected[request_id]
        assert tokens == whole[: len(tokens)]
        assert len(tokens) == len(whole) or request_id in ("r2", "r5", "r6", "r9", "r12")


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_paths_of_every_length_enter_its_context(
    name: str,
    native: bool,
    tiny_checkpoint: Path,
    drafts: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An untrained draft's own trees are refused; an oracle's are not, and it has to follow. Slots move in torch."""
    if not native:
        monkeypatch.setattr(library, "load", lambda: None)
    engine = engine_of(name, tiny_checkpoint, drafts)
    watched = guided(engine, expected)
    assert tiny.answers(engine, mixed(), every=1) == expected
    assert len(watched.trees) > 30 or name == "ngram"


@pytest.mark.parametrize("name", TRAINED)
def test_the_native_step_proposes_what_torch_does(
    name: str,
    tiny_checkpoint: Path,
    drafts: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same trees, node by node, wherever rounding does not decide which node is the last to get in."""
    requests = mixed(10)
    engine = engine_of(name, tiny_checkpoint, drafts)
    if engine.drafter is None or not engine.drafter.native:
        pytest.skip("no native library here")
    ours = guided(engine, expected)
    tiny.answers(engine, requests, every=1)
    monkeypatch.setattr(library, "load", lambda: None)
    engine = engine_of(name, tiny_checkpoint, drafts)
    theirs = guided(engine, expected)
    tiny.answers(engine, requests, every=1)
    common = ours.trees.keys() & theirs.trees.keys()
    assert len(common) > 20
    same = [ours.trees[key] == theirs.trees[key] for key in common]
    assert sum(same) >= 0.95 * len(same)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings", [{"max_nodes": 1}, {"max_nodes": 40, "max_rows": 500, "tree_width": 6}, {"max_rows": 20}]
)
def test_within_any_budget(
    name: str, settings: dict[str, int], tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    engine = engine_of(name, tiny_checkpoint, drafts, **settings)
    assert tiny.answers(engine, mixed(10), every=1) == {f"r{i}": expected[f"r{i}"] for i in range(10)}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_with_a_draft_says_what_it_says_without(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path]
) -> None:
    """Where rows keep their bits whatever stands beside them; elsewhere rounding turns a token now and then."""
    engine = engine_of(name, tiny_checkpoint, drafts, dtype="bfloat16")
    with_draft = tiny.answers(engine, mixed(8), every=1)
    plain = Engine(tiny.config(tiny_checkpoint, drafter="off", dtype="bfloat16", max_num_seqs=1))
    without = {r.request_id: tiny.answers(plain, [r])[r.request_id] for r in mixed(8)}
    differing = [key for key in without if without[key] != with_draft[key]]
    assert not differing or not engine.target.native
