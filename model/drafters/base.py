"""What the engine asks of a drafter. One file per kind implements it; registry.py picks by name.

A drafter knows of every sequence what the target has computed *and kept*, and of the newest token only when it is to
propose: so it is never rolled back. Whatever it proposes, the answer stays the same (see verify.py).
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
    """What the engine has room for, and so a drafter beside it.

    capacity: positions of a sequence; margin: rows of a tree, the root's included; width: candidates kept at each
    depth; recorder: passes that torch computes at every step are to be recorded with it (see graphs.py).
    """

    num_slots: int
    capacity: int
    margin: int
    width: int
    recorder: Recorder | None = None


class Proposing(Protocol):
    """What a round asks of a drafter."""

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """A tree for each of slots 0.., of at most budgets[b] nodes beside its root. newest, budgets: (slots,) int64,
        the last token of each and how many nodes may be verified (0: it drafts nothing, or does not decode)."""
        ...

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:
        """The target has verified these trees, one for each of slots 0.., and kept the rows in paths[b], ascending;
        none of a slot that does not decode, or that it does not know, and some of at least one. aux_hidden_states:
        (slots, rows, num_taps * hidden), good until the next pass."""
        ...


class Drafter(Proposing, Protocol):
    """Tensors are on the target's device, in its dtype."""

    @property
    def name(self) -> str:
        """As it is asked for and shown."""
        ...

    @property
    def native(self) -> bool:
        """Whether a step runs without torch: in the native library, or in neither."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of its weights, as they are held."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Of what it holds of sequences, allocated at start."""
        ...

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        """A sequence begins in this slot."""
        ...

    def share(self, source: int, slot: int, length: int) -> bool:
        """The sequence that has just begun in `slot` takes over the first `length` positions of its prompt from the one
        in `source`, which may be over, or be the same slot; no medium reaches beyond them. False: this drafter cannot,
        and nothing is changed."""
        ...

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        """The target has computed prompt positions start.. of it. aux_hidden_states: (positions, num_taps * hidden);
        embeds: (positions, hidden), what entered there: of tokens, and of media."""
        ...

    def free(self, slot: int) -> None:
        """The sequence in this slot is over."""
        ...

    def exchange(self, one: int, other: int) -> None:
        """Exchange two slots, either of which may be free: their sequences, and what is left for others to share."""
        ...

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        """It holds just these sequences; slot -> tokens that the target has computed. For tests and debugging."""
        ...
