"""Stores keys and values of every sequence, in memory allocated once. Knows slots and positions; nothing of tokens,
trees or requests.

Each sequence has one slot, and all slots have equal length. So the slots of a batch are one strided view, and attention
copies nothing:

    data[layer, 0 = keys | 1 = values, slot, head, position, :]

    position   0 ............ lengths[slot]) ......... capacity) ... capacity + margin
               kept for good | scratch of this step: rows being verified, overwritten by the next

Rows that a step writes beyond `lengths` are scratch until `keep` moves the accepted ones down and advances the length.
If a slot idles while torch computes its neighbours, its rows are written from `capacity` on. So the positions that a
finished sequence has left stay intact, and another sequence may share them.

All values in a slot are finite, except those that its present sequence has written. torch reads every position of a
slot and adds -inf to the scores of masked ones, and NaN - inf is NaN.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.backends import memory
from model.transfer import upload

Move = tuple[int, int, int]  # slot, from position, to position
ALIGNED = 64  # slots are multiples of so many positions, and as many numbers follow the last: kernels read in blocks


class KVCache:
    """The keys and values of all slots. At least `margin` positions beyond `capacity` are scratch, so that a full slot
    can still be verified against."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        margin: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate all slots. capacity: positions of a sequence; margin: most rows that a step writes."""
        self.capacity, self.num_slots, self.num_heads = capacity, num_slots, num_heads
        self.stride = self.positions_per_slot(capacity, margin)
        shape = (num_layers, 2, num_slots, num_heads, self.stride, head_dim)
        numbers = math.prod(shape)
        if device.type == "cpu":
            zeros = memory.zeros(numbers + ALIGNED, dtype)
        else:
            zeros = torch.zeros(numbers + ALIGNED, dtype=dtype, device=device)
        self.data = zeros[:numbers].view(shape)
        # For native code. A cache of one layer has layer stride 0, since its memory may serve all layers in turn.
        self.address = self.data.data_ptr()
        self.strides = (self.data.stride(0) if num_layers > 1 else 0, *self.data.stride()[1:4])
        self.lengths = array("i", [0] * num_slots)  # native code reads and writes them too
        self._left = array("i", [0] * num_slots)  # positions of a free slot that can be shared
        self._free = list(range(num_slots))  # sorted: the lowest free slot is allocated first
        self._by_torch = False  # whether torch has written here
        # rows[slot, head]: where position 0 of that slot and head lies when data[layer, 0] is seen as a list of vectors
        heads = torch.arange(num_slots * num_heads, device=device) * self.stride
        self._base = heads.view(num_slots, num_heads, 1)

    @staticmethod
    def positions_per_slot(capacity: int, margin: int) -> int:
        """Return the length of a slot: capacity and margin, rounded up to ALIGNED."""
        return -(-(capacity + margin) // ALIGNED) * ALIGNED

    @classmethod
    def bytes_per_slot(
        cls, *, num_layers: int, num_heads: int, head_dim: int, capacity: int, margin: int, dtype: torch.dtype
    ) -> int:
        """Return the bytes of one slot in all layers."""
        positions = cls.positions_per_slot(capacity, margin)
        return num_layers * 2 * num_heads * head_dim * positions * dtype.itemsize

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

    def take(self, slot: int) -> int:
        """Allocate this free slot. It starts empty; `share` can restore positions that a former sequence left."""
        self._free.remove(slot)
        self.lengths[slot] = 0
        self._clear_idle_rows(slot)
        return slot

    def free(self, slot: int) -> bool:
        """Free a slot and leave its positions to be shared.

        Returns False if they cannot be shared: the sequence overflowed, and its positions were cleared.
        """
        assert slot not in self._free, f"slot {slot} freed twice"
        length, self.lengths[slot] = self.lengths[slot], 0
        self._free.append(slot)
        self._free.sort()
        finite = not self._by_torch or self.is_finite(slot, length)
        self._left[slot] = length if finite else 0
        self._clear_scratch(slot, self._left[slot], length)
        return finite

    def is_finite(self, slot: int, length: int) -> bool:
        """Return whether the first `length` positions of a slot have no infinity and no NaN."""
        return math.isfinite(self.data[:, :, slot, :, :length].sum(dtype=torch.float32).item())

    def exchange(self, one: int, other: int) -> None:
        """Exchange the contents of two slots, either of which may be free."""
        from_one, from_other = (self.lengths[s] if s not in self._free else self._left[s] for s in (one, other))
        self.swap(one, other, from_one, from_other)
        for slot, kept, length in ((one, from_other, from_one), (other, from_one, from_other)):
            self._clear_scratch(slot, kept, length)
            self._clear_idle_rows(slot)
        for by_slot in (self.lengths, self._left):
            by_slot[one], by_slot[other] = by_slot[other], by_slot[one]
        places = {one: other, other: one}
        self._free = sorted(places.get(slot, slot) for slot in self._free)

    def share(self, source: int, slot: int, length: int) -> None:
        """Start an empty slot with the first `length` positions of slot `source`, which may be the same slot."""
        if slot != source:
            self.swap(source, slot, length, 0)
        self.lengths[slot] = length

    def swap(self, one: int, other: int, from_one: int, from_other: int) -> None:
        """Copy the first `from_one` positions of slot `one` to slot `other`, and `from_other` the other way."""
        first, second = self.data[:, :, one], self.data[:, :, other]
        kept = second[..., :from_other, :].clone()
        second[..., :from_one, :] = first[..., :from_one, :]
        first[..., :from_other, :] = kept

    def clear(self, slot: int, first: int, end: int) -> None:
        """Set positions first..end of a slot to zero."""
        self.data[:, :, slot, :, first:end] = 0

    def _clear_scratch(self, slot: int, kept: int, length: int) -> None:
        """Clear the positions beyond `kept` that a sequence of this length may have written."""
        if self._by_torch:
            self.clear(slot, kept, max(kept, length + self.stride - self.capacity))

    def _clear_idle_rows(self, slot: int) -> None:
        """Clear the rows that were written into a slot while it idled."""
        if self._by_torch:
            self.clear(slot, self.capacity, self.stride)

    def locations(self, first_slot: int, positions: Tensor) -> Tensor:
        """Return where rows at `positions` (batch, rows) of slots first_slot.. are stored: flat indices (batch * heads
        * rows,)."""
        batch = positions.shape[0]
        return (self._base[first_slot : first_slot + batch] + positions[:, None, :]).flatten()

    def write(self, layer: int, locations: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, each (batch, heads, rows, head_dim), at `locations`."""
        self._by_torch = True
        width = keys.shape[-1]
        for which, rows in ((0, keys), (1, values)):
            self.data[layer, which].view(-1, width).index_copy_(0, locations, rows.reshape(-1, width))

    def read(self, layer: int, first_slot: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views (batch, heads, length, head_dim) of the keys and values of consecutive slots."""
        both = self.data[layer, :, first_slot : first_slot + batch, :, :length]
        return both[0], both[1]

    def keep(self, slots: Seq[int], paths: Seq[Seq[int]]) -> None:
        """Keep the rows in paths[i] (ascending row numbers) of those written beyond the length of slots[i], in order,
        and advance the length."""
        moves = []
        for slot, path in zip(slots, paths, strict=True):
            storage = self.lengths[slot]
            if path and path[-1] != len(path) - 1:
                moves += [(slot, storage + old, storage + new) for new, old in enumerate(path) if new != old]
            self.lengths[slot] = storage + len(path)
        if moves:
            self.rearrange(moves)

    def rearrange(self, moves: Seq[Move]) -> None:
        """Move rows within their slots. All rows are read before any is written."""
        # Rows only move down. index_select copies all sources before any target is written.
        sources, targets = [], []
        for slot, old, new in moves:
            for head in range(self.num_heads):
                base = (slot * self.num_heads + head) * self.stride
                sources.append(base + old)
                targets.append(base + new)
        flat = self.data.view(self.data.shape[0] * 2, -1, self.data.shape[-1])
        both = upload(np.array((sources, targets)), self.data.device)
        flat.index_copy_(1, both[1], flat.index_select(1, both[0]))

    def check_integrity(self) -> None:
        """Assert that lengths and free slots agree. For tests and debugging."""
        assert sorted(set(self._free)) == self._free, "free slots repeat"
        assert all(self.lengths[slot] == 0 for slot in self._free), "a free slot holds something"
        assert all(0 <= length <= self.capacity for length in self.lengths), "a slot holds more than fits"
