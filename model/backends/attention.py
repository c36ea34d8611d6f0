"""Implements the one attention of FlashServe: rows of consecutive slots against our KV cache.

`AttentionMetadata` says where the rows of one forward pass are stored and which positions they see. It covers plain
decoding, tree verification, chunked prefill and the draft's own blocks. There are two implementations: the native one
for CPUs (native/), and the one here in torch, for every other device and processor. Registered with transformers under
the name `kv_slots`, the latter serves every model family unforked: the model passes it raw queries, keys and values,
and the keyword argument `plan` with which the model was called. It honours windows, soft-capped scores and attention
sinks, and refuses every other argument that would change the result.
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
from model.backends.kernels.choice import Options, TreeAttention
from model.backends.kernels.window import Window
from model.backends.kv_cache import Blocks, KVCache, Storage
from model.transfer import upload

NAME = "kv_slots"  # must not contain "flash": transformers would look for a FlashAttention kernel
KERNEL_ROWS = 64  # more rows per slot are a prompt chunk, for which torch's own kernels are good
# Arguments that transformers passes besides `plan` and `scaling`, and that have no effect here.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})
HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
NEUTRAL = {"dropout": 0.0, "is_causal": True}  # arguments that are accepted with these values only
MOST_SCORES = 1 << 26  # scores computed at once where torch's fused attention cannot be used
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
    int32, for TREE only: a row's parent, which comes before it, or -1. blocks: (rows,) int32, for CAUSAL only: rows
    with the same number, 0 or more, see each other, but only in layers that look ahead.
    """

    cache: KVCache
    first_slot: int
    num: int  # rows per slot
    starts: np.ndarray
    counts: np.ndarray
    mask_kind: MaskKind
    parents: np.ndarray | None = None
    blocks: np.ndarray | None = None

    @property
    def batch(self) -> int:
        """Return the number of slots."""
        return len(self.starts)

    @cached_property
    def plan(self) -> AttentionTensors:
        """Upload the metadata for torch, at first use."""
        device = self.cache.device
        starts, targets = upload(np.stack((self.seen_from, self.written_from)), device).long()
        return AttentionTensors(
            self.cache,
            self.first_slot,
            starts,
            targets,
            upload(self.visible(), device),
            -(-self.longest // KEY_BUCKET) * KEY_BUCKET,
            None if self.blocks is None else upload(self.blocks, device),
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
    rows each row sees, itself included; key_length: how many positions are read of every slot; blocks: (rows,), see
    AttentionMetadata.
    """

    cache: KVCache
    first_slot: int
    starts: Tensor
    targets: Tensor
    visible: Tensor
    key_length: int
    blocks: Tensor | None = None

    @property
    def batch(self) -> int:
        """Return the number of slots."""
        return len(self.starts)

    @property
    def num(self) -> int:
        """Return the number of rows per slot."""
        return int(self.visible.shape[-1])

    def kernel(self, layer: int, options: Options) -> TreeAttention | None:
        """Return the kernel that computes a layer's attention instead of torch, if there is one for these rows."""
        if self.num > KERNEL_ROWS:
            return None
        width = self.cache.storage(layer)[0].data.shape[-1]
        return choice.tree_attention(self.cache.dtype, width, self.cache.device, options)

    def window(self, layer: int, size: int | None) -> Window | None:
        """Describe a layer's window for the kernel."""
        if size is None:
            return None
        storage, _ = self.cache.storage(layer)
        return Window(size, self.depths, *((storage.ring, storage.capacity) if storage.wraps else ()))

    @cached_property
    def positions(self) -> Tensor:
        """Return the position of each row in its slot, unless the slot idles: (batch, rows) int64."""
        return self.starts[:, None] + torch.arange(self.num, device=self.starts.device)

    @cached_property
    def _kept(self) -> dict[Any, Tensor]:
        """Keep what layers of one kind share in this pass: locations by storage, masks by mask kind."""
        return {}

    def locations(self, layer: int) -> Tensor:
        """Return where the rows of a layer are stored: see Storage.locations."""
        storage, _ = self.cache.storage(layer)
        key = "locations", id(storage)
        if key not in self._kept:
            rows = torch.arange(self.num, device=self.starts.device)
            self._kept[key] = storage.locations(self.first_slot, self.targets[:, None] + rows)
        return self._kept[key]

    @cached_property
    def depths(self) -> Tensor:
        """Return how many other rows each row sees, its distance from the root: (batch or 1, rows)."""
        return self.visible.sum(-1) - 1

    def seen(self, layer: int, window: int | None) -> Tensor:
        """Return which rows each row sees in a layer: (batch or 1, rows, rows) bool."""
        shape = self.cache.layers[layer]
        blocks = None if shape is None else shape.blocks
        key = "seen", window, blocks
        if key not in self._kept:
            self._kept[key] = self.rows_visible(window, blocks)
        return self._kept[key]

    def rows_visible(self, window: int | None, blocks: Blocks) -> Tensor:
        """Return which rows each row sees in layers of a kind: (batch or 1, rows, rows) bool. See LayerShape."""
        visible, within = self.visible, None
        if blocks is not None and self.blocks is not None:
            within = (self.blocks[:, None] == self.blocks) & (self.blocks >= 0)
        if within is not None and blocks == "window":
            visible = visible | within
        if window is not None and window < self.num:
            visible = visible & (self.depths[..., :, None] - self.depths[..., None, :] < window)
        if within is not None and blocks == "whole":
            visible = visible | within
        return visible

    def num_places(self, layer: int) -> int:
        """Return how many places of a layer's storage are read of every slot."""
        return self.cache.storage(layer)[0].num_places(self.key_length)

    def mask(self, layer: int, groups: int, window: int | None) -> Tensor:
        """Return the additive mask for `groups` query heads in sequence: (batch, 1, groups * rows, places).

        0 for visible keys, -inf for others. It is built once per pass and kind of layer, not once per layer. A multiple
        of KEY_BUCKET keys satisfies the alignment that CUDA's kernels need.
        """
        storage, _ = self.cache.storage(layer)
        shape = self.cache.layers[layer]
        blocks = None if shape is None or self.blocks is None else shape.blocks
        key = storage.ring, window, blocks, groups
        if key not in self._kept:
            self._kept[key] = self._mask(storage, self.seen(layer, window), window).repeat(1, 1, groups, 1)
        return self._kept[key]

    def _mask(self, storage: Storage, seen: Tensor, window: int | None) -> Tensor:
        """Build the mask for one group of query heads."""
        batch, rows = self.batch, self.num
        positions = storage.positions(storage.num_places(self.key_length), self.starts + rows)
        behind = (
            positions - self.starts[:, None]
        )  # (batch, places): of a row, its number; negative for earlier positions
        among = behind.clamp(0, rows - 1)[:, None].expand(batch, rows, -1)
        visible = seen.expand(batch, rows, rows).gather(2, among)
        earlier = ((behind < 0) & (positions >= 0))[:, None]
        if window is not None:
            earlier = earlier & (self.depths[..., None] - behind[:, None] < window)
        allowed = visible & ((behind >= 0) & (behind < rows))[:, None] | earlier
        mask = torch.zeros(allowed.shape, dtype=self.cache.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, float("-inf"))[:, None]


def prompt_rows(
    cache: KVCache, slot: int, start: int, count: int, blocks: np.ndarray | None = None
) -> AttentionMetadata:
    """Describe `count` prompt positions of one sequence, from `start` on. blocks: see AttentionMetadata."""
    starts, counts = np.array([start], np.int32), np.array([count], np.int32)
    return AttentionMetadata(cache, slot, count, starts, counts, MaskKind.CAUSAL, blocks=blocks)


def attend(
    plan: AttentionTensors,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write keys and values, then attend: (batch, heads, rows, width of values).

    All inputs are (batch, heads, rows, width); queries may have more heads (GQA). window: positions that a row sees,
    itself included; softcap: scores become softcap * tanh(score / softcap); sinks: (heads,), the score of a key that
    has no value.
    """
    plan.cache.write(layer, plan.locations(layer), keys, values)
    width = values.shape[-1]
    window, storage = plan.cache.window(window), plan.cache.storage(layer)[0]
    assert window is not None or not storage.wraps, "a layer whose window is stored sees more"
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    stored = storage.data.shape[-1]
    options = Options(
        None if width == stored else width, window is not None, storage.wraps, softcap is not None, sinks is not None
    )
    kernel = plan.kernel(layer, options)
    if kernel is not None:
        keys, values = plan.cache.read(layer, plan.first_slot, plan.batch, storage.stride)
        return kernel(
            queries, keys, values[..., :width], plan.starts, plan.seen(layer, window), scale,
            window=plan.window(layer, window), softcap=softcap, sinks=sinks,
        )  # fmt: skip
    keys, values = plan.cache.read(layer, plan.first_slot, plan.batch, plan.num_places(layer))
    if queries.shape[-1] < stored:  # keys narrower than values are stored padded
        queries = F.pad(queries, (0, stored - queries.shape[-1]))
    groups, num_rows = queries.shape[1] // keys.shape[1], queries.shape[2]
    if groups > 1:  # query heads that share keys become more rows, so that no keys are copied
        queries = queries.reshape(plan.batch, keys.shape[1], groups * num_rows, -1)
    mask = plan.mask(layer, groups, window)
    if softcap is None and sinks is None:
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    else:
        if sinks is not None:
            sinks = sinks.view(1, keys.shape[1], groups, 1).repeat_interleave(num_rows, 2)
        mixed = _mixed(queries, keys, values, mask, scale, softcap, sinks)
    if groups > 1:
        mixed = mixed.reshape(plan.batch, -1, num_rows, mixed.shape[-1])
    return mixed[..., :width]


def _mixed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend by separate products, where torch has no fused kernel. sinks: (1, heads, rows, 1)."""
    precise = torch.promote_types(queries.dtype, torch.float32)
    at_once = max(1, MOST_SCORES // (keys.shape[0] * keys.shape[1] * keys.shape[2]))
    parts = []
    for first in range(0, queries.shape[2], at_once):
        rows = slice(first, first + at_once)
        scores = (queries[:, :, rows] @ keys.transpose(2, 3)).to(precise) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[:, :, rows]
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, :, rows].to(precise).expand(len(scores), -1, -1, -1)), -1)
        weights = scores.softmax(-1)[..., : keys.shape[2]]
        parts.append(weights.to(values.dtype) @ values)
    return torch.cat(parts, 2)


def unsupported(attention_mask: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Say what is not implemented here of the arguments that change the result; None if all of them are."""
    for name, value in options.items():
        if name in HARMLESS or name in HONOURED or value is None:
            continue
        if name in NEUTRAL and value == NEUTRAL[name]:
            continue
        return f"needs {name}={type(value).__name__ if isinstance(value, Tensor) else repr(value)}"
    return None if attention_mask is None else "needs an attention_mask of the model's own"


def _kv_slots(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionTensors,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: returns (batch, rows, heads, width) and no weights."""
    if problem := unsupported(attention_mask, options):
        raise NotImplementedError(f"attention {NAME!r} does not implement what this model needs: it {problem}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    mixed = attend(plan, layer, query, key, value, scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return mixed.transpose(1, 2), None


def register() -> None:
    """Register `kv_slots` with transformers; idempotent.

    No mask function is registered, so transformers builds no mask. With one, it would look for packed sequences in the
    position ids and so wait for the GPU in every pass.
    """
    AttentionInterface.register(NAME, _kv_slots)
