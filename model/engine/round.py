"""Runs one round of draft and verify: a draft tree behind the newest token of every sequence, one pass of the target
over all trees, and the accepted nodes kept in both KV caches.

A round has two halves. Between them the caller chooses the target's token at every node, greedily or by sampling. There
are two implementations: `TorchRound` here, and `NativeRound` in native_round.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind
from model.backends.graphs import MAX_ROWS, Recorder, Replays
from model.backends.kv_cache import KVCache
from model.decoding import guided_trees, tree, verify
from model.decoding.grammar import unpacked
from model.decoding.guided_trees import Guided
from model.decoding.tree import IDLE, PLAIN, Trees
from model.drafters.base import Proposing
from model.engine.speculation import SpeculationController
from model.engine.stats import Counters
from model.targets.base import Target
from model.transfer import upload

NONE_GUIDED: Mapping[int, Guided] = {}


class Round(Protocol):
    """The interface of a round. Slots are numbered from 0.

    Before each round the caller sets, for every slot: newest (slots,) int64, its last token; budgets (slots,) int64,
    how many draft nodes it may verify, or IDLE, or PLAIN if the drafter does not know the sequence; roots (slots,)
    int32, the position id of the newest token.
    """

    native: bool  # whether the whole round runs without torch
    newest: np.ndarray
    budgets: np.ndarray
    roots: np.ndarray

    def use(self, drafter: Proposing | None) -> None:
        """Draft with this drafter from the next round on; None: verify roots alone, which is plain decoding."""
        ...

    def draft_and_verify(
        self, batch: int, nodes: int, guided: Mapping[int, Guided] = NONE_GUIDED
    ) -> tuple[Trees, np.ndarray | None, Tensor]:
        """Draft a tree for each of slots 0..batch and compute the target's logits at every node.

        nodes: the largest of the budgets; guided: the sequences whose answers follow a grammar, by slot. Returns the
        trees; the target's greedy token behind each node (batch, rows) int64, or None if it is not known yet; and the
        logits (batch, rows, vocab). All are valid until the next round. The values in padding rows are undefined.
        """
        ...

    def likeliest(self, slot: int, row: int, allowed: bytes) -> int:
        """Return the target's likeliest token at a node, of those that are allowed: a bit for each token, the lowest of
        a byte first."""
        ...

    def commit(self, chosen: np.ndarray) -> list[list[int]]:
        """Keep the nodes that agree with the target's tokens, chosen (batch, rows) int64, and drop the others.

        Returns the tokens to emit for every slot: the accepted draft tokens, then the bonus token; nothing for an idle
        slot.
        """
        ...


class TorchRound:
    """Implements `Round` with torch. Torch passes can be recorded as CUDA graphs."""

    native = False

    def __init__(
        self,
        target: Target,
        cache: KVCache,
        counters: Counters,
        load: SpeculationController,
        recorder: Recorder | None = None,
    ) -> None:
        """Allocate the per-slot arrays. With a `recorder`, record and replay the target's passes: see graphs.py."""
        self.target, self.cache, self.load, self._counters = target, cache, load, counters
        self.drafter: Proposing | None = None
        slots = cache.num_slots
        self.newest, self.budgets = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.roots = np.zeros(slots, np.int32)
        self._trees = tree.roots(self.newest)
        self._taps = self._logits = torch.empty(0)
        self._guided = NONE_GUIDED
        self.passes = None
        if recorder is not None and load.nodes < MAX_ROWS:
            self.passes = Replays(self.run, cache, recorder, max_rows=load.nodes + 1)
            with torch.inference_mode():
                self.passes.prepare(1 + target.num_axes, range(1, load.nodes + 2))

    def use(self, drafter: Proposing | None) -> None:
        self.drafter = drafter

    def draft_and_verify(
        self, batch: int, nodes: int, guided: Mapping[int, Guided] = NONE_GUIDED
    ) -> tuple[Trees, np.ndarray | None, Tensor]:
        """Draft and verify in torch (see `Round`). Never returns greedy tokens."""
        newest, budgets = self.newest[:batch], self.budgets[:batch]
        if nodes or guided:
            with self._counters.timed("draft"):
                admitted, worth = self.load.admitted, self.load.worth
                trees = guided_trees.drafted(self.drafter, admitted, newest, budgets, guided, worth)
        else:
            trees = tree.roots(newest)
        with self._counters.timed("verify"):
            starts = np.array(self.cache.lengths[:batch], np.int32)
            counts = np.where(budgets == IDLE, 0, trees.sizes).astype(np.int32)
            rows = AttentionMetadata(self.cache, 0, trees.rows, starts, counts, MaskKind.TREE, trees.parents)
            places = (self.roots[:batch, None] + trees.depths)[None]
            logits, aux_hidden_states = self.answers(trees.tokens, np.repeat(places, self.target.num_axes, 0), rows)
        self._trees, self._taps, self._logits, self._guided = trees, aux_hidden_states, logits, guided
        return trees, None, logits

    def likeliest(self, slot: int, row: int, allowed: bytes) -> int:
        row_logits = self._logits[slot, row]
        refused = upload(~unpacked(allowed, len(row_logits)), row_logits.device)
        return int(row_logits.masked_fill(refused, -torch.inf).argmax())

    def commit(self, chosen: np.ndarray) -> list[list[int]]:
        """Keep the accepted nodes in both caches (see `Round`)."""
        batch = len(chosen)
        verdicts = [
            verify.IDLE if self.budgets[b] == IDLE else verify.walk(self._trees, b, chosen[b]) for b in range(batch)
        ]
        paths = [verdict.path for verdict in verdicts]
        self.load.saw(self._trees, [[] if b in self._guided else path for b, path in enumerate(paths)])
        with self._counters.timed("verify"):
            self.cache.keep(range(batch), paths)
        if self.drafter is not None:
            kept_paths = [[] if self.budgets[b] == PLAIN else path for b, path in enumerate(paths)]
            if any(kept_paths):
                with self._counters.timed("draft"):
                    self.drafter.observe(self._trees, kept_paths, self._taps)
        return [verdict.tokens for verdict in verdicts]

    def answers(self, tokens: np.ndarray, positions: np.ndarray, rows: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """Run the target over tokens (batch, rows) at positions (axes, batch, rows).

        Returns the logits (batch, rows, vocab) and the aux hidden states (batch, rows, num_taps * hidden).
        """
        if self.passes is not None:
            hidden, aux_hidden_states = self.passes(rows, np.concatenate((tokens[None], positions)))
            return self.target.logits(hidden[:, : rows.num]), aux_hidden_states[:, : rows.num]
        done = self.target.forward(torch.from_numpy(tokens).to(self.target.device), positions, rows)
        return self.target.logits(done.hidden), done.aux

    def run(self, plan: AttentionTensors, numbers: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the target by torch alone, as a pass that can be recorded. numbers: (1 + axes, batch, rows), tokens and
        position ids."""
        done = self.target.run(numbers[0], numbers[1:], plan)
        return done.hidden, done.aux
