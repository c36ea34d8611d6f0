"""A round of draft and verify in two native calls (step.h), for targets whose decoder runs natively: model/round.py.

All that a round needs lies in one structure that is filled once; from step to step a few numbers change. The draft's
share is computed in the same calls where it is FLASH's and native too; other drafters give their trees, and are shown
what was kept, in between.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from model.attention import Rows, Sight
from model.drafters.base import Drafter
from model.drafters.flash import FlashDrafter
from model.kv_cache import KVCache
from model.native.candidates import TreeArrays
from model.native.library import functions, pointer
from model.native.step import Linear, Verifier, linear
from model.stats import Counters
from model.tree import Trees

PARTS = ("propose", "grow", "verify", "accept", "observe")


class _Cache(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in "layer_stride values_stride slot_stride head_stride".split()),
        ("lengths", ctypes.c_void_p),
    ]


class _Round(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "target embeddings".split()),
        ("head", Linear),
        ("draft", ctypes.c_void_p),
        *((n, _Cache) for n in "target_cache draft_cache".split()),
        *((n, ctypes.c_int32) for n in "batch rows axes given".split()),
        *((n, ctypes.c_void_p) for n in "newest budgets roots".split()),
        ("trees", TreeArrays),
        *((n, ctypes.c_void_p) for n in "counts positions paths accepted taps logits drafted chosen emitted".split()),
        ("seconds", ctypes.c_double * len(PARTS)),
    ]


class _Shape:
    """Views of a round's memory for one shape, (batch, rows) and what more there is."""

    def __init__(self, memory: NativeRound, batch: int, rows: int) -> None:
        count = batch * rows

        def numbers(array: np.ndarray) -> np.ndarray:
            return array[:count].reshape(batch, rows)

        def states(tensor: Tensor, width: int) -> Tensor:
            return tensor[: count * width].view(batch, rows, width)

        self.trees = Trees(
            numbers(memory.tokens),
            numbers(memory.parents),
            numbers(memory.depths),
            memory.sizes[:batch],
            numbers(memory.scores),
        )
        self.chosen, self.emitted = numbers(memory.chosen), numbers(memory.emitted)
        self.paths = numbers(memory.paths)
        self.logits = states(memory.logits, memory.verifier.head.outputs)
        self.taps = states(memory.taps, memory.tap_width)


class NativeRound:
    """See `model.round.Round`."""

    native = True

    def __init__(self, verifier: Verifier, cache: KVCache, counters: Counters, *, max_nodes: int) -> None:
        self.verifier, self.cache, self._counters = verifier, cache, counters
        self.drafter: Drafter | None = None
        self.flash: FlashDrafter | None = None  # the same, where it has its part in the native calls
        like, stack, slots = verifier.embeddings, verifier.stack, cache.num_slots
        most = slots * (1 + max_nodes)
        self.newest, self.budgets = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.roots = np.zeros(slots, np.int32)
        self.tap_width = stack.num_taps * stack.shape.hidden
        self.taps, self.logits = like.new_empty(most * self.tap_width), like.new_empty(most * verifier.head.outputs)
        self.tokens, self.chosen, self.emitted = (np.zeros(most, np.int64) for _ in range(3))
        self.parents, self.depths, self.paths = (np.zeros(most, np.int32) for _ in range(3))
        self.scores, self.sizes = np.zeros(most), np.zeros(slots, np.int64)
        self._lengths, self._draft_lengths, self._counts, self._accepted = (np.zeros(slots, np.int32) for _ in range(4))
        self._positions = np.zeros(verifier.num_axes * most, np.int32)
        self._drafted = like.new_empty(0)
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._now = _Shape(self, 1, 1)
        self._struct = _Round(
            target=ctypes.cast(ctypes.pointer(stack.struct), ctypes.c_void_p),
            embeddings=pointer(like),
            head=linear(verifier.head),
            target_cache=_Cache(cache.address, *cache.strides, pointer(self._lengths)),
            axes=verifier.num_axes,
            newest=pointer(self.newest, np.int64),
            budgets=pointer(self.budgets, np.int64),
            roots=pointer(self.roots),
            trees=TreeArrays.of(self._now.trees, self.budgets),
            counts=pointer(self._counts),
            positions=pointer(self._positions),
            paths=pointer(self.paths),
            accepted=pointer(self._accepted),
            taps=pointer(self.taps),
            logits=pointer(self.logits),
            chosen=pointer(self.chosen, np.int64),
            emitted=pointer(self.emitted, np.int64),
        )
        self._given = ctypes.c_bool(like.dtype is torch.bfloat16), ctypes.byref(self._struct)
        self._look, self._accept = functions().flash_look, functions().flash_accept

    def use(self, drafter: Drafter | None) -> None:
        self.drafter, self.flash, struct = drafter, None, self._struct
        struct.draft = None
        if isinstance(drafter, FlashDrafter) and (step := drafter.step) is not None:
            self.flash, held = drafter, drafter.cache
            self._drafted = self.logits.new_empty(self.cache.num_slots * step.block * self.verifier.head.outputs)
            struct.drafted = pointer(self._drafted)
            struct.draft = ctypes.cast(ctypes.pointer(step.struct), ctypes.c_void_p)
            struct.draft_cache = _Cache(held.address, *held.strides, pointer(self._draft_lengths))

    def look(self, batch: int) -> tuple[Trees, np.ndarray, Tensor]:
        struct, drafter = self._struct, self.drafter
        most = int(self.budgets[:batch].max())
        rows, trees = 1, None
        if most > 0:
            if self.flash is not None and self.flash.step is not None:
                rows += min(most, self.flash.step.most_nodes)
            elif drafter is not None:
                with self._counters.timed("draft"):
                    trees = drafter.propose(self.newest[:batch], self.budgets[:batch].clip(0))
                rows = trees.rows
        shape = self._shapes.get((batch, rows))
        if shape is None:
            shape = self._shapes[batch, rows] = _Shape(self, batch, rows)
        self._now = shape
        if trees is not None:
            shape.trees.fill(trees)
        struct.batch = struct.trees.batch = batch
        struct.rows = struct.trees.rows = rows
        struct.given = trees is not None
        self._lengths[:batch] = self.cache.lengths[:batch]
        if self.flash is not None:
            self._draft_lengths[:batch] = self.flash.cache.lengths[:batch]
        self._look(*self._given)
        return shape.trees, shape.chosen, shape.logits

    def accept(self, chosen: np.ndarray) -> list[list[int]]:
        shape, struct, drafter = self._now, self._struct, self.drafter
        if chosen is not shape.chosen:
            shape.chosen[:] = chosen
        self._accept(*self._given)
        batch = struct.batch
        counts = self._accepted[:batch].tolist()
        emitted = [row[:count] for row, count in zip(shape.emitted.tolist(), counts, strict=True)]
        for slot, count in enumerate(counts):
            self.cache.lengths[slot] += count
        propose, grow, verify, accept, observe = struct.seconds
        seconds = self._counters.step_seconds
        seconds.append(("verify", verify + accept))
        if self.flash is not None:
            for slot, count in enumerate(counts):
                self.flash.cache.lengths[slot] += count
            seconds.append(("draft", propose + grow + observe))
        elif drafter is not None:
            paths = [row[:count] for row, count in zip(shape.paths.tolist(), counts, strict=True)]
            with self._counters.timed("draft"):
                drafter.observe(shape.trees, paths, shape.taps)
        return emitted

    @property
    def seconds(self) -> dict[str, float]:
        """What each part of the latest round took."""
        return dict(zip(PARTS, self._struct.seconds, strict=True))

    @property
    def verified(self) -> Rows:
        """The rows of the latest round as they were when it looked."""
        batch, trees = self._struct.batch, self._now.trees
        counts = self._counts[:batch]
        return Rows(self.cache, 0, trees.rows, self._lengths[:batch], counts, Sight.TREE, trees.parents)

    @property
    def kept(self) -> np.ndarray:
        """(batch,) int32: how many of those were kept."""
        return self._accepted[: self._struct.batch]

    @property
    def drafted(self) -> Tensor:
        """(batch, block, vocab): the draft's logits of the latest round, unset where a slot did not draft; empty where
        drafting is no part of the native calls."""
        if self.flash is None:
            return self._drafted[:0]
        batch, block, vocab = self._struct.batch, self.flash.block, self.verifier.head.outputs
        return self._drafted[: batch * block * vocab].view(batch, block, vocab)
