"""Runs the steps of an engine without a model, and computes their attention in the plainest way, too.

`Sequences` runs prompts in chunks, trees of which a path is kept, idle slots, shared prefixes and exchanged slots over
a cache with layers of several kinds. It also keeps every key and value in lists that have no windows, rings or slots.
After each pass it compares every real row of every layer with attention written out in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, MaskKind, attend
from model.backends.kv_cache import KVCache, LayerShape


@dataclass(frozen=True)
class Layer:
    """What a layer stores, and what its attention is asked for.

    keys, values: their width, None for what is stored; spread: standard deviation of the scores, about.
    """

    shape: LayerShape
    heads: int = 4
    keys: int | None = None
    values: int | None = None
    softcap: float | None = None
    sinks: bool = False
    spread: float = 0.7


Stored = list[tuple[Tensor, Tensor]]  # by layer: keys and values (heads, positions, width)


def written_out(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, layer: Layer, sinks: Tensor
) -> Tensor:
    """Attend in float64: queries (heads, rows, width), keys and values (kv heads, positions, width), visible (rows,
    positions) bool."""
    groups = queries.shape[0] // keys.shape[0]
    keys, values = (both.repeat_interleave(groups, 0) for both in (keys, values))
    scores = queries @ keys.transpose(1, 2) * scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    weights = scores.masked_fill(~visible, -math.inf).exp()
    total = weights.sum(-1, keepdim=True) + (sinks[:, None, None].exp() if layer.sinks else 0)
    return weights @ values / total


def visible(layer: Layer, start: int, parents: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
    """Return which positions each row sees, (rows, positions) bool; rows of the pass are positions from `start` on."""
    window, num = layer.shape.window or 10**9, len(parents)
    seen = np.zeros((num, start + num), bool)
    for row in range(num):
        path = [row]
        while (parent := int(parents[path[-1]])) >= 0:
            path.append(parent)
        depth = len(path) - 1
        seen[row, max(0, start + depth - window + 1) : start] = True
        seen[row, [start + other for other in path[:window]]] = True
        if blocks is not None and blocks[row] >= 0 and layer.shape.blocks is not None:
            others = np.flatnonzero(blocks == blocks[row])
            if layer.shape.blocks == "window":
                others = others[row - others < window]
            seen[row, start + others] = True
    return seen


class Sequences:
    """Sequences in the slots of a cache, and beside it all that they have stored."""

    def __init__(
        self,
        layers: Seq[Layer | None],
        *,
        num_slots: int = 3,
        capacity: int = 400,
        margin: int = 16,
        rows: int = 40,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        tolerance: float = 1e-9,
        seed: int = 0,
    ) -> None:
        """Allocate the cache. rows: most rows of a chunk."""
        self.layers, self.dtype, self.tolerance = layers, dtype, tolerance
        self.cache = KVCache(
            layers=[None if layer is None else layer.shape for layer in layers], num_slots=num_slots,
            capacity=capacity, margin=margin, rows=rows, dtype=dtype, device=device or torch.device("cpu"),
        )  # fmt: skip
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.sinks = [torch.randn(8, generator=self.generator).double() for _ in layers]
        self.running: dict[int, Stored] = {}  # by slot
        self.finished: dict[int, Stored] = {}

    def begin(self, source: int | None = None, length: int = 0) -> int:
        """Start a sequence in the lowest free slot, with the first `length` positions of slot `source`."""
        stored: Stored = []
        for shape, keys, values in ((layer.shape, layer.keys, layer.values) for layer in self.layers if layer):
            none = (torch.zeros(shape.heads, 0, width or shape.width).double() for width in (keys, values))
            stored.append((next(none), next(none)))
        if source is not None:
            whole = self.running[source] if source in self.running else self.finished[source]
            stored = [(keys[:, :length], values[:, :length]) for keys, values in whole]
        slot = self.cache.allocate()
        if source is not None:
            self.cache.share(source, slot, length)
        self.finished.pop(slot, None)
        self.running[slot] = stored
        return slot

    def chunk(self, slot: int, count: int, blocks: list[int] | None = None) -> None:
        """Append `count` rows of a prompt."""
        starts, counts = np.array([self.cache.lengths[slot]], np.int32), np.array([count], np.int32)
        numbers = None if blocks is None else np.array(blocks, np.int32)
        rows = AttentionMetadata(self.cache, slot, count, starts, counts, MaskKind.CAUSAL, blocks=numbers)
        new = self.attend(rows, np.arange(-1, count - 1, dtype=np.int32)[None])
        self.keep([slot], [list(range(count))], new)

    def fill(self, slot: int, upto: int, at_once: int = 40) -> None:
        """Append rows in chunks until so many are stored."""
        while (length := self.cache.lengths[slot]) < upto:
            self.chunk(slot, min(at_once, upto - length))

    def step(self, num: int = 9, *, idle: Seq[int] = (), keep: int | None = None) -> None:
        """Verify random trees of all sequences but idle ones, and keep a random path of each (or its first rows)."""
        batch = max(self.running) + 1
        parents = np.array([[-1, *(self.rng.integers(0, r) for r in range(1, num))] for _ in range(batch)], np.int32)
        active = [slot for slot in self.running if slot not in idle]
        counts = np.array([max(1, num - slot) if slot in active else 0 for slot in range(batch)], np.int32)
        starts = np.array(self.cache.lengths[:batch], np.int32)
        new = self.attend(AttentionMetadata(self.cache, 0, num, starts, counts, MaskKind.TREE, parents), parents)
        paths = []
        for slot in active:
            path, at = list[int](), int(self.rng.integers(counts[slot]))
            room = self.cache.capacity - self.cache.lengths[slot]
            while at >= 0:
                path.insert(0, at)
                at = int(parents[slot, at])
            paths.append((path if keep is None else list(range(keep)))[:room])
        self.keep(active, paths, [new[slot] for slot in active])

    def keep(self, slots: Seq[int], paths: Seq[list[int]], new: Seq[Stored]) -> None:
        """Keep rows of the pass."""
        self.cache.keep(slots, paths)
        for slot, path, rows in zip(slots, paths, new, strict=True):
            self.running[slot] = [
                (torch.cat((keys, k[:, path]), 1), torch.cat((values, v[:, path]), 1))
                for (keys, values), (k, v) in zip(self.running[slot], rows, strict=True)
            ]
            assert self.cache.lengths[slot] == self.running[slot][0][0].shape[1]
        self.cache.check_integrity()

    def end(self, slot: int) -> None:
        """Finish a sequence; its positions stay to be shared."""
        assert self.cache.free(slot)
        self.finished[slot] = self.running.pop(slot)

    def exchange(self, one: int, other: int) -> None:
        """Exchange two slots."""
        self.cache.exchange(one, other)
        for stored in (self.running, self.finished):
            for slot, there in ((one, stored.pop(other, None)), (other, stored.pop(one, None))):
                if there is not None:
                    stored[slot] = there
        self.cache.check_integrity()

    def attend(self, rows: AttentionMetadata, parents: np.ndarray) -> list[Stored]:
        """Run the pass in every layer and compare it. Returns the new keys and values of each slot."""
        new: list[Stored] = [[] for _ in range(rows.batch)]
        for index, layer in enumerate(self.layers):
            if layer is not None:
                shape, sinks = layer.shape, self.sinks[index][: layer.heads]
                width, scale = layer.keys or shape.width, layer.spread / math.sqrt(shape.width)
                queries, keys, values = (
                    torch.randn(rows.batch, heads, rows.num, width, generator=self.generator).to(self.dtype)
                    for heads, width in (
                        (layer.heads, width), (shape.heads, width), (shape.heads, layer.values or shape.width),
                    )
                )  # fmt: skip
                q, k, v = (tensor.to(self.cache.device) for tensor in (queries, keys, values))
                given = sinks.to(q) if layer.sinks else None
                mixed = attend(
                    rows.plan, index, q, k, v, scale, window=shape.window, softcap=layer.softcap, sinks=given
                ).cpu()  # fmt: skip
                assert mixed.shape == (*queries.shape[:3], values.shape[-1])
                assert mixed.isfinite().all(), "rows that are not used must not spoil those that are"
                for b in range(rows.batch):
                    new[b].append((keys[b].double(), values[b].double()))
                    if not (count := int(rows.counts[b])):
                        continue
                    past = self.running[rows.first_slot + b][len(new[b]) - 1]
                    whole_keys, whole_values = (torch.cat(both, 1) for both in zip(past, new[b][-1], strict=True))
                    seen = torch.from_numpy(visible(layer, int(rows.starts[b]), parents[b], rows.blocks))
                    expected = written_out(queries[b].double(), whole_keys, whole_values, seen, scale, layer, sinks)
                    off = (mixed[b].double() - expected)[:, :count].abs().amax((0, 2))
                    assert off.max() <= self.tolerance, f"layer {index}, slot {rows.first_slot + b}: off by {off}"
        return new
