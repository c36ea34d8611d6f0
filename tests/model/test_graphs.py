"""Test that passes in a few rounded shapes over static buffers equal passes in their own shapes.

Without a GPU nothing is recorded, but the buffers, the shapes and the padding are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from model.backends import graphs, kv_cache
from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind, attend
from model.backends.graphs import Replays, Shape
from model.backends.kernels import choice
from model.backends.kernels.choice import Options
from model.backends.kv_cache import KVCache, LayerShape, uniform
from model.backends.native import library
from model.drafters.flash.drafter import FlashDrafter
from model.engine.engine import Engine
from model.targets.llava import LlavaTarget
from model.targets.registry import load_target
from model.targets.support import rope_is_fixed
from tests.model import tiny
from tests.model.oracle import with_oracle
from tests.model.test_equality import mixed


@pytest.fixture(scope="module")
def engine(tiny_gqa_checkpoint: Path, tiny_gqa_draft: Path) -> Iterator[Engine]:
    """Start an engine in torch with replayed passes; seven slots, so that not every batch is a power of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda: None)
        yield Engine(
            tiny.config(
                tiny_gqa_checkpoint,
                draft=str(tiny_gqa_draft),
                max_num_seqs=7,
                prefill_chunk=16,
                graphs=True,
                max_nodes=11,
            )
        )


@pytest.fixture(scope="module")
def expected(tiny_gqa_checkpoint: Path) -> dict[str, list[int]]:
    """Answer one request at a time, without a draft, with every pass in its own shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda: None)
        plain = Engine(tiny.config(tiny_gqa_checkpoint, drafter="off", max_num_seqs=1, max_model_len=384))
        return {r.request_id: tiny.answers(plain, [r])[r.request_id] for r in mixed()}


@pytest.mark.parametrize("every", [0, 1, 3], ids=["at once", "each step", "each third step"])
def test_replayed_passes_say_the_same_as_plain_ones(engine: Engine, expected: dict[str, list[int]], every: int) -> None:
    """Answers are greedy and seeded, with an untrained draft (its passes are replayed, too) and with an oracle."""
    passes, drafter = tiny.replays(engine), engine.drafter
    assert isinstance(drafter, FlashDrafter)
    assert tiny.answers(engine, mixed(), every=every) == expected
    assert passes.shapes
    assert drafter._proposals is not None
    assert drafter._observations is not None
    assert drafter._proposals.shapes
    assert drafter._observations.shapes
    with_oracle(engine, expected, seed=every)
    try:
        assert tiny.answers(engine, mixed(), every=every) == expected
    finally:
        engine.use(drafter)


class Traced:
    """Record every tensor operation once; replays run no Python."""

    def record(self, run: Callable[[], graphs.Outputs]) -> Callable[[], graphs.Outputs]:
        run()
        traced = make_fx(run)()
        return lambda: traced()


def test_what_is_recorded_depends_on_nothing_that_python_knew_by_then(
    tiny_gqa_checkpoint: Path, tiny_gqa_draft: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length or a position read by Python would be the same in every replay, as it would in a CUDA graph."""
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(graphs, "recorder", lambda _: Traced())
    engine = Engine(
        tiny.config(tiny_gqa_checkpoint, draft=str(tiny_gqa_draft), max_num_seqs=7, prefill_chunk=16, graphs=True)
    )
    assert tiny.answers(engine, mixed(), every=1) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, mixed(), every=1) == expected


def test_a_few_shapes_hold_every_pass(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Recording is expensive, so passes share a few shapes."""
    tiny.answers(engine, mixed(), every=2)
    shapes = set(tiny.replays(engine).shapes)
    assert {s.batch for s in shapes} <= {1, 2, 4, 7}
    assert {s.rows for s in shapes} <= {1, 8, 12}
    assert {s.keys for s in shapes} <= {256, engine.cache.stride}
    tiny.answers(engine, mixed(), every=2)
    assert set(tiny.replays(engine).shapes) == shapes, "the same passes over again, and something was recorded anew"


def test_native_passes_are_not_replayed_and_neither_are_those_of_who_does_not_want_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library.load() is not None:
        assert Engine(tiny.config(tiny_checkpoint, graphs=True)).round.native
    monkeypatch.setattr(library, "load", lambda: None)
    assert tiny.in_torch(Engine(tiny.config(tiny_checkpoint))).passes is None, "on a CPU only where it is asked for"
    assert tiny.in_torch(Engine(tiny.config(tiny_checkpoint, graphs=False))).passes is None
    assert tiny.in_torch(Engine(tiny.config(tiny_checkpoint, graphs=True))).passes is not None


def test_a_pass_beyond_the_number_of_recordings_runs_all_the_same(
    engine: Engine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_RECORDINGS", 1)
    fresh = Replays(tiny.in_torch(engine).run, engine.cache, graphs.Again(), max_rows=12)
    monkeypatch.setattr(tiny.in_torch(engine), "passes", fresh)
    assert tiny.answers(engine, mixed(), every=1) == expected
    assert len(fresh.shapes) == 1


# -- one pass


def cache(num_slots: int = 5) -> KVCache:
    return KVCache(
        layers=uniform(1, 2, 8), num_slots=num_slots, capacity=100, margin=16,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def attending(plan: AttentionTensors, numbers: Tensor, states: Tensor | None) -> tuple[Tensor, ...]:
    """Split the states into queries, keys and values and attend: states are (batch, rows, 3 * 2 * 8)."""
    assert states is not None
    q, k, v = states.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return attend(plan, 0, q, k, v).transpose(1, 2), numbers.sum(0)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (3, 2), (3, 9), (4, 8), (5, 16), (5, 11)])
@pytest.mark.parametrize("mask_kind", MaskKind)
def test_what_is_held_stays_and_what_rounding_adds_is_not_seen(batch: int, rows: int, mask_kind: MaskKind) -> None:
    """Slots inside and outside the batch contain rows, which a pass must not change.

    It may write after those rows and, in idle slots, beyond the capacity: rows of a former sequence can still be
    shared.
    """
    torch.manual_seed(batch * rows)
    kv = cache()
    kv.data.copy_(torch.randn_like(kv.data))
    for slot, length in enumerate((100, 0, 37, 63, 64)):
        kv.take(slot)
        kv.lengths[slot] = length
    plain = cache()
    plain.data.copy_(kv.data)
    before = kv.data.clone()
    rng = np.random.default_rng(rows)
    parents = np.array([[-1, *(rng.integers(0, row) for row in range(1, rows))] for _ in range(batch)], np.int32)
    starts, counts = np.array(kv.lengths[:batch], np.int32), np.full(batch, rows, np.int32)
    counts[3:] = 0
    states, numbers = torch.randn(batch, rows, 48), rng.integers(0, 1000, (2, batch, rows))
    replays = Replays(attending, kv, graphs.Again(), max_rows=16)
    for _ in range(2):  # recorded, then replayed
        mixed_, sums = replays(AttentionMetadata(kv, 0, rows, starts, counts, mask_kind, parents), numbers, states)
    own = AttentionMetadata(plain, 0, rows, starts, counts, mask_kind, parents).plan
    theirs, _ = attending(own, torch.from_numpy(numbers), states)
    torch.testing.assert_close(mixed_[:3, :rows], theirs[:3], atol=1e-6, rtol=0)
    assert mixed_.isfinite().all(), "rows that rounding adds must not spoil others"
    assert np.array_equal(sums[:, :rows].numpy(), numbers.sum(0))
    for slot, length in enumerate(kv.lengths):
        assert torch.equal(kv.data[:, :, slot, :, :length], before[:, :, slot, :, :length]), "a held position changed"
        unused = torch.ones(kv.stride, dtype=torch.bool)
        unused[length : length + 16 if slot < min(batch, 3) else length] = False
        unused[kv.capacity : kv.capacity + 16] = False
        for cache_, way in ((kv, "replayed"), (plain, "plain")):
            same = (cache_.data[:, :, slot] == before[:, :, slot]).all(-1).flatten(0, 2).all(0)
            assert same[unused].all(), f"a {way} pass wrote where it must not"
    assert replays.shapes == (replays.shape(AttentionMetadata(kv, 0, rows, starts, counts, mask_kind, parents), 48),)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 2), (3, 9), (4, 16), (5, 11)])
def test_layers_with_windows_are_replayed_too(batch: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and slots that rounding adds lie in the ring of such a layer, or in its margin, and are not seen."""
    monkeypatch.setattr(kv_cache, "REACH", 0)
    rng = np.random.default_rng(rows)
    shapes = [LayerShape(2, 8), LayerShape(2, 8, window=20)]
    parents = np.array([[-1, *(rng.integers(0, row) for row in range(1, rows))] for _ in range(batch)], np.int32)
    caches = []
    for _ in range(2):
        torch.manual_seed(rows)
        kv = KVCache(layers=shapes, num_slots=5, capacity=300, margin=16, dtype=torch.float32,
                     device=torch.device("cpu"))  # fmt: skip
        for storage in kv.storages:
            storage.data.copy_(torch.randn(storage.data.shape))
        for slot, length in enumerate((300, 0, 37, 127, 200)):
            kv.take(slot)
            kv.lengths[slot] = length
        caches.append(kv)
    assert caches[0].storage(1)[0].ring == 128
    starts, counts = np.array(kv.lengths[:batch], np.int32), np.full(batch, rows, np.int32)
    counts[3:] = 0
    numbers = rng.integers(0, 1000, (2, batch, rows))

    def both(plan: AttentionTensors, numbers: Tensor, states: Tensor | None) -> tuple[Tensor, ...]:
        """Attend in both layers."""
        assert states is not None
        q, k, v = states.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = [
            attend(plan, layer, q, k, v, window=shape.window).transpose(1, 2) for layer, shape in enumerate(shapes)
        ]
        return (*mixed, numbers.sum(0))

    replays = Replays(both, caches[0], graphs.Again(), max_rows=16)
    for turn in range(3):  # recorded, then replayed
        states = torch.randn(batch, rows, 48)
        found = replays(AttentionMetadata(caches[0], 0, rows, starts, counts, MaskKind.TREE, parents), numbers, states)
        plan = AttentionMetadata(caches[1], 0, rows, starts, counts, MaskKind.TREE, parents).plan
        for mixed_, theirs in zip(found[:2], both(plan, torch.from_numpy(numbers), states)[:2], strict=True):
            assert mixed_.isfinite().all()
            torch.testing.assert_close(mixed_[:3, :rows], theirs[:3], atol=1e-6, rtol=0)
        for kv in caches:
            kv.keep(
                range(min(3, batch)), [[0] if turn == 0 and kv.lengths[s] < 300 else [] for s in range(min(3, batch))]
            )
        starts = np.array(kv.lengths[:batch], np.int32)


def test_shapes_are_the_smallest_that_hold_a_pass() -> None:
    kv = KVCache(
        layers=uniform(1, 1, 1), num_slots=12, capacity=4000, margin=16,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    replays = Replays(attending, kv, graphs.Again(), max_rows=16)

    def shape(batch: int, rows: int, start: int) -> Shape:
        starts = np.full(batch, start, np.int32)
        return replays.shape(AttentionMetadata(kv, 0, rows, starts, np.ones(batch, np.int32), MaskKind.CAUSAL), 0)

    assert [shape(batch, 1, 0).batch for batch in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert [shape(1, rows, 0).rows for rows in (1, 2, 8, 9, 16)] == [1, 8, 8, 16, 16]
    keys = [shape(1, 1, start).keys for start in (0, 255, 256, 383, 384, 1000, 1024, 2047, 3071, 3999)]
    assert keys == [256, 256, 384, 384, 512, 1024, 1536, 2048, 3072, 4032]


def test_what_rounding_adds_sees_itself_and_nothing_that_is_new_besides() -> None:
    """In some kernels a row that attends to nothing becomes NaN, and NaN spreads through the cache."""
    kv, seen = cache(), list[Tensor]()

    def look(plan: AttentionTensors, _: Tensor, __: Tensor | None) -> tuple[Tensor, ...]:
        seen.append(plan.visible.clone())
        return (plan.starts,)

    rows = AttentionMetadata(kv, 0, 3, np.zeros(3, np.int32), np.full(3, 3, np.int32), MaskKind.FULL)
    Replays(look, kv, graphs.Again(), max_rows=16)(rows, np.zeros((0, 3, 3), np.int64))
    expected = torch.eye(8, dtype=torch.bool).repeat(4, 1, 1)
    expected[:3, :3, :3] = True
    assert torch.equal(seen[-1], expected)


def test_all_shapes_are_recorded_ahead_where_the_number_of_keys_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise requests would wait while a pass of a new shape is recorded."""
    kv = cache()
    replays = Replays(attending, kv, graphs.Again(), max_rows=16)
    replays.prepare(2, range(1, 17), 48)
    assert not replays.shapes, "as many shapes as there are lengths"
    monkeypatch.setattr(choice, "tree_attention", lambda *_: lambda q, *_, **__: q)
    replays.prepare(2, range(1, 17), 48)
    ahead = replays.shapes
    assert [(s.batch, s.rows) for s in ahead] == [(b, r) for b in (5, 4, 2, 1) for r in (16, 8, 1)]
    for batch in range(1, 6):
        for rows in range(1, 17):
            starts, counts = np.full(batch, 3 * rows, np.int32), np.ones(batch, np.int32)
            numbers = np.zeros((2, batch, rows), np.int64)
            replays(
                AttentionMetadata(kv, 0, rows, starts, counts, MaskKind.CAUSAL), numbers, torch.randn(batch, rows, 48)
            )
    assert replays.shapes == ahead


def test_passes_of_layers_with_windows_depend_on_no_number_of_keys_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for what each layer needs; one that is missing makes torch read keys."""
    layers = [LayerShape(2, 8), LayerShape(1, 16, window=20), LayerShape(2, 8, window=5000)]
    kv = KVCache(layers=layers, num_slots=5, capacity=4000, margin=16, dtype=torch.float32, device=torch.device("cpu"))
    known = {(8, Options()), (16, Options(window=True, ring=True))}
    monkeypatch.setattr(choice, "tree_attention", lambda _, width, __, kind: attend if (width, kind) in known else None)
    rows = AttentionMetadata(kv, 0, 1, np.zeros(1, np.int32), np.ones(1, np.int32), MaskKind.CAUSAL)
    replays = Replays(attending, kv, graphs.Again(), max_rows=16)
    assert replays.shape(rows, 0).keys == kv.positions
    for missing in list(known):
        known.remove(missing)
        assert replays.shape(rows, 0).keys == graphs.LEAST_KEYS
        known.add(missing)


def test_sixty_four_rows_see_each_other_through_the_sign_bit_too() -> None:
    kv = cache(1)
    kv.data.zero_()
    seen: list[Tensor] = []

    def look(plan: AttentionTensors, _: Tensor, __: Tensor | None) -> tuple[Tensor, ...]:
        seen.append(plan.visible.clone())
        return (plan.starts,)

    rows = AttentionMetadata(kv, 0, 64, np.zeros(1, np.int32), np.array([64], np.int32), MaskKind.CAUSAL)
    Replays(look, kv, graphs.Again(), max_rows=64)(rows, np.zeros((0, 1, 64), np.int64))
    assert np.array_equal(seen[-1].numpy(), rows.visible())


def on_meta(num_layers: int, heads: int, head_dim: int) -> tuple[KVCache, AttentionTensors]:
    """Create a cache and three rows of one slot on the meta device, where reading a value of a tensor fails."""
    kv = KVCache(
        layers=uniform(num_layers, heads, head_dim), num_slots=1, capacity=100, margin=16,
        dtype=torch.float32, device=torch.device("meta"),
    )  # fmt: skip
    starts = torch.zeros(1, dtype=torch.int64, device="meta")
    return kv, AttentionTensors(kv, 0, starts, starts, torch.ones(1, 5, 5, dtype=torch.bool, device="meta"), 64)


def test_a_pass_asks_for_no_number_on_its_way(
    tiny_checkpoint: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a value would wait for the GPU, and could not be recorded.

    transformers reads one if a mask function is registered.
    """
    monkeypatch.setattr(library, "load", lambda: None)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), graphs=True))
    target, drafter = engine.target, engine.drafter
    assert isinstance(target, LlavaTarget)
    assert isinstance(drafter, FlashDrafter)
    target.model.to("meta")
    drafter.network.to("meta")
    drafter._ends, drafter.tails = drafter._ends.to("meta"), drafter.tails.to("meta")
    _, plan = on_meta(4, 2, 32)
    ids = torch.zeros(1, 5, dtype=torch.int64, device="meta")
    hidden, aux_hidden_states, _ = target.run(ids, ids[None], plan)
    assert hidden.shape == (1, 5, 64)
    assert aux_hidden_states.shape == (1, 5, 3 * 64)
    drafter.cache, plan = on_meta(2, 2, 16)
    drafter._observe(plan, ids[None], aux_hidden_states)
    nodes, logits, contexts = drafter._propose(plan, ids[None], None)
    assert nodes.shape == (1, 3, 20)
    assert logits.shape[:2] == contexts.shape[:2] == (1, drafter.block)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_say_the_same_as_plain_passes(tiny_gqa_checkpoint: Path, tiny_gqa_draft: Path) -> None:
    settings = {"draft": str(tiny_gqa_draft), "device": "cuda", "max_num_seqs": 7, "prefill_chunk": 16}
    recorded, plain = (Engine(tiny.config(tiny_gqa_checkpoint, graphs=yes, **settings)) for yes in (True, False))
    assert tiny.answers(recorded, mixed(), every=1) == tiny.answers(plain, mixed(), every=1)
    assert tiny.replays(recorded).shapes


ROPES: dict[str, tuple[bool, dict[str, Any]]] = {
    "default": (True, {}),
    "linear": (True, {"factor": 2.0}),
    "yarn": (True, {"factor": 2.0, "original_max_position_embeddings": 256}),
    "llama3": (
        True,
        {
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "dynamic": (False, {"factor": 2.0}),
    "longrope": (
        False,
        {
            "factor": 2.0,
            "short_factor": [1.0] * 16,
            "long_factor": [2.0] * 16,
            "original_max_position_embeddings": 256,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_only_rotations_that_depend_on_a_position_alone_are_recorded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Other rotations depend on the largest position of a pass, which a recording would fix."""
    fixed, parameters = ROPES[kind]
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    (folder / "config.json").write_text(json.dumps(config))
    short = tiny.config(
        folder, max_model_len=128
    ).resolved()  # short enough that it cannot switch; longer ones are refused
    if library.load() is not None:
        assert load_target(short).native == fixed
    monkeypatch.setattr(library, "load", lambda: None)
    assert load_target(short).recordable == fixed


def test_of_parameters_for_each_kind_of_layer_all_must_be_fixed() -> None:
    """Gemma 3 and 4 have parameters for each kind of layer."""
    for kinds, fixed in ((("default", "linear"), True), (("default", "longrope"), False), (("dynamic", "yarn"), False)):
        parameters = {f"layers_{i}": {"rope_type": kind, "rope_theta": 1e4} for i, kind in enumerate(kinds)}
        assert rope_is_fixed(SimpleNamespace(rope_parameters=parameters)) == fixed
