"""Goes on behind any path of the latest draft block, for trees that a grammar has cut (see guided_trees.Continuing).

Computes with numpy, since it reads one row at a time: calls of torch would take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from model.drafters.flash.network import DraftNetwork


class Continuation:
    """Keeps the latest block of every slot, and the weights of the sequential head, float32."""

    def __init__(self, network: DraftNetwork) -> None:
        """Copy the weights of a network whose layers have not been packed yet."""
        head = network.sequential
        self._before = None if head is None else head.before.weight
        self._state_weight = None if head is None else _numbers(head.state.weight)
        self._after = None if head is None else _numbers(head.after.weight)
        self._offered = None if network.offered is None else network.offered.cpu().numpy()
        self._logits: Tensor | None = None
        self._contexts: Tensor | None = None
        self._newest, self._drafting = np.zeros(0, np.int64), np.zeros(0, bool)
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # slot -> its logits and contexts
        self._states: dict[tuple[int, ...], np.ndarray] = {}  # (slot, newest token, path) -> the head's state

    def take(self, newest: np.ndarray, drafting: np.ndarray, logits: Tensor, contexts: Tensor) -> None:
        """Take another block, valid until the next pass.

        newest: (slots,); drafting: (slots,) bool, which slots it is for; logits: (slots, block, draft vocab); contexts:
        (slots, block, rank), of the sequential head, empty without one.
        """
        self._newest, self._drafting, self._logits, self._contexts = newest, drafting, logits, contexts
        self._rows.clear()
        self._states.clear()

    def best(self, slot: int, path: Seq[int], allowed: bytes, num: int) -> list[tuple[int, float]]:
        """Return the `num` likeliest allowed tokens behind a path, each with its log-probability among those.

        allowed: a bit for each token, the lowest of a byte first. Empty if the block does not reach so far or is not
        for this slot.
        """
        if self._logits is None or slot >= len(self._drafting) or not self._drafting[slot]:
            return []
        if slot not in self._rows:
            assert self._contexts is not None
            self._rows[slot] = _numbers(self._logits[slot]), _numbers(self._contexts[slot])
        logits = self._rows[slot][0]
        if len(path) >= len(logits):
            return []
        row = logits[len(path)]
        if self._after is not None:
            row = row + self._after @ self._state((slot, int(self._newest[slot]), *path))
        bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")
        places = np.flatnonzero(bits if self._offered is None else bits[self._offered])
        if not len(places):
            return []
        scores = row[places]
        order = np.argpartition(-scores, num)[:num] if num < len(scores) else np.arange(len(scores))
        order = order[np.argsort(-scores[order], kind="stable")]
        top = float(scores[order[0]])
        total = top + float(np.log(np.exp(scores - top).sum()))
        tokens = places[order] if self._offered is None else self._offered[places[order]]
        return [(int(token), float(scores[at]) - total) for token, at in zip(tokens, order, strict=True)]

    def _state(self, path: tuple[int, ...]) -> np.ndarray:
        """Return the sequential head's state behind a path, (rank,). path: the slot, its newest token, and others."""
        if (state := self._states.get(path)) is None:
            assert self._before is not None
            entering = _numbers(self._before[path[-1]]) + self._rows[path[0]][1][len(path) - 2]
            if len(path) > 2:
                entering = entering + self._state_weight @ self._state(path[:-1])
            self._states[path] = state = entering / (1.0 + np.exp(-entering))
        return state


def _numbers(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to the host as float32."""
    numbers: np.ndarray = tensor.detach().float().cpu().numpy().copy()
    return numbers
