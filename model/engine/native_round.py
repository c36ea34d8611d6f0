"""Runs a round of draft and verify (see round.py) in two native calls (step.h), for targets with a native decoder.

All arguments lie in one structure that is filled once; only a few numbers change from step to step. A native FLASH
draft runs inside the same two calls. Other drafters propose their trees before the first call and observe the accepted
nodes after the second.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.backends.kv_cache import KVCache
from model.backends.native import structures
from model.backends.native.candidates import described_trees
from model.backends.native.library import constant, functions, pointer
from model.backends.native.stack import described_cache
from model.backends.native.step import Verifier, described_linear
from model.config import MOST_NODES
from model.decoding import guided_trees
from model.decoding.guided_trees import Guided
from model.decoding.tree import IDLE, PLAIN, Trees
from model.drafters.base import Proposing
from model.drafters.flash.drafter import FlashDrafter
from model.engine.round import NONE_GUIDED
from model.engine.speculation import BINS, FINENESS, SpeculationController
from model.engine.stats import Counters

PARTS = ("propose", "grow", "verify", "accept", "observe")
# Constants of Python with their names in the native library (structures.h); both must agree.
SHARED = {
    "IDLE": IDLE,
    "PLAIN": PLAIN,
    "BINS": BINS,
    "FINENESS": FINENESS,
    "NUM_PARTS": len(PARTS),
    "MAX_NODES": MOST_NODES,
}


class _Shape:
    """Views of a round's memory for one shape (batch, rows)."""

    def __init__(self, memory: NativeRound, batch: int, rows: int) -> None:
        """Cut the views for `batch` slots of `rows` rows each from the memory of `memory`."""
        count = batch * rows

        def numbers(array: np.ndarray) -> np.ndarray:
            """View the first numbers of an array as (batch, rows)."""
            return array[:count].reshape(batch, rows)

        def states(tensor: Tensor, width: int) -> Tensor:
            """View the first numbers of a tensor as (batch, rows, width)."""
            return tensor[: count * width].view(batch, rows, width)

        self.trees = Trees(
            numbers(memory.tokens),
            numbers(memory.parents),
            numbers(memory.depths),
            memory.sizes[:batch],
            numbers(memory.scores),
        )
        self.chosen, self.emitted = numbers(memory.chosen), numbers(memory.emitted)
        self.paths, self.accepted = numbers(memory.paths), memory.accepted[:batch]
        self.logits = states(memory.logits, memory.verifier.head.outputs)
        self.aux_hidden_states = states(memory.aux_hidden_states, memory.aux_width)


class NativeRound:
    """Implements `model.engine.round.Round` in the native library."""

    native = True

    def __init__(self, verifier: Verifier, cache: KVCache, counters: Counters, load: SpeculationController) -> None:
        """Allocate all arrays for the largest round and describe them to the native library once."""
        self.verifier, self.cache, self.load, self._counters = verifier, cache, load, counters
        self.drafter: Proposing | None = None
        self.flash: FlashDrafter | None = None  # the drafter, if it runs inside the native calls
        like, stack, slots = verifier.embeddings, verifier.stack, cache.num_slots
        most = slots * (1 + load.nodes)
        self.newest, self.budgets = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.roots = np.zeros(slots, np.int32)
        self.aux_width = stack.num_aux * stack.shape.hidden
        self.aux_hidden_states = like.new_empty(most * self.aux_width)
        self.logits = like.new_empty(most * verifier.head.outputs)
        self.tokens, self.chosen, self.emitted = (np.zeros(most, np.int64) for _ in range(3))
        self.parents, self.depths, self.paths = (np.zeros(most, np.int32) for _ in range(3))
        self.scores, self.sizes = np.zeros(most), np.zeros(slots, np.int64)
        self.counts, self.accepted, self._observed = (np.zeros(slots, np.int32) for _ in range(3))
        self._seconds = np.zeros(len(PARTS))
        self._positions = np.zeros(verifier.num_axes * most, np.int32)
        self._drafted = like.new_empty(0)
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._now = _Shape(self, 1, 1)
        self._guided = NONE_GUIDED
        for name, value in SHARED.items():
            assert constant(name) == value, f"{name} is {constant(name)} in the native library, and {value} here"
        self._struct = structures.Round(
            target=ctypes.pointer(stack.struct),
            embeddings=pointer(like),
            embedding_scale=verifier.embedding_scale,
            head=described_linear(verifier.head),
            num_tokens=len(like),
            target_cache=described_cache(cache),
            axes=verifier.num_axes,
            newest=pointer(self.newest, np.int64),
            budgets=pointer(self.budgets, np.int64),
            roots=pointer(self.roots),
            trees=described_trees(self._now.trees, self.budgets),
            worth=structures.Worth(
                chance=pointer(load.chance, np.float64),
                tried=pointer(load.tried, np.int64),
                accepted=pointer(load.hits, np.int64),
            ),
            counts=pointer(self.counts),
            positions=pointer(self._positions),
            paths=pointer(self.paths),
            accepted=pointer(self.accepted),
            observed=pointer(self._observed),
            aux_hidden_states=pointer(self.aux_hidden_states),
            logits=pointer(self.logits),
            chosen=pointer(self.chosen, np.int64),
            emitted=pointer(self.emitted, np.int64),
            seconds=pointer(self._seconds, np.float64),
        )
        self._arguments = like.dtype is torch.bfloat16, ctypes.byref(self._struct)
        self._draft_and_verify, self._commit = functions().flash_draft_and_verify, functions().flash_commit
        self._go_on, self._likeliest = functions().flash_go_on, functions().flash_likeliest

    def use(self, drafter: Proposing | None) -> None:
        """Draft with this drafter from the next round on. Links a native FLASH draft into the round's structure."""
        self.drafter, self.flash, struct = drafter, None, self._struct
        struct.draft = None
        if isinstance(drafter, FlashDrafter) and (step := drafter.step) is not None:
            self.flash, self._most_nodes = drafter, step.most_nodes
            self._vocabulary = step.head.outputs
            block_rows = self.cache.num_slots * step.block
            self._drafted = self.logits.new_empty(block_rows * self._vocabulary)
            # Of the sequential head, which goes on from them where a grammar has cut a tree. One number at least.
            self._contexts = self.logits.new_empty(max(1, block_rows * step.struct.candidates.rank))
            step.struct.candidates.contexts = pointer(self._contexts)
            struct.draft_logits, struct.last_context = pointer(self._drafted), pointer(drafter.tails)
            struct.draft = ctypes.pointer(step.struct)
            struct.draft_cache = described_cache(drafter.cache)

    def draft_and_verify(
        self, batch: int, nodes: int, guided: Mapping[int, Guided] = NONE_GUIDED
    ) -> tuple[Trees, np.ndarray, Tensor]:
        """Draft and verify in one native call (see `Round`), or in two where trees are fitted to a grammar in between.
        Drafters that do not run in it propose before it."""
        struct, flash, trees = self._struct, self.flash, None
        rows = 1
        if flash is not None:
            rows += max(min(nodes, self._most_nodes), *(each.nodes for each in guided.values()), 0)
            struct.worth.seconds = self.load.curve_at
        elif guided or (nodes and self.drafter is not None):
            with self._counters.timed("draft"):
                newest, budgets = self.newest[:batch], self.budgets[:batch]
                admitted, worth = self.load.admitted, self.load.worth
                trees = guided_trees.drafted(self.drafter, admitted, newest, budgets, guided, worth)
            rows = trees.rows
        shape = self._shapes.get((batch, rows))
        if shape is None:
            shape = self._shapes[batch, rows] = _Shape(self, batch, rows)
        if shape is not self._now:
            self._now = shape
            struct.batch = struct.trees.batch = batch
            struct.rows = struct.trees.rows = rows
        if trees is not None:
            shape.trees.fill(trees)
        struct.has_trees = trees is not None
        if flash is not None and guided:
            with self._counters.timed("draft"):
                self._draft_fitting(shape.trees, guided)
        self._guided = guided
        self._draft_and_verify(*self._arguments)
        return shape.trees, shape.chosen, shape.logits

    def _draft_fitting(self, trees: Trees, guided: Mapping[int, Guided]) -> None:
        """Draft natively, and fit trees to grammars before they are verified."""
        for slot, each in guided.items():
            if not each.needs_draft:
                self.budgets[slot] = min(0, self.budgets[slot])
        self._struct.only_drafts = True
        self._draft_and_verify(*self._arguments)
        self._struct.only_drafts, self._struct.has_trees = False, True
        guided_trees.fit(trees, guided, self, self.load.worth)

    def best(self, slot: int, path: Seq[int], allowed: bytes, num: int) -> list[tuple[int, float]]:
        """Choose the likeliest allowed tokens behind a path of the native draft (see guided_trees.Continuing)."""
        flash = self.flash
        assert flash is not None
        if self.budgets[slot] <= 0 or len(path) >= flash.block:
            return []
        known = (ctypes.c_int64 * len(path))(*path)
        tokens, scores = (ctypes.c_int64 * num)(), (ctypes.c_double * num)()
        found = self._go_on(*self._arguments, slot, known, len(path), allowed, num, tokens, scores)
        return list(zip(tokens[:found], scores[:found], strict=True))

    def likeliest(self, slot: int, row: int, allowed: bytes) -> int:
        """Choose natively among the allowed tokens (see `Round`)."""
        return int(self._likeliest(*self._arguments, slot, row, allowed))

    def commit(self, chosen: np.ndarray) -> list[list[int]]:
        """Keep the accepted nodes in one native call (see `Round`). Drafters that do not run in it observe after it."""
        shape, drafter, counters = self._now, self.drafter, self._counters
        if chosen is not shape.chosen:
            shape.chosen[:] = chosen
        if self._guided:  # forced text is always right, and would make the draft look better than it is
            tried, hits = self.load.tried.copy(), self.load.hits.copy()
            self._commit(*self._arguments)
            self.load.tried[:], self.load.hits[:] = tried, hits
        else:
            self._commit(*self._arguments)
        counts = shape.accepted.tolist()
        propose, grow, verify, accept, observe = self._seconds.tolist()
        counters.step_seconds.append(("verify", verify + accept))
        if self.flash is not None:
            counters.step_seconds.append(("draft", propose + grow + observe))
        elif drafter is not None:
            budgets = self.budgets[: len(counts)].tolist()
            observed = [0 if budget == PLAIN else count for budget, count in zip(budgets, counts, strict=True)]
            if any(observed):
                paths = [row[:count] for row, count in zip(shape.paths.tolist(), observed, strict=True)]
                with counters.timed("draft"):
                    drafter.observe(shape.trees, paths, shape.aux_hidden_states)
        return [row[:count] for row, count in zip(shape.emitted.tolist(), counts, strict=True)]

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds that each part of the latest round took."""
        return dict(zip(PARTS, self._seconds.tolist(), strict=True))

    @property
    def drafted(self) -> Tensor:
        """Return the draft's logits of the latest round: (batch, block, vocab).

        The rows of a slot that did not draft are unset. The tensor is empty if the draft does not run in the native
        calls.
        """
        if self.flash is None:
            return self._drafted[:0]
        batch, block, vocab = self._struct.batch, self.flash.block, self._vocabulary
        return self._drafted[: batch * block * vocab].view(batch, block, vocab)
