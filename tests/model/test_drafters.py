"""Test every drafter: answers do not depend on it, its context follows the kept tokens, a foreign draft is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.backends.native import library
from model.config import TRAINED
from model.decoding.tree import Trees
from model.drafters import checkpoint
from model.drafters.eagle.drafter import EagleDrafter, Expansion
from model.drafters.eagle.network import EagleNetwork
from model.drafters.flash import native as flash_native
from model.drafters.flash.drafter import FlashDrafter
from model.drafters.medusa.drafter import MedusaDrafter
from model.drafters.medusa.network import MedusaNetwork
from model.engine.engine import Engine
from model.errors import ConfigError
from model.train import loss
from model.train.loss import Anchors, Learner
from model.train.seen import capture
from tests.model import tiny
from tests.model.guided import Guided, guided
from tests.model.test_equality import mixed

NAMES = (*TRAINED, "ngram")
FEW = 60  # size of a reduced draft vocabulary


@pytest.fixture(scope="module")
def expected(plain_engine: Engine) -> dict[str, list[int]]:
    """Answer each request alone and without a draft."""
    return {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in mixed()}


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Path, drafts: dict[str, Path]) -> Engine:
    return tiny.engine_of(request.param, tiny_checkpoint, drafts)


# -- the answer stays the same


def test_alone(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Requests are greedy and sampled, with images, videos and text alone; nearly all drafted tokens are rejected."""
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
    engine = tiny.engine_of(name, tiny_checkpoint, drafts)
    watched = guided(engine, expected)
    assert tiny.answers(engine, mixed(), every=1) == expected
    assert len(watched.trees) > 30 or name == "ngram"


@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
@pytest.mark.parametrize("name", ["flash", "flash-paper"])
def test_the_native_step_proposes_what_torch_does(
    name: str,
    table: bool,
    tiny_checkpoint: Path,
    drafts: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trees are the same, node by node, except where rounding decides which node is the last to get in.

    This includes vocabularies too large for a table of each token's contribution to the layers.
    """
    if library.load() is None:
        pytest.skip("no native library here")
    if not table:
        monkeypatch.setattr(flash_native, "MAX_TABLE", 0)
    engine = tiny.engine_of(name, tiny_checkpoint, drafts)
    assert isinstance(engine.drafter, FlashDrafter)
    assert engine.drafter.step is not None
    assert (engine.drafter.step.num_bytes > 0) == table
    ours = trees_of(engine, expected)
    monkeypatch.setattr(library, "load", lambda: None)
    assert_alike(ours, trees_of(tiny.engine_of(name, tiny_checkpoint, drafts), expected))


@pytest.mark.parametrize("name", TRAINED)
def test_a_targets_states_may_be_of_any_width(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products read whole steps; a width that is no multiple must not read into the next state."""
    model = tiny.save_checkpoint(tmp_path / "target", width=40)
    folder = {name: tiny.save_network(tmp_path / "draft", name, model)}
    expected = tiny.answers(Engine(tiny.config(model, drafter="off", max_num_seqs=1)), mixed(10))
    engine = tiny.engine_of(name, model, folder)
    assert tiny.answers(engine, mixed(10)) == expected
    ours = trees_of(engine, expected)
    monkeypatch.setattr(library, "load", lambda: None)
    assert_alike(ours, trees_of(tiny.engine_of(name, model, folder), expected))


ProposedTrees = dict[tuple[str, int], set[tuple[int, ...]]]


def trees_of(engine: Engine, expected: dict[str, list[int]]) -> ProposedTrees:
    """Return the trees that the engine's drafter proposes, see `Guided`."""
    watched = guided(engine, expected)
    tiny.answers(engine, mixed(10), every=1)
    return watched.trees


def assert_alike(ours: ProposedTrees, theirs: ProposedTrees) -> None:
    common = ours.keys() & theirs.keys()
    assert len(common) > 10
    same = [ours[key] == theirs[key] for key in common]
    assert sum(same) >= 0.9 * len(same)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_it_does_not_know(
    name: str,
    native: bool,
    tiny_checkpoint: Path,
    drafts: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests without speculation never start in the drafter, alone or in a batch with others."""
    if not native:
        monkeypatch.setattr(library, "load", lambda: None)
    engine = tiny.engine_of(name, tiny_checkpoint, drafts)
    silent = [replace(request, speculation=False) for request in mixed(4)]
    assert tiny.answers(engine, silent) == {f"r{i}": expected[f"r{i}"] for i in range(4)}
    assert engine.pop_stats().drafts == 0
    some = [replace(request, speculation=i % 3 > 0) for i, request in enumerate(mixed())]
    assert tiny.answers(engine, some, every=1) == expected


@pytest.mark.parametrize("name", NAMES)
def test_where_the_load_decides_how_much_is_drafted(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    """Draft as in serving: trees are cut, sequences pause, some never begin."""
    engine = tiny.engine_of(name, tiny_checkpoint, drafts, adaptive_drafting=True)
    for every in (0, 1, 2):
        assert tiny.answers(engine, mixed(), every=every) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [{"max_nodes": 1}, {"max_nodes": 40, "max_verify_tokens": 500, "tree_width": 6}, {"max_verify_tokens": 20}],
)
def test_within_any_budget(
    name: str, settings: dict[str, int], tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    engine = tiny.engine_of(name, tiny_checkpoint, drafts, **settings)
    assert tiny.answers(engine, mixed(10), every=1) == {f"r{i}": expected[f"r{i}"] for i in range(10)}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_with_a_draft_says_what_it_says_without(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path]
) -> None:
    """In the native library a row's bits do not depend on its batch; elsewhere rounding may change a token."""
    engine = tiny.engine_of(name, tiny_checkpoint, drafts, dtype="bfloat16")
    with_draft = tiny.answers(engine, mixed(8), every=1)
    plain = Engine(tiny.config(tiny_checkpoint, drafter="off", dtype="bfloat16", max_num_seqs=1))
    without = {r.request_id: tiny.answers(plain, [r])[r.request_id] for r in mixed(8)}
    differing = [key for key in without if without[key] != with_draft[key]]
    assert not differing or not engine.target.native


# -- where not all tokens are offered


@pytest.fixture(scope="module")
def narrow(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save the same drafts with a small draft vocabulary, drawn from the whole vocabulary."""
    folder = tmp_path_factory.mktemp("narrow")
    return {name: tiny.save_network(folder / name, name, tiny_checkpoint, vocabulary=FEW) for name in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
def test_only_tokens_that_are_offered_are_proposed(
    name: str,
    tiny_checkpoint: Path,
    narrow: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The native step, torch and recorded passes propose the same trees, and answers stay the same."""
    requests, offered = mixed(10), set(load_file(narrow[name] / "model.safetensors")["offered"].tolist())
    assert len(offered) == FEW
    assert max(offered) > 2 * FEW, "ids and places must not be the same"
    trees = []
    for native, graphs in ((True, False), (False, False), (False, True)):
        if not native:
            monkeypatch.setattr(library, "load", lambda: None)
        engine = tiny.engine_of(name, tiny_checkpoint, narrow, graphs=graphs)
        watched = guided(engine, expected)
        tiny.answers(engine, requests, every=1)
        trees.append(watched.trees)
        proposed = {token for paths in watched.trees.values() for path in paths for token in path[1:]}
        assert proposed <= offered
        assert len(proposed) > 5
        engine = tiny.engine_of(name, tiny_checkpoint, narrow, graphs=graphs)
        assert tiny.answers(engine, requests, every=1) == {r.request_id: expected[r.request_id] for r in requests}
    for others in trees[1:]:
        common = trees[0].keys() & others.keys()
        assert len(common) > 10
        assert sum(trees[0][key] == others[key] for key in common) >= 0.9 * len(common)


# -- what each of them is


def test_the_published_tree_is_the_same_at_every_step(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    """The tree has 25 nodes, whatever the draft's probabilities are."""
    engine = tiny.engine_of("flash-paper", tiny_checkpoint, drafts, max_num_seqs=2)
    watched = guided(engine, expected)
    tiny.answers(engine, mixed(6))
    lengths = {tuple(sorted(map(len, paths))) for paths in watched.trees.values()}
    assert lengths == {(1, *[2] * 4, *[3] * 8, *[4] * 8, *[5] * 3, *[6] * 2)}, "as long as EAGLE's, root included"


def test_the_published_tree_on_recorded_passes(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    engine = tiny.engine_of("flash-paper", tiny_checkpoint, drafts, graphs=True)
    assert tiny.answers(engine, mixed(8), every=1) == {f"r{i}": expected[f"r{i}"] for i in range(8)}


class Contexts:
    """Record a drafter's context of each sequence at every proposal, by request and answer tokens known."""

    def __init__(self, watched: Guided) -> None:
        self.seen: dict[tuple[str, int], Tensor] = {}
        self._watched, self._propose = watched, watched.drafter.propose
        watched.drafter.propose = self.propose  # type: ignore[method-assign]

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        drafter = self._watched.drafter
        for sequence in self._watched.engine.scheduler.running:
            slot = sequence.slot
            if slot is not None and budgets[slot : slot + 1].any():
                if isinstance(drafter, EagleDrafter):
                    held = drafter.cache.data[0, :, slot, :, : drafter.cache.lengths[slot]].flatten()
                    state = torch.cat((held, drafter._pending[slot]))
                else:
                    assert isinstance(drafter, MedusaDrafter)
                    state = drafter._last[slot].clone()
                self.seen[sequence.request.request_id, len(sequence.tokens)] = state
        return self._propose(newest, budgets)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_its_context_is_what_recomputing_from_scratch_gives(
    name: str,
    native: bool,
    tiny_checkpoint: Path,
    drafts: dict[str, Path],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EAGLE: keys, values and the pending feature, built chunk by chunk and path by path, across moves between slots.
    Medusa: the hidden state of the last kept position. Off by one, a trained draft is served on what it never saw."""
    if not native:
        monkeypatch.setattr(library, "load", lambda: None)
    engine = tiny.engine_of(name, tiny_checkpoint, drafts)
    seen = Contexts(guided(engine, expected)).seen
    requests = mixed(10)
    tiny.answers(engine, requests, every=1)
    target = engine.target
    network = checkpoint.load(drafts[name], target)  # the served network's layers may have been freed
    assert len(seen) > 20
    with torch.no_grad():
        for request in requests:
            prompt, answer = target.prompt(request.messages), tuple(expected[request.request_id])
            (whole,) = capture(target, [prompt], [answer], network)
            for (request_id, known), state in seen.items():
                if request_id != request.request_id:
                    continue
                computed = len(prompt.ids) + known - 1
                if isinstance(network, MedusaNetwork):
                    wanted = whole.aux_hidden_states[computed - 1]
                else:
                    assert isinstance(network, EagleNetwork)
                    features = network.fuse(whole.aux_hidden_states[:computed])
                    rows = network.entering(features[:-1], network.entry(whole.embeds[1:computed]))[None]
                    both = network.context_keys_values(rows, torch.arange(computed - 1)[None])
                    wanted = torch.cat((*(part.flatten() for part in both), features[-1]))
                torch.testing.assert_close(state, wanted, atol=2e-4, rtol=1e-3)


def test_eagles_passes_are_those_it_was_trained_with(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth by depth over its own features, behind a true continuation: the logits in serving are the trainer's."""
    monkeypatch.setattr(library, "load", lambda: None)
    engine = tiny.engine_of("eagle", tiny_checkpoint, drafts)
    drafter, target, requests = engine.drafter, engine.target, mixed(5)[::2]  # those with long answers
    assert isinstance(drafter, EagleDrafter)
    for request in requests:
        engine.add(request)
    while any(s.prefilling for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    running = {s.request.request_id: s for s in engine.scheduler.running}
    answers = {r.request_id: expected[r.request_id] for r in requests if r.request_id in running}
    assert len(answers) > 1
    with torch.no_grad():
        for request in requests:
            if (sequence := running.get(request.request_id)) is None or sequence.slot is None:
                continue
            answer, slot = answers[request.request_id], sequence.slot
            (seen,) = capture(target, [target.prompt(request.messages)], [tuple(answer)], drafter.network)
            place = len(seen.prompt.ids) + len(sequence.tokens) - 1
            coming = torch.tensor(seen.ids[place : place + 3])
            anchors = Anchors(
                *(torch.tensor([[place]]), coming[:1][None], torch.tensor([seen.ids[place + 1 : place + 6]])),
                *(coming, torch.ones(1, 5, dtype=torch.bool)),
            )
            taught = loss.eagle_logits(Learner(target, drafter.network), drafter.network, [seen], anchors)[0]
            slots = slot + 1
            expansion = Expansion(drafter, np.array(drafter.cache.lengths[:slots], np.int32), np.ones(slots, bool))
            for depth, token in enumerate(coming):
                parents = torch.full((slots, 1), depth - 1)
                served = expansion(depth, token.expand(slots, 1), parents)[slot, 0]
                torch.testing.assert_close(served, taught[depth], atol=1e-3, rtol=1e-3)
            assert taught.std() > 0.1
    for request in requests:
        engine.abort(request.request_id)


# -- prompt lookup


# -- the simulation


# -- which one is meant


def test_a_drafts_folder_says_whose_it_is(tiny_checkpoint: Path, drafts: dict[str, Path]) -> None:
    for name, folder in drafts.items():
        assert tiny.config(tiny_checkpoint, draft=str(folder)).resolved().drafter == name
        for other in TRAINED:
            config = tiny.config(tiny_checkpoint, draft=str(folder), drafter=other)
            if other == name:
                assert config.resolved().drafter == name
            else:
                with pytest.raises(ConfigError, match=f"one for --drafter {name}, not for '{other}'"):
                    config.resolved()


def test_ngram_needs_no_draft_and_others_say_that_they_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert tiny.config(tiny_checkpoint, drafter="ngram").resolved().drafter == "ngram"
    for name in TRAINED:
        with pytest.raises(ConfigError, match="--draft PATH"):
            tiny.config(tiny_checkpoint, drafter=name).resolved()
    (tmp_path / "config.json").write_text('{"drafter": "magic"}')
    with pytest.raises(ConfigError, match="magic"):
        tiny.config(tiny_checkpoint, draft=str(tmp_path)).resolved()


@pytest.mark.parametrize("name", TRAINED)
def test_a_draft_of_any_kind_is_bound_to_its_target(
    name: str, tiny_gqa_checkpoint: Path, drafts: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match="another target"):
        tiny.engine_of(name, tiny_gqa_checkpoint, drafts)


def test_the_target_offers_the_layers_that_its_draft_reads(tiny_checkpoint: Path, drafts: dict[str, Path]) -> None:
    for name, layers in {"flash": (3,), "flash-paper": (1, 2, 3), "eagle": (1, 2, 3), "medusa": (3,)}.items():
        assert tiny.engine_of(name, tiny_checkpoint, drafts).target.aux_layers == layers
    with pytest.raises(ConfigError, match="reads layers"):
        checkpoint.load(drafts["medusa"], tiny.target_for("eagle", tiny_checkpoint))


def test_what_a_drafter_holds_is_accounted_for(engine: Engine) -> None:
    memory, drafter = engine.info.memory, engine.drafter
    assert drafter is not None
    assert memory["draft_weights"] == drafter.num_bytes
    assert memory["draft_kv_cache"] == drafter.cache_bytes
    assert (drafter.num_bytes > 0) == (engine.config.drafter != "ngram")
