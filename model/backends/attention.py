"""Implements the one attention of FlashServe: rows of consecutive slots against our KV cache.

`AttentionMetadata` says where the rows of one forward pass are stored and which positions they see. It covers plain
decoding, tree verification, chunked prefill and the draft's own blocks. There are two implementations: the native one
for CPUs (native/), and the one here in torch, for every other device and processor. Registered with transformers under
the name `kv_slots`, the latter serves every model family unforked: the model passes it raw queries, keys and values,
and the keyword argument `plan` with which the model was called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface

from model.backends.kernels import choice
from model.backends.kernels.choice import TreeAttention
from model.backends.kv_cache import KVCache
from model.transfer import upload

NAME = "kv_slots"  # must not contain "flash": transformers would look for a FlashAttention kernel
KERNEL_ROWS = 64  # more rows per slot are a prompt chunk, for which torch's own kernels are good
# Arguments that transformers passes besides `plan` and `scaling`, and that have no effect here.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})
NEUTRAL = {"dropout": 0.0, "is_causal": True}  # arguments that are accepted with these values only
KEY_BUCKET = 64  # key lengths are rounded up to a multiple of this in torch, so that kernels see few shapes


class MaskKind(IntEnum):
    """Which rows of a sequence the others see. All rows see every earlier position."""

    CAUSAL = 0  # a row sees itself and earlier rows
    TREE = 1  # a row sees itself and its ancestors
    FULL = 2  # a row sees all rows


@dataclass(eq=False)
class AttentionMetadata:
    """The rows of one forward pass: `num` rows for each of some consecutive slots, written from `starts` on.

    starts: (batch,) int32, position of each slot's first row; counts: (batch,) int32, how many of a slot's rows are
    real (0: the slot idles, and its content stays); the results of padding rows are undefined. parents: (batch, rows)
    int32, for TREE only: a row's parent, which comes before it, or -1.
    """

    cache: KVCache
    first_slot: int
    num: int  # rows per slot
    starts: np.ndarray
    counts: np.ndarray
    mask_kind: MaskKind
    parents: np.ndarray | None = None

    @property
    def batch(self) -> int:
        """Return the number of slots."""
        return len(self.starts)

    @cached_property
    def plan(self) -> AttentionTensors:
        """Upload the metadata for torch, at first use."""
        device = self.cache.data.device
        starts, targets = upload(np.stack((self.seen_from, self.written_from)), device).long()
        return AttentionTensors(
            self.cache,
            self.first_slot,
            starts,
            targets,
            upload(self.visible(), device),
            min(-(-self.longest // KEY_BUCKET) * KEY_BUCKET, self.cache.stride),
        )

    @cached_property
    def seen_from(self) -> np.ndarray:
        """Return how many earlier positions the rows of each slot see: (batch,) int32; 0 for an idle slot."""
        return np.where(self.counts > 0, self.starts, 0).astype(np.int32)

    @cached_property
    def written_from(self) -> np.ndarray:
        """Return where the first row of each slot is written: (batch,) int32; the capacity for an idle slot."""
        return np.where(self.counts > 0, self.starts, self.cache.capacity).astype(np.int32)

    @property
    def longest(self) -> int:
        """Return how many keys must be read of every slot."""
        return int(self.seen_from.max()) + self.num

    def visible(self) -> np.ndarray:
        """Return which rows each row sees: (batch or 1, rows, rows) bool. Every row sees itself."""
        if self.mask_kind is MaskKind.CAUSAL:
            return np.tri(self.num, dtype=bool)[None]
        if self.mask_kind is MaskKind.FULL:
            return np.ones((1, self.num, self.num), bool)
        assert self.parents is not None
        seen = np.zeros((self.batch, self.num, self.num), bool)
        every = np.arange(self.batch)
        for row in range(self.num):
            parent = self.parents[:, row]
            seen[:, row] = seen[every, parent] & (parent >= 0)[:, None]
            seen[:, row, row] = True
        return seen


@dataclass(frozen=True)
class AttentionTensors:
    """AttentionMetadata as tensors on the cache's device, so that a pass over them can be recorded.

    starts: (batch,) int64, positions before its rows that a slot's rows see; targets: (batch,) int64, where the first
    row is written: the same number, or the capacity if the slot idles; visible: (batch or 1, rows, rows) bool, which
    rows each row sees, itself included; key_length: how many keys are read of every slot.
    """

    cache: KVCache
    first_slot: int
    starts: Tensor
    targets: Tensor
    visible: Tensor
    key_length: int

    @property
    def batch(self) -> int:
        """Return the number of slots."""
        return len(self.starts)

    @property
    def num(self) -> int:
        """Return the number of rows per slot."""
        return int(self.visible.shape[-1])

    @property
    def kernel(self) -> TreeAttention | None:
        """Return the kernel that computes attention instead of torch, if there is one for these rows."""
        data = self.cache.data
        return choice.tree_attention(data.dtype, data.shape[-1], data.device) if self.num <= KERNEL_ROWS else None

    @cached_property
    def positions(self) -> Tensor:
        """Return the position of each row in its slot, unless the slot idles: (batch, rows) int64."""
        return self.starts[:, None] + torch.arange(self.num, device=self.starts.device)

    @cached_property
    def locations(self) -> Tensor:
        """Return where the rows are stored: see KVCache.locations."""
        rows = torch.arange(self.num, device=self.starts.device)
        return self.cache.locations(self.first_slot, self.targets[:, None] + rows)

    @cached_property
    def _mask(self) -> Tensor:
        """Build the additive mask (batch, 1, rows, key length): 0 for visible keys, -inf for others."""
        batch, rows = self.batch, self.num
        behind = torch.arange(self.key_length, device=self.starts.device) - self.starts[:, None]  # (batch, key length)
        among = behind.clamp(0, rows - 1)[:, None].expand(batch, rows, -1)
        visible = self.visible.expand(batch, rows, rows).gather(2, among) & (behind < rows)[:, None]
        allowed = visible | (behind < 0)[:, None]
        mask = torch.zeros(allowed.shape, dtype=self.cache.data.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, float("-inf"))[:, None]

    @cached_property
    def _masks(self) -> dict[int, Tensor]:
        """Keep the masks of this pass by number of groups."""
        return {}

    def mask(self, groups: int) -> Tensor:
        """Return the mask for `groups` query heads in sequence: (batch, 1, groups * rows, key length).

        It is built once per pass, not once per layer. A multiple of KEY_BUCKET keys satisfies the alignment that CUDA's
        kernels need.
        """
        if groups not in self._masks:
            self._masks[groups] = self._mask.repeat(1, 1, groups, 1) if groups > 1 else self._mask
        return self._masks[groups]


def prompt_rows(cache: KVCache, slot: int, start: int, count: int) -> AttentionMetadata:
    """Describe `count` prompt positions of one sequence, from `start` on."""
    return AttentionMetadata(
        cache, slot, count, np.array([start], np.int32), np.array([count], np.int32), MaskKind.CAUSAL
    )


def attend(
    plan: AttentionTensors, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
) -> Tensor:
    """Write keys and values, then attend: (batch, heads, rows, head_dim). All inputs have this shape; queries may have
    more heads (GQA)."""
    plan.cache.write(layer, plan.locations, keys, values)
    keys, values = plan.cache.read(layer, plan.first_slot, plan.batch, plan.key_length)
    if (kernel := plan.kernel) is not None:
        return kernel(queries, keys, values, plan.starts, plan.visible, scale)
    groups = queries.shape[1] // keys.shape[1]
    num_rows = queries.shape[2]
    if groups > 1:  # query heads that share keys become more rows, so that no keys are copied
        queries = queries.reshape(plan.batch, keys.shape[1], groups * num_rows, -1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=plan.mask(groups), scale=scale)
    if groups > 1:
        mixed = mixed.reshape(plan.batch, -1, num_rows, mixed.shape[-1])
    return mixed


def _check_supported(capacity: int, attention_mask: Tensor | None, options: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for an argument that changes the result and is not implemented here."""
    for name, value in options.items():
        if name in HARMLESS or value is None:
            continue
        if name == "sliding_window" and value >= capacity:  # it never applies
            continue
        if name in NEUTRAL and value == NEUTRAL[name]:
            continue
        shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        raise NotImplementedError(f"attention {NAME!r} does not implement {name}={shown}, which this model needs")
    if attention_mask is not None:
        raise NotImplementedError(f"attention {NAME!r} does not implement an attention_mask of the model's own")


def _kv_slots(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionTensors,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: returns (batch, rows, heads, head_dim) and no weights."""
    _check_supported(plan.cache.capacity, attention_mask, options)
    mixed = attend(plan, int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return mixed.transpose(1, 2), None


def register() -> None:
    """Register `kv_slots` with transformers; idempotent.

    No mask function is registered, so transformers builds no mask. With one, it would look for packed sequences in the
    position ids and so wait for the GPU in every pass.
    """
    AttentionInterface.register(NAME, _kv_slots)
