"""Gives every slot its own state in layers that carry one from row to row. Belongs to a KV cache, as its twin for such
layers; knows slots and lengths, nothing of models or requests.

A state exists only where it was saved: while a prompt is read, at the lengths in `save_at`, and when its slot is freed.
Saved states stay with a slot until its next sequence computes, as keys and values do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.recurrences import Kept, Rows, State

# Saved states per slot: at the end of the last medium, of the prompt and of the answer. So another question about the
# same media, the same prompt and a follow-up are all found. The oldest gives way.
SAVED = 3


@dataclass(frozen=True, eq=False)
class _Saved:
    """The state in all layers after a sequence's first `length` positions. Never changed, so slots may share it."""

    length: int
    states: list[Tensor]  # (1, ...) each


@dataclass(eq=False)
class _Slot:
    """What is known of a slot, beside its states in the layers."""

    length: int = 0  # positions that its states stand for
    save_at: tuple[int, ...] = ()
    saved: list[_Saved] = field(default_factory=list)  # the oldest first
    left: list[_Saved] = field(default_factory=list)  # by the sequence before, until the present one computes

    def save(self, length: int, states: list[Tensor]) -> None:
        """Add a saved state; the oldest gives way."""
        others = [saved for saved in self.saved if saved.length != length]
        self.saved = [*others, _Saved(length, states)][-SAVED:]


class SlotStates:
    """The states of a model's layers in all slots of one KV cache."""

    def __init__(self, layers: Sequence[State], num_slots: int, *, saving: bool) -> None:
        """Allocate empty states. layers: called once before; several caches may share them, one pass at a time; saving:
        whether states are ever saved."""
        self._layers, self._saving = layers, saving
        self._states = [layer.like.new_zeros(num_slots, *layer.like.shape) for layer in layers]
        self._slots = [_Slot() for _ in range(num_slots)]
        self._rows: Rows | None = None  # of the latest pass, until its rows are kept
        self._starts: list[int] = []

    @staticmethod
    def bytes_per_slot(layers: Sequence[State], *, saving: bool) -> int:
        """Return the bytes of one slot, with those that may be saved."""
        return sum(layer.like.nbytes for layer in layers) * (1 + SAVED * saving)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all slots, with those that may be saved."""
        return len(self._slots) * self.bytes_per_slot(self._layers, saving=self._saving)

    # --- a pass

    @contextmanager
    def begin(self, rows: AttentionMetadata) -> Iterator[None]:
        """Let the layers compute these rows, each from its slot's state, until the block ends. Changes no state: see
        `keep`."""
        self._drop()
        marks: list[list[int]] = [[] for _ in range(rows.batch)]
        if rows.mask_kind is MaskKind.CAUSAL:
            for number, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
                inside = (at - start for at in self._slots[rows.first_slot + number].save_at)
                marks[number] = sorted({count, *(at for at in inside if 0 < at < count)}) if count else []
        self._rows, self._starts = Rows.of(rows, marks, self._layers[0].like.device), rows.starts.tolist()
        with passing(self._layers, self._states, self._rows):
            yield

    def keep(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Move the states of these slots on by the rows in paths[i] of the latest pass, ascending: from one without a
        parent to one of its descendants. Of a prompt chunk all rows are kept, or none. Other slots stay as they are."""
        rows = self._rows
        assert rows is not None, "rows are kept without a pass, or twice"
        kept = [(slot - rows.first_slot, path) for slot, path in zip(slots, paths, strict=True) if path]
        if kept:
            numbers, ends = [number for number, _ in kept], [path[-1] for _, path in kept]
            for number, path in kept:
                self._save_marks(rows, number, len(path))
            which = Kept.of(rows, numbers, ends)
            for layer in self._layers:
                layer.keep(rows, which)
            for number, path in kept:
                slot = self._slots[rows.first_slot + number]
                slot.length, slot.left = self._starts[number] + len(path), []
        self._drop()

    def _save_marks(self, rows: Rows, number: int, count: int) -> None:
        """Save the states within and at the end of a prompt chunk that are wanted."""
        slot, start = self._slots[rows.first_slot + number], self._starts[number]
        for end in rows.ends[number]:
            if start + end in slot.save_at:
                slot.save(start + end, [layer.after(rows, number, end) for layer in self._layers])
        assert not rows.causal or count == rows.ends[number][-1], "a prompt chunk is kept as a whole"

    def _drop(self) -> None:
        """Release what the latest pass left."""
        self._rows = None
        for layer in self._layers:
            layer.drop()

    # --- slots

    def start(self, slot: int, save_at: Sequence[int] = ()) -> None:
        """Begin a sequence with empty states; `share` can restore one that was saved.

        save_at: lengths at which its state is saved while its prompt is read.
        """
        for states in self._states:
            states[slot] = 0
        self._slots[slot] = _Slot(save_at=tuple(save_at) if self._saving else (), left=self._slots[slot].saved)

    def share(self, source: int, slot: int, length: int) -> None:
        """Continue an empty slot from what slot `source`, which may be the same, has saved at `length`."""
        own, other = self._slots[slot], self._slots[source]
        own.saved = [saved for saved in (own.left if own is other else other.saved) if saved.length <= length]
        own.left, own.length = [], length
        restored = next((saved for saved in own.saved if saved.length == length), None)
        assert restored is not None, f"slot {source} has saved no state at {length}"
        for states, state in zip(self._states, restored.states, strict=True):
            states[slot] = state[0]

    def save(self, slot: int) -> None:
        """Save a slot's state as it is now."""
        if self._saving:
            own = self._slots[slot]
            own.save(own.length, [states[slot : slot + 1].clone() for states in self._states])

    def shareable(self, slot: int, most: int) -> int:
        """Return the largest length, at most `most`, at which a slot's state is saved; 0 if there is none."""
        return max((saved.length for saved in self._slots[slot].saved if saved.length <= most), default=0)

    def exchange(self, one: int, other: int) -> None:
        """Exchange all that two slots have."""
        for states in self._states:
            states[[one, other]] = states[[other, one]]
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]


@contextmanager
def passing(layers: Sequence[State], states: Sequence[Tensor | None], rows: Rows) -> Iterator[None]:
    """Let layers compute these rows until the block ends. states: theirs, in all slots; None at the first call."""
    try:
        for layer, own in zip(layers, states, strict=True):
            layer.rows, layer.states, layer.calls = rows, own, 0
        yield
    finally:
        for layer in layers:
            layer.rows = None
