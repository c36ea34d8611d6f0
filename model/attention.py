"""The one attention of FlashServe: rows of consecutive slots against our KV cache, under a mask made once per step.

Registered with transformers under the name `kv_slots`, it serves every model family unforked: the model hands it raw
queries, keys and values, and the keyword argument `rows` (a `Rows`) with which it was called says where they belong.
Plain decoding, tree verification, chunked prefill and the draft's own blocks are all the same call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AttentionMaskInterface

from model.kv_cache import KVCache

NAME = "kv_slots"  # must not contain "flash": transformers would look for a FlashAttention kernel
KEY_BUCKET = 64  # key lengths are rounded up to this, so that kernels see few shapes
# Torch's CPU kernel cuts rows and keys into blocks. With AVX512's bfloat16 products, blocks of these sizes are summed
# in another order than all others, and a row's bits would depend on its neighbours: found by trying, see test_exact.py.
ROW_BLOCK, FEWEST_ROWS = 32, 4  # a block of fewer rows
KEY_BLOCK, ODD_KEYS = 512, (256, 320)  # a block of that many keys


@dataclass(frozen=True)
class Rows:
    """Where the rows of one forward pass live.

    locations: where keys and values are written, see KVCache.locations.
    mask: (batch, 1, rows, key length) additive, 0 where a row may look and -inf elsewhere.
    """

    cache: KVCache
    first_slot: int
    batch: int
    key_length: int
    locations: Tensor
    mask: Tensor


def key_length(longest: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many keys are read where `longest` are held."""
    length = -(-longest // KEY_BUCKET) * KEY_BUCKET
    if dtype is torch.bfloat16 and device.type == "cpu":
        while length % KEY_BLOCK in ODD_KEYS:
            length += KEY_BUCKET
    return length


def plan(
    cache: KVCache,
    first_slot: int,
    starts: Tensor,
    visible: Tensor,
    dtype: torch.dtype,
) -> Rows:
    """Rows written from position starts (batch,) on, that see all before `starts` and each other as `visible` says.

    visible: (batch or 1, rows, rows) bool, row by row; every row must see itself.
    """
    batch, rows = starts.shape[0], visible.shape[1]
    device = cache.data.device
    longest = int(starts.max()) + rows
    length = min(key_length(longest, dtype, device), cache.stride)
    positions = starts[:, None] + torch.arange(rows, device=device)
    seen = torch.arange(length, device=device) < starts[:, None]  # (batch, length)
    allowed = seen[:, None, :].repeat(1, rows, 1)
    allowed.scatter_(2, positions[:, None, :].expand(batch, rows, rows), visible.expand(batch, rows, rows))
    mask = torch.zeros(batch, 1, rows, length, dtype=dtype, device=device)
    mask.masked_fill_(~allowed[:, None], float("-inf"))
    return Rows(cache, first_slot, batch, length, cache.locations(first_slot, positions), mask)


def attend(rows: Rows, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Write keys and values, then attend. All (batch, heads, rows, head_dim); queries may have more heads (GQA)."""
    rows.cache.write(layer, rows.locations, keys, values)
    keys, values = rows.cache.read(layer, rows.first_slot, rows.batch, rows.key_length)
    mask = rows.mask
    groups = queries.shape[1] // keys.shape[1]
    num_rows = queries.shape[2]
    if groups > 1:  # query heads that share keys become further rows: nothing is copied
        queries = queries.reshape(rows.batch, keys.shape[1], groups * num_rows, -1)
        mask = mask.repeat(1, 1, groups, 1)
    wanted = queries.shape[2]
    short = FEWEST_ROWS - wanted % ROW_BLOCK if 0 < wanted % ROW_BLOCK < FEWEST_ROWS else 0
    if short and queries.dtype is torch.bfloat16 and queries.device.type == "cpu":  # the last row is computed again
        queries, mask = (torch.cat((x, x[:, :, -1:].expand(-1, -1, short, -1)), 2) for x in (queries, mask))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)[:, :, :wanted]
    if groups > 1:
        mixed = mixed.reshape(rows.batch, -1, num_rows, mixed.shape[-1])
    return mixed


def _kv_slots(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    rows: Rows,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    mixed = attend(rows, int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return mixed.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Make `kv_slots` known to transformers; idempotent."""
    AttentionInterface.register(NAME, _kv_slots)
    AttentionMaskInterface.register(NAME, _no_mask)
