"""Defines the interface between the engine and a drafter. One file per method implements it; registry.py picks by name.

A drafter only sees positions that the target has computed *and kept*, and sees the newest token only when it proposes.
So it is never rolled back. Its proposals never change the answer (see verify.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from model.backends.graphs import Recorder
from model.decoding.tree import Trees
from model.targets.prompt import TokenizedPrompt


@dataclass(frozen=True)
class Room:
    """The sizes for which the engine, and so the drafter, allocates memory.

    num_slots: sequences at a time; capacity: positions of a sequence; margin: rows of a tree, the root included; width:
    candidates kept at each depth; recorder: records the passes that torch computes at every step (see graphs.py), if
    any.
    """

    num_slots: int
    capacity: int
    margin: int
    width: int
    recorder: Recorder | None = None


class Proposing(Protocol):
    """The part of a drafter that a round uses."""

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Draft a tree for each of slots 0.., with at most budgets[b] nodes beside its root.

        newest: (slots,) int64, the last token of each sequence; budgets: (slots,) int64, 0 if the slot does not draft
        or does not decode.
        """
        ...

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:
        """Add the accepted nodes of verified trees to the drafter's context.

        paths[b]: accepted rows of slot b, ascending; empty for a slot that does not decode or is not drafted for. At
        least one path is not empty. aux_hidden_states: (slots, rows, num_taps * hidden), valid until the next pass of
        the target.
        """
        ...


class Drafter(Proposing, Protocol):
    """The whole interface of a drafter. Tensors are on the target's device, in its dtype."""

    @property
    def name(self) -> str:
        """Return the name by which it is requested and reported."""
        ...

    @property
    def native(self) -> bool:
        """Return whether a step runs without torch."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its weights as they are stored in memory."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Return the bytes allocated at start for the context of sequences."""
        ...

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        """Start a sequence in this slot."""
        ...

    def share(self, source: int, slot: int, length: int) -> bool:
        """Copy the first `length` prompt positions from the sequence in `source` to the one that has just started in
        `slot`.

        The sequence in `source` may have finished; `source` may be `slot` itself. No medium crosses the end of the
        copied range. Returns False, with nothing changed, if this drafter cannot share.
        """
        ...

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        """Read prompt positions start.. of the sequence in this slot, which the target has just computed.

        aux_hidden_states: (positions, num_taps * hidden); embeds: (positions, hidden), the input embeddings of tokens
        and media.
        """
        ...

    def free(self, slot: int) -> None:
        """End the sequence in this slot."""
        ...

    def exchange(self, one: int, other: int) -> None:
        """Exchange two slots, either of which may be free: their sequences, and the positions that others can still
        share."""
        ...

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        """Assert that it has exactly these sequences: slot -> tokens that the target has computed. For tests and
        debugging."""
        ...
