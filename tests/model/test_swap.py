"""Test changing the draft while the engine runs: no answer changes, and a refused draft changes nothing."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.backends.native import library
from model.drafters.flash.network import DraftNetwork
from model.engine.engine import Engine
from model.engine.speculation import SpeculationController
from model.errors import ConfigError
from model.request import Request
from tests.model import tiny
from tests.model.test_equality import mixed

KINDS = ("flash", "eagle")


@pytest.fixture(scope="module")
def expected(plain_engine: Engine) -> dict[str, list[int]]:
    """Answer each request alone and without a draft, greedy and seeded."""
    return {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in mixed()}


@pytest.fixture(scope="module")
def drafts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save untrained drafts for the tiny target: two of FLASH that differ in shape, one of every other kind."""
    folder = tmp_path_factory.mktemp("swap")
    made = {
        name: tiny.save_network(folder / name, name, tiny_checkpoint) for name in ("flash-paper", "eagle", "medusa")
    }
    made["flash"] = tiny.save_draft(folder / "flash", tiny_checkpoint, seed=5)
    made["longer"] = tiny.save_draft(folder / "longer", tiny_checkpoint, seed=6, block=7, num_latents=2)
    return {name: str(path) for name, path in made.items()}


def engine_of(model: Path, draft: str, **settings: object) -> Engine:
    return Engine(tiny.config(model, draft=draft, **{"max_num_seqs": 8, "prefill_chunk": 16, **settings}))


def swap(engine: Engine, folder: str) -> None:
    engine.swap(engine.pack_draft(engine.read_draft(folder)))
    engine.check_integrity()


def swapping(engine: Engine, requests: list[Request], folders: list[str], at: int) -> dict[str, list[int]]:
    """Answer while the draft changes every `at` steps; a request joins every second step."""
    coming, got, steps = list(requests), {r.request_id: list[int]() for r in requests}, 0
    while coming or engine.has_work:
        if coming and steps % 2 == 0:
            engine.add(coming.pop(0))
        for output in engine.step():
            got[output.request_id] += [token.id for token in output.tokens]
        engine.check_integrity()
        steps += 1
        if steps % at == 0:
            swap(engine, folders[steps // at % len(folders)])
    tiny.assert_idle(engine)
    return got


@pytest.mark.parametrize(("way", "at"), [("native", 1), ("native", 7), ("torch", 1), ("torch", 7), ("recorded", 7)])
def test_no_answer_changes_however_often_the_draft_does(
    way: str,
    at: int,
    tiny_checkpoint: Path,
    drafts: dict[str, str],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With more requests than slots, each swap meets waiting, prefilling and decoding ones. In torch slots move as
    well.
    """
    if way != "native":
        monkeypatch.setattr(library, "load", lambda: None)
    engine = engine_of(tiny_checkpoint, drafts["flash"], max_num_seqs=4, graphs=way == "recorded")
    folders = [drafts[name] for name in ("flash", "longer", "eagle")]
    assert swapping(engine, mixed(), folders, at) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_phase_of_a_request_outlives_a_swap(
    kind: str, tiny_checkpoint: Path, drafts: dict[str, str], expected: dict[str, list[int]]
) -> None:
    """Swap after each number of steps of one request: while it waits, in its prompt, in its answer."""
    engine = engine_of(tiny_checkpoint, drafts[kind], prefix_cache=False)  # so that each prompt is computed as a whole
    for request in mixed(4):
        whole, steps = expected[request.request_id], 0
        while True:
            engine.add(request)
            tokens: list[int] = []
            for _ in range(steps):
                tokens += [token.id for output in engine.step() for token in output.tokens]
            under_way, waiting = bool(engine.scheduler.running), bool(engine.scheduler.waiting)
            swap(engine, drafts["longer" if engine.config.draft == drafts[kind] else kind])
            for sequence in engine.scheduler.running:
                assert not sequence.speculates, "the new draft has not seen what came before"
            while engine.has_work:
                for output in engine.step():
                    tokens += [token.id for token in output.tokens]
                    if output.finish_reason and len(whole) > 1:
                        assert output.stats is not None
                        assert output.stats.drafts or not waiting, "who waited has the new draft"
                engine.check_integrity()
            assert tokens == whole
            if not (under_way or waiting):
                break
            steps += 1
        assert steps > 2


def test_who_is_under_way_goes_on_without_a_draft_and_who_comes_has_the_new_one(
    tiny_checkpoint: Path, drafts: dict[str, str]
) -> None:
    engine = engine_of(tiny_checkpoint, drafts["flash"])
    engine.add(tiny.ask("old", "Describe the image.", max_tokens=40))
    for _ in range(4):
        engine.step()
    (old,) = engine.scheduler.running
    drafted = old.drafts
    assert drafted > 0
    swap(engine, drafts["longer"])
    outputs = tiny.drain(engine, [tiny.ask("new", "Describe the image.", max_tokens=40)])
    assert old.drafts == drafted
    stats = outputs["new"][-1].stats
    assert stats is not None
    assert stats.drafts > 0


def test_what_the_engine_tells_and_holds_is_the_new_drafts(tiny_checkpoint: Path, drafts: dict[str, str]) -> None:
    """The memory of the old draft is freed."""
    engine = engine_of(tiny_checkpoint, drafts["flash"])
    assert engine.info.drafter == "flash"
    memory, old = engine.info.memory, weakref.ref(engine.drafter)
    swap(engine, drafts["eagle"])
    assert engine.drafter is not None
    assert engine.info.drafter == engine.drafter.name == engine.config.drafter == "eagle"
    assert engine.info.memory["draft_weights"] == engine.drafter.num_bytes
    assert engine.info.memory["draft_kv_cache"] == engine.drafter.cache_bytes
    assert engine.info.memory["kv_cache"] == memory["kv_cache"]
    gc.collect()
    assert old() is None


def test_what_was_learnt_of_the_old_draft_is_forgotten(tiny_checkpoint: Path, drafts: dict[str, str]) -> None:
    """Prices of rounds depend on the machine, and are kept."""
    engine = engine_of(tiny_checkpoint, drafts["flash"], adaptive_drafting=True)
    tiny.drain(engine, mixed(8))
    load, fresh = engine.load, SpeculationController(8, engine.config.nodes)
    assert load.tried.sum() > 0
    plain = load.plain.copy()
    swap(engine, drafts["longer"])
    assert load.tried.sum() == load.hits.sum() == 0
    assert (load.chance == fresh.chance).all()
    assert load.known
    assert load.plain == plain
    tiny.drain(engine, mixed(8))
    assert load.tried.sum() > 0


# -- what is refused


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, drafts: dict[str, str]) -> Engine:
    return engine_of(tiny_checkpoint, drafts["flash"])


def refused(engine: Engine, folder: Path | str, match: str) -> None:
    before = engine.drafter, engine.config, engine.info
    with pytest.raises(ConfigError, match=match):
        engine.read_draft(str(folder))
    assert (engine.drafter, engine.config, engine.info) == before


def test_a_draft_for_another_target_is_refused(engine: Engine, tiny_gqa_draft: Path) -> None:
    refused(engine, tiny_gqa_draft, "another target")


def test_what_is_no_draft_is_refused(engine: Engine, drafts: dict[str, str], tmp_path: Path) -> None:
    refused(engine, tmp_path, "not a folder with config.json")
    (tmp_path / "config.json").write_text("{")
    refused(engine, tmp_path, "cannot be read")
    (tmp_path / "config.json").write_bytes((Path(drafts["longer"]) / "config.json").read_bytes())
    refused(engine, tmp_path, "cannot be read")
    weights = (Path(drafts["longer"]) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(engine, tmp_path, "cannot be read")
    (tmp_path / "model.safetensors").write_bytes((Path(drafts["flash"]) / "model.safetensors").read_bytes())
    refused(engine, tmp_path, "trained again")  # weights of another shape, as of an earlier version
    (tmp_path / "model.safetensors").write_bytes(weights)
    broken = load_file(tmp_path / "model.safetensors")
    broken["out.weight"][0, 0] = torch.inf
    save_file(broken, tmp_path / "model.safetensors")
    refused(engine, tmp_path, "out.weight holds what is no finite number")
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert isinstance(engine.read_draft(str(tmp_path)).network, DraftNetwork)


def test_a_draft_that_reads_other_layers_is_refused(engine: Engine, drafts: dict[str, str]) -> None:
    refused(engine, drafts["medusa"], "reads layers")


def test_trees_beyond_the_engines_room_are_refused(engine: Engine, drafts: dict[str, str]) -> None:
    refused(engine, drafts["flash-paper"], "--max-nodes 25")


def test_a_fixed_tree_cannot_take_the_place_of_one_that_follows_the_load(
    tiny_checkpoint: Path, drafts: dict[str, str]
) -> None:
    engine = engine_of(tiny_checkpoint, drafts["flash"], adaptive_drafting=True, max_nodes=25)
    refused(engine, drafts["flash-paper"], "fixed trees")


def test_another_kind_than_was_asked_for_is_refused(tiny_checkpoint: Path, drafts: dict[str, str]) -> None:
    """A worker that restarts with the new draft would refuse it."""
    engine = engine_of(tiny_checkpoint, drafts["flash"], drafter="flash")
    refused(engine, drafts["eagle"], "one for --drafter eagle")
    swap(engine, drafts["longer"])


@pytest.mark.parametrize("drafter", ["off", "ngram"])
def test_an_engine_without_a_trained_draft_takes_none(
    drafter: str, tiny_checkpoint: Path, drafts: dict[str, str]
) -> None:
    engine = Engine(tiny.config(tiny_checkpoint, drafter=drafter, max_num_seqs=2))
    refused(engine, drafts["flash"], "start it with --draft PATH")
