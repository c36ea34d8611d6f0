"""Test the engine's attention against attention written out for one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from model.backends import attention
from model.backends.attention import AttentionMetadata, MaskKind, prompt_rows
from model.backends.kv_cache import KVCache, uniform
from model.decoding.tree import Trees
from model.engine.engine import Engine
from tests.model import tiny

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
