"""Test load-aware drafting: decisions follow from prices and chances alone, and never change an answer."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from model.backends.native import library
from model.config import EngineConfig
from model.decoding.tree import Trees, admitted, roots
from model.demo import prompts
from model.engine.engine import Engine
from model.engine.native_round import NativeRound
from model.engine.sequence import Sequence
from model.engine.speculation import BINS, FIRST_PAUSE, LONGEST_PAUSE, PLAIN_EVERY, PROBE, SpeculationController
from model.request import Request, SamplingParams
from tests.model import tiny
from tests.model.oracle import OracleDrafter

# -- which nodes are worth verifying


def some_trees(rng: np.random.Generator, sizes: list[int]) -> Trees:
    """Draw random trees whose children are less likely than their parents."""
    rows = 1 + max(sizes)
    trees = roots(rng.integers(0, 99, len(sizes)), rows)
    for b, size in enumerate(sizes):
        trees.sizes[b] = 1 + size
        for row in range(1, 1 + size):
            parent = int(rng.integers(0, row))
            trees.tokens[b, row], trees.parents[b, row] = rng.integers(0, 99), parent
            trees.depths[b, row] = 1 + trees.depths[b, parent]
            trees.scores[b, row] = trees.scores[b, parent] - rng.exponential(0.5) - 1e-6
    return trees


def paths(trees: Trees) -> set[tuple[int, tuple[int, ...]]]:
    found = set()
    for b, size in enumerate(trees.sizes):
        known: dict[int, tuple[int, ...]] = {0: ()}
        for row in range(1, int(size)):
            assert trees.parents[b, row] < row
            known[row] = (*known[int(trees.parents[b, row])], int(trees.tokens[b, row]))
            assert trees.depths[b, row] == len(known[row])
            found.add((b, known[row]))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_those_nodes_are_verified_that_give_the_most_tokens_a_second(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trees = some_trees(rng, [int(n) for n in rng.integers(0, 9, 4)])
    seconds = 1.0 + np.cumsum(rng.uniform(0.0, 0.3, 64))
    few = admitted(trees, 4, seconds, np.exp)
    scores = sorted((float(trees.scores[b, r]) for b in range(4) for r in range(1, trees.sizes[b])), reverse=True)
    rates = [(4 + sum(np.exp(scores[:n]))) / seconds[n] for n in range(len(scores) + 1)]
    assert sum(few.sizes) - 4 == int(np.argmax(rates))
    assert paths(few) <= paths(trees)
    kept = [float(few.scores[b, r]) for b in range(4) for r in range(1, few.sizes[b])]
    assert sorted(kept, reverse=True) == scores[: len(kept)]
    assert few.tokens[:, 0].tolist() == trees.tokens[:, 0].tolist()


@pytest.mark.skipif(library.load() is None, reason="no native library here")
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.2, 5.0])
def test_the_native_library_admits_the_same_nodes(slope: float) -> None:
    """Prices range from nodes so cheap that all are verified to nodes so expensive that none is."""
    engine = Engine(EngineConfig(dtype="float32", max_num_seqs=4, max_model_len=1280))
    now, load = engine.round, engine.load
    assert isinstance(now, NativeRound)
    for number in range(3):
        told = prompts.messages(number, split="heldout", task="image caption")
        engine.add(Request(f"{number}", told, SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(6):
        engine.step()
    for sequence in engine.scheduler.running:
        assert sequence.slot is not None
        now.newest[sequence.slot], now.budgets[sequence.slot] = sequence.tokens[-1], 9
        now.roots[sequence.slot] = sequence.next_position + len(sequence.tokens) - 1
    price, load.curve_at = load.curve_at, None
    whole, _, _ = now.draft_and_verify(3, 9)
    whole = Trees(*(getattr(whole, name).copy() for name in ("tokens", "parents", "depths", "sizes", "scores")))
    assert whole.sizes.tolist() == [10, 10, 10]
    load.curve_at, load._curve[:] = price, 1.0 + slope * np.arange(len(load._curve))
    few, _, _ = now.draft_and_verify(3, 9)
    assert paths(few) == paths(admitted(whole, 3, load._curve, load._chances))
    assert {0.0: 27, 5.0: 0}.get(slope, sum(few.sizes) - 3) == sum(few.sizes) - 3


# -- who drafts


def known(plain: float = 1.0, drafting: float = 2.0, slots: int = 8, nodes: int = 7) -> SpeculationController:
    """Create a controller for which every round takes the same time, whatever its batch."""
    load = SpeculationController(slots, nodes)
    load.learn(np.full(len(load.batches), plain), np.full((len(load.batches), len(load.places)), drafting))
    return load


def sequence() -> Sequence:
    fields = {"speculates": True, "remaining": 99, "tries": 0, "brought": 0.0, "pause": 0, "next_pause": 0}
    return cast("Sequence", SimpleNamespace(**fields, guide=None))


def rounds(
    load: SpeculationController, one: Sequence, accepted: int, count: int, *, plain: float = 1.0, drafting: float = 2.0
) -> list[int]:
    """Return the node budget of each of `count` rounds; each round with nodes has `accepted` of them accepted."""
    asked = []
    for _ in range(count):
        (nodes,) = load.budgets([one], 7)
        if nodes:
            load.drafted(one, accepted)
        load.took(1, int(nodes > 0), nodes, drafting if nodes else plain)
        asked.append(nodes)
    return asked


def test_a_sequence_on_which_drafting_fails_stops_paying_for_it() -> None:
    load, one = known(), sequence()
    asked = rounds(load, one, accepted=0, count=2000)
    assert sum(map(bool, asked)) < 40, "it drafts on, and every such round takes twice as long"
    assert any(asked[200:]), "it never tries again, though what is said may have become easier"
    assert FIRST_PAUSE <= one.next_pause <= LONGEST_PAUSE


def test_a_sequence_on_which_drafting_pays_goes_on() -> None:
    load, one = known(), sequence()
    asked = rounds(load, one, accepted=3, count=2000)
    assert sum(map(bool, asked)) > 1980
    assert 0 in asked, "what a plain round takes must be seen now and then"


def test_it_drafts_again_when_drafts_become_good() -> None:
    load, one = known(), sequence()
    rounds(load, one, accepted=0, count=500)
    asked = rounds(load, one, accepted=4, count=1200)
    assert sum(map(bool, asked[-300:])) > 290


def test_prices_follow_the_machine() -> None:
    """If another process takes half of the cores, all rounds take twice as long, also the rare plain ones."""
    load, one = known(), sequence()
    rounds(load, one, accepted=3, count=100)
    rounds(load, one, accepted=3, count=400, plain=2.0, drafting=4.0)
    load._rounds = 0
    load._batch = 0
    load.budgets([one], 7)
    assert load._plain == pytest.approx(2.0, rel=0.15)
    assert load._price == pytest.approx(2.0, rel=0.25)


def test_plain_rounds_are_rare_where_drafting_pays() -> None:
    load, one = known(), sequence()
    asked = rounds(load, one, accepted=5, count=4 * PLAIN_EVERY)
    assert asked.count(0) < 14


def test_drafting_begins_at_a_new_load_though_whole_trees_would_not_pay_there() -> None:
    """If every row costs, as without a matrix unit, 31 nodes for each of eight sequences cost eight plain rounds."""
    load = SpeculationController(8, 31)
    load.learn(np.ones(len(load.batches)), np.array([[1.2 + 0.025 * b * n for n in load.places] for b in load.batches]))
    alone, others = sequence(), [sequence() for _ in range(8)]
    for _ in range(100):
        load.budgets([alone], 31)
        load.drafted(alone, 3)
        load.took(1, 1, 8, 1.4)
    asked = [load.budgets(others, 31) for _ in range(3)]
    assert all(all(each) for each in asked), "four tokens in two rounds' time, and nobody drafts"
    assert max(map(max, asked)) < 16, "no more trees are grown than are worth verifying"


def test_short_answers_are_not_drafted_for_where_reading_the_prompt_takes_longer_than_they_do() -> None:
    load, one = known(), sequence()
    assert load.begins(1, prompt=200), "nothing is known yet"
    rounds(load, one, accepted=4, count=50)
    load.read(200, 300.0)  # the first measurement is slow and counts little
    for _ in range(30):
        load.read(200, 10.0)
    load.finished(1)
    assert load.begins(1, prompt=200), "one answer says nothing of the next"
    for _ in range(50):
        load.finished(100)
    assert all(load.begins(1, prompt=200) for _ in range(2 * PROBE)), "a hundred tokens save sixty rounds"
    for _ in range(50):
        load.finished(4)
    begun = [load.begins(1, prompt=200) for _ in range(4 * PROBE)]
    assert begun.count(True) == 4, "one in so many all the same, or nobody would see that times have changed"


def test_chances_are_what_was_seen_where_enough_was() -> None:
    load = SpeculationController(8, 7)
    said = load.chance.copy()
    load.tried[3], load.hits[3] = 4000, 400  # a bin of nodes with high confidence
    load._weigh()
    assert load.chance[3] == pytest.approx(0.1, abs=0.01)
    assert (load.chance[:3] == said[:3]).all()
    assert (np.diff(load.chance) <= 0).all()
    assert len(load.chance) == BINS
    assert load.calibration() == [(said[3], 0.1, 4000)]


# -- and what is said


def test_a_rehearsal_leaves_nothing_behind(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=6, adaptive_drafting=True))
    assert engine.load.known
    prices = np.array([[*row, plain] for row, plain in zip(engine.load.drafting, engine.load.plain, strict=True)])
    assert np.isfinite(prices).all()
    assert (prices > 0).all()
    assert not engine.load.tried.any()
    tiny.assert_idle(engine)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("every", [0, 2], ids=["at once", "each second step"])
def test_whatever_is_decided_the_same_is_said(
    tiny_checkpoint: Path,
    tiny_draft: Path,
    plain_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    every: int,
) -> None:
    """Sequences without drafts, sequences that pause and resume, trees cut anywhere: greedy and seeded."""
    if native and library.load() is None:
        pytest.skip("no native library here")
    requests = [
        tiny.ask(f"r{i}", f"What is number {i}?", *([tiny.image(i)] if i % 3 else []), max_tokens=20 + i,
                 temperature=float(i % 2), seed=i)
        for i in range(9)
    ]  # fmt: skip
    expected = {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in requests}
    if not native:
        monkeypatch.setattr(library, "load", lambda: None)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=5, adaptive_drafting=True))
    rng = random.Random(every)
    load = engine.load
    monkeypatch.setattr(load, "begins", lambda *_: rng.random() < 0.7)
    monkeypatch.setattr(
        load, "budgets", lambda given, most: [rng.choice((0, 1, most)) if s.speculates else 0 for s in given]
    )

    def whim(*given: Any) -> None:
        load._curve[:] = np.cumsum(np.random.default_rng(rng.randrange(99)).uniform(0, 1, len(load._curve))) + 0.1

    whim()
    monkeypatch.setattr(load, "took", whim)
    for drafter in (engine.drafter, OracleDrafter(engine, expected, every)):
        engine.use(drafter)
        assert tiny.answers(engine, requests, every=every) == expected
        tiny.assert_idle(engine)
