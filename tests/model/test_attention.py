"""Test the engine's attention against attention written out for one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from model.backends import attention, kv_cache
from model.backends.attention import AttentionMetadata, MaskKind, prompt_rows
from model.backends.kv_cache import KVCache, LayerShape, uniform
from model.decoding.tree import Trees
from model.engine.engine import Engine
from tests.model import tiny
from tests.model.written_out import Layer, Sequences

DIM = 8


def cache(kv_heads: int, num_slots: int = 3, dtype: torch.dtype = torch.float32, capacity: int = 100) -> KVCache:
    return KVCache(
        layers=uniform(1, kv_heads, DIM),
        num_slots=num_slots,
        capacity=capacity,
        margin=16,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def one_by_one(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute plain attention in float64: query (heads, dim) over keys and values (kv heads, seen, dim)."""
    groups = query.shape[0] // keys.shape[0]
    keys, values = (t.double().repeat_interleave(groups, 0) for t in (keys, values))
    scores = torch.einsum("hd,hsd->hs", query.double(), keys) / math.sqrt(DIM)
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values)


def random_tree(rng: np.random.Generator, batch: int, rows: int) -> Trees:
    """Draw random parents; tree b has b rows fewer than the batch is wide."""
    parents = np.full((batch, rows), -1)
    depths = np.zeros((batch, rows), np.int64)
    sizes = np.array([rows - b for b in range(batch)])
    for b in range(batch):
        for row in range(1, int(sizes[b])):
            parents[b, row] = rng.integers(row)
            depths[b, row] = depths[b, parents[b, row]] + 1
    return Trees(np.zeros((batch, rows), np.int64), parents, depths, sizes, np.zeros((batch, rows)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("lengths", [(5, 0, 17), (63, 64, 65), (90, 1, 30)])
def test_each_row_of_a_tree_sees_its_own_path_and_nothing_else(
    heads: int, kv_heads: int, lengths: tuple[int, int, int]
) -> None:
    """A mask off by one lets a node see its sibling, or miss its parent; ragged lengths around the key bucket too."""
    rng = np.random.default_rng(heads + kv_heads + lengths[0])
    torch.manual_seed(int(rng.integers(1000)))
    kv = cache(kv_heads)
    pasts = []
    for slot, length in enumerate(lengths):
        kv.allocate()
        past = torch.randn(2, 1, kv_heads, length, DIM)
        kv.write(0, kv.storages[0].locations(slot, torch.arange(length)[None]), past[0], past[1])
        kv.lengths[slot] = length
        pasts.append(past[:, 0])
    trees = random_tree(rng, 3, 9)
    queries, keys, values = (torch.randn(3, n, 9, DIM) for n in (heads, kv_heads, kv_heads))
    rows = AttentionMetadata(
        kv, 0, 9, np.array(kv.lengths, np.int32), trees.sizes.astype(np.int32), MaskKind.TREE, trees.parents
    )
    mixed = attention.attend(rows.plan, 0, queries, keys, values)
    for b in range(3):
        for row in range(int(trees.sizes[b])):
            path, at = [row], row
            while (at := int(trees.parents[b, at])) >= 0:
                path.insert(0, at)
            expected = one_by_one(
                queries[b, :, row],
                torch.cat((pasts[b][0], keys[b][:, path]), 1),
                torch.cat((pasts[b][1], values[b][:, path]), 1),
            )
            torch.testing.assert_close(mixed[b, :, row].double(), expected, atol=2e-6, rtol=0)
    assert mixed.isfinite().all(), "rows that are not used must not spoil those that are"


def hidden_of(engine: Engine, ids: list[int], chunks: list[int], slot: int) -> Tensor:
    """Compute the target's final states over ids, chunk by chunk in a slot of its own, beside other slots."""
    target, start, parts = engine.target, 0, []
    engine.cache.take(slot)
    for count in chunks:
        rows = prompt_rows(engine.cache, slot, start, count)
        tokens = torch.tensor([ids[start : start + count]])
        positions = np.arange(start, start + count, dtype=np.int32)[None, None]
        parts.append(target.forward(tokens, positions, rows).hidden[0])
        engine.cache.keep([slot], [list(range(count))])
        start += count
    engine.cache.free(slot)
    return torch.cat(parts)


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_gqa_checkpoint"])
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole_and_as_transformers_has_it(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Chunks meet at positions and masks; an error at a seam would change long prompts only. No HF cache involved."""
    folder = request.getfixturevalue(which)
    engine = Engine(tiny.config(folder, max_num_seqs=4, dtype="float64"))
    ids = torch.randint(8, tiny.VOCABULARY, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        whole = hidden_of(engine, ids, [70], 0)
        for chunks in ([1] * 70, [16, 16, 16, 16, 6], [63, 7], [64, 6], [33, 37]):
            torch.testing.assert_close(hidden_of(engine, ids, chunks, 2), whole, atol=1e-9, rtol=0)
        theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
        logits = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        # transformers norms in float32 whatever the dtype
        torch.testing.assert_close(engine.target.logits(whole), logits, atol=1e-3, rtol=0)


# -- layers of other kinds, see written_out.py

KINDS = {
    "all positions": Layer(LayerShape(2, 8)),
    "window": Layer(LayerShape(2, 8, window=20)),
    "window of one": Layer(LayerShape(1, 8, window=1)),
    "window beyond the capacity": Layer(LayerShape(2, 8, window=500)),
    "soft cap": Layer(LayerShape(2, 8), softcap=0.8),
    "sinks": Layer(LayerShape(2, 8), heads=8, sinks=True),
    "narrow values": Layer(LayerShape(2, 12), values=8),
    "narrow keys": Layer(LayerShape(2, 12), keys=8),
    "all of it": Layer(LayerShape(1, 12, window=7), values=8, softcap=1.5, sinks=True),
}
SEVERAL = [KINDS["all positions"], KINDS["window"], None, KINDS["all of it"], KINDS["window"], KINDS["sinks"]]


@pytest.fixture
def short_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rings be short, so that short sequences go around them: 128 positions for a window of 20."""
    monkeypatch.setattr(kv_cache, "REACH", 16)


@pytest.mark.usefixtures("short_reach")
@pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)
def test_rows_chunks_and_trees_see_what_their_layer_lets_them(layer: Layer) -> None:
    """A chunk is longer than the windows; a node's window counts from its depth in the tree, not from its row."""
    sequences = Sequences([layer], capacity=150, rows=24)
    for length in (70, 3, 21):
        sequences.fill(sequences.begin(), length, at_once=24)
    for num in (1, 9, 16, 9):
        sequences.step(num)
    sequences.step(9, idle=[1])


def test_windows_and_soft_caps_change_the_result() -> None:
    results = {}
    for name in ("all positions", "window", "window beyond the capacity", "soft cap"):
        layer, generator = KINDS[name], torch.Generator().manual_seed(1)
        kv = KVCache(layers=[layer.shape], num_slots=1, capacity=100, margin=16, dtype=torch.float64,
                     device=torch.device("cpu"))  # fmt: skip
        q, k, v = (torch.randn(1, heads, 40, 8, generator=generator).double() for heads in (4, 2, 2))
        plan, window = prompt_rows(kv, kv.allocate(), 0, 40).plan, layer.shape.window
        results[name] = attention.attend(plan, 0, q, k, v, window=window, softcap=layer.softcap)
    plain = results.pop("all positions")
    assert torch.equal(results.pop("window beyond the capacity"), plain)
    for name, result in results.items():
        assert not torch.allclose(result, plain, atol=1e-3), name
    torch.testing.assert_close(results["window"][:, :, :20], plain[:, :, :20])


@pytest.mark.parametrize("kind", ["whole", "window"])
@pytest.mark.parametrize("window", [None, 5, 20])
def test_tokens_of_one_block_see_each_other_in_both_directions(
    kind: kv_cache.Blocks, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's tokens do, also beside a layer that does not look ahead; two images do not see each other's."""
    monkeypatch.setattr(kv_cache, "REACH", 16)
    layers = [Layer(LayerShape(2, 8, window, kind)), Layer(LayerShape(2, 8, window)), Layer(LayerShape(2, 8))]
    sequences = Sequences(layers, capacity=300)
    slot = sequences.begin()
    sequences.fill(slot, 130)
    sequences.chunk(slot, 40, [-1] * 3 + [0] * 12 + [-1] + [1] * 8 + [2] * 10 + [-1] * 6)
    sequences.chunk(slot, 12, [4] * 12)
    sequences.chunk(slot, 5)
    sequences.step()


@pytest.mark.usefixtures("short_reach")
def test_positions_go_around_the_ring_up_to_the_margin_behind_the_capacity() -> None:
    """Trees lie across the seam of the ring, and at last across the end of the capacity; their paths are moved."""
    sequences = Sequences(SEVERAL, capacity=300, rows=16)
    ring = sequences.cache.storage(1)[0].ring
    assert ring == 128 < 300 == sequences.cache.storage(0)[0].ring
    for length in (ring - 10, 2 * ring - 12, 5):
        sequences.fill(sequences.begin(), length, at_once=16)
    for _ in range(4):
        sequences.step(14)
    assert sequences.cache.lengths[0] > ring - 10
    sequences.fill(1, 295)
    for _ in range(4):
        sequences.step(16)
    sequences.fill(1, 300, at_once=1)
    sequences.step(16)
    assert sequences.cache.lengths[1] == 300, "full, and still verified against"


@pytest.mark.usefixtures("short_reach")
@pytest.mark.parametrize("behind", [0, 1, 16])
@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "running"])
def test_a_prefix_is_shared_from_a_slot_that_went_around(behind: int, length: int, finished: bool) -> None:
    """The source has verified a tree behind its end. What its windows have lost is refused."""
    sequences = Sequences(SEVERAL, rows=16)
    source = sequences.begin()
    sequences.fill(source, length, at_once=16)
    sequences.step(16, keep=0)
    if finished:
        sequences.end(source)
    cache = sequences.cache
    assert cache.shareable(source, length - behind)
    assert not cache.shareable(source, length - 17)
    other = sequences.begin(source, length - behind)  # the source's own slot, if it is free
    assert (other == source) == finished
    sequences.step(9, keep=2)
    sequences.fill(other, length + 60, at_once=16)
    sequences.step(9)
    if not finished:
        sequences.step(9)
        sequences.end(source)
    assert not cache.shareable(other, length - behind), "this sequence has gone on"


@pytest.mark.usefixtures("short_reach")
@pytest.mark.parametrize("lengths", [(40, 300), (300, 40), (120, 250), (300, 200), (127, 140)])
@pytest.mark.parametrize("finished", [(), (0,), (1,)], ids=["both run", "first ended", "second ended"])
def test_slots_are_exchanged_whatever_their_rings_hold(lengths: tuple[int, int], finished: tuple[int, ...]) -> None:
    """The shorter sequence once lost the positions that the longer one had in their places."""
    sequences = Sequences(SEVERAL, num_slots=2, rows=16)
    for length in lengths:
        sequences.fill(sequences.begin(), length, at_once=16)
    sequences.step(16, keep=1)
    for slot in finished:
        sequences.end(slot)
    sequences.exchange(0, 1)
    sequences.step(9, keep=3)
    for slot in finished:
        sequences.begin(1 - slot, lengths[slot] - 2)
    sequences.step(9)


@pytest.mark.usefixtures("short_reach")
@pytest.mark.parametrize("seed", range(3))
def test_a_long_random_life_of_layers_of_several_kinds(seed: int) -> None:
    sequences = Sequences(SEVERAL, num_slots=4, capacity=260, rows=24, seed=seed)
    rng, cache = np.random.default_rng(seed), sequences.cache
    for _ in range(70):
        action = rng.choice(["begin", "share", "chunk", "chunk", "step", "step", "end", "exchange"])
        running = sorted(sequences.running)
        if action == "begin" and cache.num_free:
            sequences.begin()
        elif action == "share" and cache.num_free:
            stored = {**sequences.running, **sequences.finished}
            ends = [(slot, rows[0][0].shape[1] - int(rng.integers(12))) for slot, rows in stored.items()]
            ends = [(slot, end) for slot, end in ends if end > 0 and cache.shareable(slot, end)]
            if ends:
                sequences.begin(*ends[rng.integers(len(ends))])
        elif action == "chunk" and running:
            slot = int(rng.choice(running))
            sequences.fill(slot, min(260, cache.lengths[slot] + int(rng.integers(1, 60))), at_once=24)
        elif action == "step" and running:
            sequences.step(int(rng.integers(1, 17)), idle=[s for s in running if rng.random() < 0.2])
        elif action == "end" and running:
            sequences.end(int(rng.choice(running)))
        elif action == "exchange":
            sequences.exchange(*rng.choice(4, 2, replace=False).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_rounded_once(dtype: torch.dtype) -> None:
    """In bfloat16 a score of 10 is off by 0.03, and so its weight by 3 %. A soft cap must not add to that."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 7e-2}[dtype]
    layers = [Layer(LayerShape(2, 8), softcap=30.0, spread=10.0), Layer(LayerShape(2, 8), sinks=True, spread=10.0)]
    sequences = Sequences(layers, dtype=dtype, tolerance=tolerance)
    sequences.fill(sequences.begin(), 60)
    sequences.step()


def test_scores_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's scores do not fit into memory at once."""
    monkeypatch.setattr(attention, "MOST_SCORES", 1000)
    sequences = Sequences([KINDS["all of it"], KINDS["sinks"]])
    sequences.fill(sequences.begin(), 60)
    sequences.step()
