"""The one attention of FlashServe: rows of consecutive slots against our KV cache.

`Rows` says where the rows of one forward pass live and what they see; plain decoding, tree verification, chunked
prefill and the draft's own blocks are all the same thing. Two implementations read it: the native one on CPUs
(native/), and the one here in torch, for every other device and processor. Registered with transformers under the name
`kv_slots`, the latter serves every model family unforked: the model hands it raw queries, keys and values, and the
keyword argument `rows` with which it was called.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AttentionMaskInterface

from model.kv_cache import KVCache

NAME = "kv_slots"  # must not contain "flash": transformers would look for a FlashAttention kernel
KEY_BUCKET = 64  # torch: key lengths are rounded up to this, so that kernels see few shapes


class Sight(IntEnum):
    """What the rows of one sequence see of each other; of what came before them they see everything."""

    CAUSAL = 0  # themselves and earlier rows
    TREE = 1  # themselves and their ancestors
    WHOLE = 2  # all


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass: as many for every one of some consecutive slots, written from `starts` on.

    starts: (batch,) int32, position of each slot's first row; counts: (batch,) int32, how many of a slot's rows are
    real (0: the slot idles); what is computed for the others does not matter. parents: (batch, rows) int32, TREE only:
    a row's parent, which comes before it, or -1.
    """

    cache: KVCache
    first_slot: int
    num: int  # rows per slot
    starts: np.ndarray
    counts: np.ndarray
    sight: Sight
    parents: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return len(self.starts)

    # What torch needs; made when first asked for.

    @cached_property
    def key_length(self) -> int:
        """How many keys are read of every slot."""
        longest = int(self.starts.max()) + self.num
        return min(-(-longest // KEY_BUCKET) * KEY_BUCKET, self.cache.stride)

    @cached_property
    def positions(self) -> Tensor:
        """(batch, rows) int64: where in its slot a row is written."""
        starts = torch.from_numpy(self.starts).to(self.cache.data.device, torch.int64)
        return starts[:, None] + torch.arange(self.num, device=starts.device)

    @cached_property
    def locations(self) -> Tensor:
        """See KVCache.locations."""
        return self.cache.locations(self.first_slot, self.positions)

    @cached_property
    def mask(self) -> Tensor:
        """(batch, 1, rows, key length) additive: 0 where a row may look and -inf elsewhere."""
        positions, batch, rows = self.positions, self.batch, self.num
        device, dtype = positions.device, self.cache.data.dtype
        seen = torch.arange(self.key_length, device=device) < positions[:, :1]  # (batch, key length)
        allowed = seen[:, None, :].repeat(1, rows, 1)
        visible = torch.from_numpy(self.visible()).to(device)
        allowed.scatter_(2, positions[:, None, :].expand(batch, rows, rows), visible.expand(batch, rows, rows))
        mask = torch.zeros(batch, 1, rows, self.key_length, dtype=dtype, device=device)
        return mask.masked_fill_(~allowed[:, None], float("-inf"))

    def visible(self) -> np.ndarray:
        """(batch or 1, rows, rows) bool: what each row sees of the others; every row sees itself."""
        if self.sight is Sight.CAUSAL:
            return np.tri(self.num, dtype=bool)[None]
        if self.sight is Sight.WHOLE:
            return np.ones((1, self.num, self.num), bool)
        assert self.parents is not None
        seen = np.zeros((self.batch, self.num, self.num), bool)
        every = np.arange(self.batch)
        for row in range(self.num):
            parent = self.parents[:, row]
            seen[:, row] = seen[every, parent] & (parent >= 0)[:, None]
            seen[:, row, row] = True
        return seen


def prompt_rows(cache: KVCache, slot: int, start: int, count: int) -> Rows:
    """A piece of one sequence, row by row."""
    return Rows(cache, slot, count, np.array([start], np.int32), np.array([count], np.int32), Sight.CAUSAL)


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
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
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
