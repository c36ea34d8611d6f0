"""Gives every slot its own state in the layers of a model that carry one from row to row (hybrids: Qwen3.5, LFM2,
Nemotron-H).

Such a layer is found by what its forward does: it stores a state in transformers' cache. The functions that it computes
the state with are replaced by those of model/backends/recurrences.py; all else is the family's own code. A state exists
only where it was saved: while a prompt is read, at the lengths in `save_at`, and where `save` is called. Saved states
stay with a slot until its next sequence computes, as keys and values do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.recurrences import Convolution, DeltaRule, Kept, Rows, SelectiveScan, State
from model.errors import ConfigError

# What transformers' functions are replaced by, and which method of its cache says that a layer needs one of them.
KINDS: dict[str, type[Any]] = {
    "causal_conv1d_fn": Convolution,
    "torch_chunk_gated_delta_rule": DeltaRule,
    "mamba2_chunk_scan": SelectiveScan,
}
STORING = {"update_conv_state": {"causal_conv1d_fn"}, "update_recurrent_state": set(KINDS) - {"causal_conv1d_fn"}}
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


class States:
    """The states of all layers that carry one, in all slots."""

    def __init__(self, layers: list[State]) -> None:
        """Take over layers that have been called once."""
        self._layers = layers
        self._device = layers[0].states.device
        self._bytes = sum(layer.states[0].nbytes for layer in layers)  # of one slot
        self._rows: Rows | None = None  # of the latest pass, until its rows are kept
        self._starts: list[int] = []
        self.allocate(0)

    @classmethod
    def of(cls, language: Any, num_slots: int = 0) -> States | None:
        """Find a language model's layers that carry a state, and replace what they compute it with.

        The weights may be on the meta device. Returns None if no layer carries a state; raises ConfigError if one
        cannot be served.
        """
        layers = [layer for module in language.modules() for layer in _replaced(module)]
        if not layers:
            return None
        hidden = torch.zeros(1, 1, language.config.hidden_size, dtype=language.dtype, device=language.device)
        one = Rows(0, 1, 1, False, [[]], None, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=hidden.device))
        with torch.no_grad(), _passing(layers, one):
            for module in language.modules():
                if isinstance(module.__dict__.get("forward"), MethodType) and _storing(module):
                    module(hidden)
        states = cls(layers)
        states.allocate(num_slots)
        return states

    def bytes_per_slot(self, *, saving: bool) -> int:
        """Return the bytes of one slot. saving: with those that may be saved."""
        return self._bytes * (1 + SAVED * saving)

    def allocate(self, num_slots: int, *, saving: bool = True) -> None:
        """Allocate the states of so many slots, all empty. saving: whether any state is ever saved."""
        self._saving = saving
        for layer in self._layers:
            layer.allocate(num_slots)
        self._slots = [_Slot() for _ in range(num_slots)]

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
        self._rows, self._starts = Rows.of(rows, marks, self._device), rows.starts.tolist()
        with _passing(self._layers, self._rows):
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
        for layer in self._layers:
            layer.states[slot] = 0
        self._slots[slot] = _Slot(save_at=tuple(save_at) if self._saving else (), left=self._slots[slot].saved)

    def share(self, source: int, slot: int, length: int) -> None:
        """Continue an empty slot from what slot `source`, which may be the same, has saved at `length`."""
        own, other = self._slots[slot], self._slots[source]
        own.saved = [saved for saved in (own.left if own is other else other.saved) if saved.length <= length]
        own.left, own.length = [], length
        states = next(saved.states for saved in own.saved if saved.length == length)
        for layer, state in zip(self._layers, states, strict=True):
            layer.states[slot] = state[0]

    def save(self, slot: int) -> None:
        """Save a slot's state as it is now."""
        if self._saving:
            states = [layer.states[slot : slot + 1].clone() for layer in self._layers]
            self._slots[slot].save(self._slots[slot].length, states)

    def shareable(self, slot: int, most: int) -> int:
        """Return the largest length, at most `most`, at which a slot's state is saved; 0 if there is none."""
        return max((saved.length for saved in self._slots[slot].saved if saved.length <= most), default=0)

    def exchange(self, one: int, other: int) -> None:
        """Exchange all that two slots have."""
        for layer in self._layers:
            layer.states[[one, other]] = layer.states[[other, one]]
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]


@contextmanager
def _passing(layers: list[State], rows: Rows) -> Iterator[None]:
    """Let layers compute these rows until the block ends."""
    try:
        for layer in layers:
            layer.rows, layer.calls = rows, 0
        yield
        if any(layer.calls != 1 for layer in layers):
            raise ConfigError("a layer with a state computed it more than once, or not at all")
    finally:
        for layer in layers:
            layer.rows = None


def _storing(module: nn.Module) -> set[str]:
    """Return the methods of transformers' cache with which a module's forward stores a state."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(STORING).intersection(code.co_names) if code else set()


def _replaced(module: nn.Module) -> list[State]:
    """Replace the functions that a module computes its state with, if it carries one.

    Raises ConfigError if it computes one with functions that have no replacement.
    """
    methods, layers = _storing(module), []
    forward = inspect.unwrap(type(module).forward)
    for method in methods:
        names = STORING[method].intersection(forward.__code__.co_names).intersection(forward.__globals__)
        if len(names) != 1:
            raise ConfigError(
                f"layers of type {type(module).__name__} carry a state from token to token in a way that is not "
                "supported; gated delta rules, Mamba2 and short convolutions are"
            )
        layers.append((name := names.pop(), KINDS[name](forward.__globals__[name])))
    if layers:
        function = FunctionType(
            forward.__code__,
            forward.__globals__ | dict(layers),
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        function.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(function, module)
    return [layer for _, layer in layers]
