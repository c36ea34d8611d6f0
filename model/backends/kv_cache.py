"""Stores keys and values of every sequence, in memory allocated once. Knows slots and positions; nothing of tokens,
trees or requests.

Each sequence has one slot, and all slots have equal length. So the slots of a batch are one strided view, and attention
copies nothing. Layers of equal shape share one storage:

    data[layer, 0 = keys | 1 = values, slot, head, place, :]

    position   0 ............ lengths[slot]) ......... capacity) ... capacity + margin
               kept for good | scratch of this step: rows being verified, overwritten by the next

A layer with a window only ever reads the last positions, so its storage keeps only those: position p lies at place
p % ring. `ring` has room for the window, the rows of a step, and REACH positions that a shared prefix may end before
the sequence does. In a storage without a window `ring` is the capacity. In both, the margin follows the ring.

Rows that a step writes beyond `lengths` are scratch until `keep` moves the accepted ones down and advances the length.
If a slot idles while torch computes its neighbours, its rows are written to the margin. So the positions that a
finished sequence has left stay intact, and another sequence may share them.

All values in a slot are finite, except those that its present sequence has written. torch reads every position of a
slot and adds -inf to the scores of masked ones, and NaN - inf is NaN.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.backends import memory
from model.transfer import upload

Move = tuple[int, int, int]  # slot, from position, to position
ALIGNED = 64  # slots are multiples of so many positions, and as many numbers follow the last: kernels read in blocks
REACH = 512  # positions behind the end of a sequence from which layers with a window can still be shared


Blocks = Literal["whole", "window"] | None


@dataclass(frozen=True)
class LayerShape:
    """What a decoder layer stores for each position.

    heads: key-value heads; width: numbers of a key, and of a value, which is padded if it has fewer; window: positions
    that a row sees, itself included, None for all; blocks: whether rows of one block (see AttentionMetadata) see each
    other in both directions: None if not, "whole" for all of them, "window" for those within the window.
    """

    heads: int
    width: int
    window: int | None = None
    blocks: Blocks = None

    def ring(self, capacity: int, rows: int) -> int:
        """Return how many positions of a sequence are stored. rows: most rows that a step writes."""
        if self.window is None:
            return capacity
        return min(capacity, _aligned(self.window + rows + ALIGNED + REACH))

    def bytes_per_slot(self, *, capacity: int, margin: int, rows: int, dtype: torch.dtype) -> int:
        """Return the bytes of one slot."""
        return 2 * self.heads * self.width * _aligned(self.ring(capacity, rows) + margin) * dtype.itemsize


Layers = Seq[LayerShape | None]  # by decoder layer; None for one without attention


def uniform(num_layers: int, heads: int, width: int) -> tuple[LayerShape, ...]:
    """Return the shapes of `num_layers` equal layers."""
    return (LayerShape(heads, width),) * num_layers


def _aligned(positions: int) -> int:
    """Round up to a multiple of ALIGNED."""
    return -(-positions // ALIGNED) * ALIGNED


class Storage:
    """The keys and values of layers that store equally much. ring: see the module's docstring; stride: places per slot
    and head."""

    def __init__(
        self, shape: LayerShape, num_layers: int, num_slots: int, ring: int, capacity: int, margin: int, like: Tensor
    ) -> None:
        """Allocate zeros in the dtype and on the device of `like`."""
        self.heads, self.ring, self.capacity = shape.heads, ring, capacity
        self.stride = _aligned(ring + margin)
        dimensions = (num_layers, 2, num_slots, shape.heads, self.stride, shape.width)
        numbers = math.prod(dimensions)
        if like.device.type == "cpu":
            zeros = memory.zeros(numbers + ALIGNED, like.dtype)
        else:
            zeros = like.new_zeros(numbers + ALIGNED)
        self.data = zeros[:numbers].view(dimensions)
        # base[slot, head]: where place 0 of that slot and head lies when data[layer, 0] is seen as a list of vectors
        heads = torch.arange(num_slots * shape.heads, device=like.device) * self.stride
        self._base = heads.view(num_slots, shape.heads, 1)

    @property
    def wraps(self) -> bool:
        """Return whether it keeps only the last positions of a sequence."""
        return self.ring < self.capacity

    def places(self, positions: Tensor) -> Tensor:
        """Return the places of positions, which may reach into the margin."""
        if not self.wraps:
            return positions
        beyond = positions - self.capacity
        return torch.where(beyond >= 0, self.ring + beyond, positions % self.ring)

    def place(self, position: int) -> int:
        """Return the place of one position."""
        return position % self.ring if position < self.capacity else self.ring + position - self.capacity

    def positions(self, num: int, ends: Tensor) -> Tensor:
        """Return the position that each of the first `num` places holds: (batch, num), negative if none.

        ends: (batch,), one more than the last position that was written to each slot.
        """
        places = torch.arange(num, device=ends.device)
        if not self.wraps:
            return places.expand(len(ends), -1)
        last = ends.clamp(max=self.capacity)[:, None] - 1
        kept = last - (last - places) % self.ring
        return torch.where(places < self.ring, kept, self.capacity + places - self.ring)

    def num_places(self, positions: int) -> int:
        """Return how many places must be read to see so many positions of a sequence."""
        if not self.wraps or positions <= self.ring:
            return min(positions, self.stride)
        return self.ring if positions <= self.capacity else self.stride

    def locations(self, first_slot: int, positions: Tensor) -> Tensor:
        """Return where rows at `positions` (batch, rows) of slots first_slot.. are stored: flat indices (batch * heads
        * rows,)."""
        batch = positions.shape[0]
        return (self._base[first_slot : first_slot + batch] + self.places(positions)[:, None, :]).flatten()

    def used(self, written: int) -> int:
        """Return how many places a slot uses in which so many positions were written."""
        return min(written, self.ring) if self.wraps else written

    def clear(self, slot: int, first: int, end: int) -> None:
        """Set positions first..end of a slot to zero."""
        rows = self.data[:, :, slot]
        if not self.wraps:
            rows[..., first:end, :] = 0
            return
        kept, ring = min(end, self.capacity), self.ring
        if kept - first >= ring:
            rows[..., :ring, :] = 0
        elif kept > first:
            begin, upto = first % ring, (kept - 1) % ring + 1
            for part in [slice(begin, upto)] if begin < upto else [slice(begin, ring), slice(0, upto)]:
                rows[..., part, :] = 0
        if end > self.capacity:
            rows[..., ring + max(0, first - self.capacity) : ring + end - self.capacity, :] = 0

    def rearrange(self, moves: Seq[Move]) -> None:
        """Move rows within their slots. All rows are read before any is written."""
        sources, targets = [], []
        for slot, old, new in moves:
            for head in range(self.heads):
                base = (slot * self.heads + head) * self.stride
                sources.append(base + self.place(old))
                targets.append(base + self.place(new))
        flat = self.data.view(self.data.shape[0] * 2, -1, self.data.shape[-1])
        both = upload(np.array((sources, targets)), self.data.device)
        # index_select copies all sources before any target is written.
        flat.index_copy_(1, both[1], flat.index_select(1, both[0]))


class LayerStates(Protocol):
    """The states of layers that carry one from row to row, in all slots (see slot_states.py). They share the life of
    the keys and values: each method does what its namesake does; `start` is part of `take`, and `save` of `free`."""

    @property
    def nbytes(self) -> int: ...
    def begin(self, rows: Any) -> AbstractContextManager[None]: ...
    def keep(self, slots: Seq[int], paths: Seq[Seq[int]]) -> None: ...
    def start(self, slot: int, save_at: Seq[int] = ()) -> None: ...
    def share(self, source: int, slot: int, length: int) -> None: ...
    def save(self, slot: int) -> None: ...
    def shareable(self, slot: int, most: int) -> int: ...
    def exchange(self, one: int, other: int) -> None: ...


class KVCache:
    """The keys and values of all slots. At least `margin` positions beyond `capacity` are scratch, so that a full slot
    can still be verified against."""

    def __init__(
        self,
        *,
        layers: Layers,
        num_slots: int,
        capacity: int,
        margin: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int | None = None,
        states: LayerStates | None = None,
    ) -> None:
        """Allocate all slots. capacity: positions of a sequence; margin: most rows of a tree; rows: most rows that a
        step writes, None for `margin`; states: of the layers that carry one, in as many slots."""
        self.capacity, self.num_slots, self.margin, self.states = capacity, num_slots, margin, states
        self.dtype, self.device = dtype, device
        self.layers, rows = tuple(layers), max(margin, rows or 0)
        by_key: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in enumerate(self.layers):
            if shape is not None:
                by_key.setdefault((shape.heads, shape.width, shape.ring(capacity, rows)), []).append(layer)
        like = torch.empty(0, dtype=dtype, device=device)
        self.storages: tuple[Storage, ...] = ()
        self._storage_of: dict[int, tuple[int, int]] = {}  # layer -> number of its storage, its place there
        for number, (key, members) in enumerate(by_key.items()):
            shape = self.layers[members[0]]
            assert shape is not None
            self.storages += (Storage(shape, len(members), num_slots, key[2], capacity, margin, like),)
            self._storage_of |= {layer: (number, at) for at, layer in enumerate(members)}
        # Positions behind the end of a sequence from which its prefix can be shared; None for all. Those that the
        # latest tree has overwritten are gone.
        self._reach = REACH if any(storage.wraps for storage in self.storages) else None
        self._scratch = max((storage.stride - storage.ring for storage in self.storages), default=margin)
        self.lengths = array("i", [0] * num_slots)  # native code reads and writes them too
        self._left = array("i", [0] * num_slots)  # positions of a free slot that can be shared
        self._high = array("i", [0] * num_slots)  # end of the positions that were written to a slot, trees aside
        self._free = list(range(num_slots))  # sorted: the lowest free slot is allocated first
        self._by_torch = False  # whether torch has written here

    @staticmethod
    def bytes_per_slot(
        *, layers: Layers, capacity: int, margin: int, dtype: torch.dtype, rows: int | None = None
    ) -> int:
        """Return the bytes of one slot in all layers."""
        rows = max(margin, rows or 0)
        return sum(
            shape.bytes_per_slot(capacity=capacity, margin=margin, rows=rows, dtype=dtype)
            for shape in layers
            if shape is not None
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes of all storages and states."""
        stored = sum(storage.data.nbytes for storage in self.storages)
        return stored if self.states is None else stored + self.states.nbytes

    @property
    def positions(self) -> int:
        """Return how many positions a slot can have, the margin included."""
        return _aligned(self.capacity + self.margin)

    # For code that knows equal layers only: the native library, and drafts.

    @property
    def data(self) -> Tensor:
        """Return the one storage's memory: (layers, 2, slots, heads, stride, width)."""
        (storage,) = self.storages
        return storage.data

    @property
    def stride(self) -> int:
        """Return the one storage's places per slot and head."""
        (storage,) = self.storages
        return storage.stride

    @property
    def num_heads(self) -> int:
        """Return the one storage's heads."""
        (storage,) = self.storages
        return storage.heads

    @property
    def address(self) -> int:
        """Return the address of the one storage, for native code."""
        return self.data.data_ptr()

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the strides by layer, keys or values, slot and head.

        A cache of one layer has layer stride 0, since its memory may serve all layers in turn.
        """
        return (self.data.stride(0) if self.data.shape[0] > 1 else 0, *self.data.stride()[1:4])

    @property
    def num_free(self) -> int:
        """Return the number of free slots."""
        return len(self._free)

    @property
    def free_slots(self) -> Seq[int]:
        """Return the free slots, ascending."""
        return self._free

    def lowest_free(self) -> int | None:
        """Return the lowest free slot; None if all are in use."""
        return self._free[0] if self._free else None

    @property
    def usage(self) -> float:
        """Return the share of positions that are kept for running sequences, 0..1."""
        return sum(self.lengths) / (self.num_slots * self.capacity)

    def allocate(self) -> int:
        """Allocate the lowest free slot, which starts empty."""
        return self.take(self._free[0])

    def take(self, slot: int, save_at: Seq[int] = ()) -> int:
        """Allocate this free slot. It starts empty; `share` can restore positions that a former sequence left.

        save_at: prompt positions up to which other sequences will want to share; layers that carry a state save it
        there.
        """
        self._free.remove(slot)
        if self.states is not None:
            self.states.start(slot, save_at)
        self.lengths[slot] = 0
        self._clear_idle_rows(slot)
        return slot

    def free(self, slot: int) -> bool:
        """Free a slot and leave its positions to be shared.

        Returns False if they cannot be shared: the sequence overflowed, and its positions were cleared.
        """
        assert slot not in self._free, f"slot {slot} freed twice"
        self._high[slot] = self._end(slot)
        length, self.lengths[slot] = self.lengths[slot], 0
        if self.states is not None:
            self.states.save(slot)
        self._free.append(slot)
        self._free.sort()
        finite = not self._by_torch or self.is_finite(slot, length)
        self._left[slot] = length if finite else 0
        self._clear_scratch(slot, self._left[slot], length)
        return finite

    def is_finite(self, slot: int, length: int) -> bool:
        """Return whether the first `length` positions of a slot have no infinity and no NaN."""
        return all(
            math.isfinite(storage.data[:, :, slot, :, : storage.used(length)].sum(dtype=torch.float32).item())
            for storage in self.storages
        )

    def exchange(self, one: int, other: int) -> None:
        """Exchange the contents of two slots, either of which may be free."""
        # Both are swapped as far as either was written, trees included, so that nothing is left that must be cleared.
        written = max(self._end(one), self._end(other)) + self._scratch
        self.swap(one, other, written, written)
        if self.states is not None:
            self.states.exchange(one, other)
        for slot in (one, other):
            self._clear_idle_rows(slot)
        for by_slot in (self.lengths, self._left, self._high):
            by_slot[one], by_slot[other] = by_slot[other], by_slot[one]
        places = {one: other, other: one}
        self._free = sorted(places.get(slot, slot) for slot in self._free)

    def shareable(self, source: int, length: int) -> int:
        """Return how many of the first `length` positions of slot `source` can be shared: all, or those up to a saved
        state, or none if some that a sequence would read are gone."""
        if self.states is not None:
            length = self.states.shareable(source, length)
        return length if self._reach is None or length >= self._end(source) - self._reach else 0

    def _end(self, slot: int) -> int:
        """Return the end of the positions that were written to a slot, trees aside."""
        return max(self._high[slot], self.lengths[slot])

    def share(self, source: int, slot: int, length: int) -> None:
        """Start an empty slot with the first `length` positions of slot `source`, which may be the same slot."""
        if slot != source:
            self._high[slot] = self._end(source)
            # A ring is copied as far as it was written. What is behind `length` may be of a sequence that still runs.
            written = length if self._reach is None else self._high[slot]
            self.swap(source, slot, written, 0)
            if written > length:
                self._clear_scratch(slot, length, written)
        self.lengths[slot] = length
        if self.states is not None:
            self.states.share(source, slot, length)

    def swap(self, one: int, other: int, from_one: int, from_other: int) -> None:
        """Copy what slot `one` holds after writing `from_one` positions to slot `other`, and `from_other` the other
        way."""
        for storage in self.storages:
            first, second = storage.data[:, :, one], storage.data[:, :, other]
            upto, back = storage.used(from_one), storage.used(from_other)
            kept = second[..., :back, :].clone()
            second[..., :upto, :] = first[..., :upto, :]
            first[..., :back, :] = kept

    def clear(self, slot: int, first: int, end: int) -> None:
        """Set positions first..end of a slot to zero."""
        for storage in self.storages:
            storage.clear(slot, first, end)

    def _clear_scratch(self, slot: int, kept: int, length: int) -> None:
        """Clear the positions beyond `kept` that a sequence of this length may have written."""
        if self._by_torch:
            self.clear(slot, kept, max(kept, length + self._scratch))

    def _clear_idle_rows(self, slot: int) -> None:
        """Clear the rows that were written into a slot while it idled."""
        if self._by_torch:
            self.clear(slot, self.capacity, self.capacity + self._scratch)

    def window(self, window: int | None) -> int | None:
        """Return a layer's window, but None if no sequence is longer."""
        return None if window is None or window >= self.capacity + self.margin else window

    def storage(self, layer: int) -> tuple[Storage, int]:
        """Return the storage of a layer, and its place there."""
        number, at = self._storage_of[layer]
        return self.storages[number], at

    def write(self, layer: int, locations: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, each (batch, heads, rows, width), at `locations` of the layer's storage."""
        self._by_torch = True
        storage, at = self.storage(layer)
        width = storage.data.shape[-1]
        for which, rows in ((0, keys), (1, values)):
            if rows.shape[-1] < width:
                rows = F.pad(rows, (0, width - rows.shape[-1]))
            storage.data[at, which].view(-1, width).index_copy_(0, locations, rows.reshape(-1, width))

    def read(self, layer: int, first_slot: int, batch: int, num: int) -> tuple[Tensor, Tensor]:
        """Return views (batch, heads, num, width) of the first `num` places of keys and values of consecutive slots."""
        storage, at = self.storage(layer)
        both = storage.data[at, :, first_slot : first_slot + batch, :, :num]
        return both[0], both[1]

    def keep(self, slots: Seq[int], paths: Seq[Seq[int]]) -> None:
        """Keep the rows in paths[i] (ascending row numbers) of those written beyond the length of slots[i], in order,
        and advance the length."""
        moves = []
        for slot, path in zip(slots, paths, strict=True):
            storage = self.lengths[slot]
            if path and path[-1] != len(path) - 1:
                moves += [(slot, storage + old, storage + new) for new, old in enumerate(path) if new != old]
            if path and not storage:  # a new sequence, which shares nothing
                self._high[slot] = 0
            self.lengths[slot] = storage + len(path)
        if moves:
            self.rearrange(moves)
        if self.states is not None:
            self.states.keep(slots, paths)

    def rearrange(self, moves: Seq[Move]) -> None:
        """Move rows within their slots. Rows only move down."""
        for storage in self.storages:
            storage.rearrange(moves)

    def check_integrity(self) -> None:
        """Assert that lengths and free slots agree. For tests and debugging."""
        assert sorted(set(self._free)) == self._free, "free slots repeat"
        assert all(self.lengths[slot] == 0 for slot in self._free), "a free slot holds something"
        assert all(0 <= length <= self.capacity for length in self.lengths), "a slot holds more than fits"
