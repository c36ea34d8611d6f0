"""Candidate trees from a draft's logits, as candidates.h grows them: `model.decoding.tree.best_first`."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.backends.native.library import Matrix, Mirror, functions, pointer
from model.decoding.tree import FixedTree, Trees, roots

MAX_WIDTH = 16  # as in candidates.h


class _Draft(Mirror):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "block vocab width rank".split()),
        *((n, ctypes.c_void_p) for n in "logits contexts before state after fixed ends offered".split()),
        *((n, ctypes.c_int32) for n in "num_fixed num_ends".split()),
    ]


class TreeArrays(Mirror):
    NAME = "Trees"
    _fields_ = [
        *((n, ctypes.c_int32) for n in "batch rows".split()),
        *((n, ctypes.c_void_p) for n in "budgets tokens sizes parents depths scores".split()),
    ]

    @classmethod
    def of(cls, trees: Trees, budgets: np.ndarray) -> TreeArrays:
        """Trees of roots alone, to be grown to at most budgets (batch,) int64 nodes beside them."""
        return cls(
            batch=len(budgets),
            rows=trees.rows,
            budgets=pointer(budgets, np.int64),
            tokens=pointer(trees.tokens, np.int64),
            sizes=pointer(trees.sizes, np.int64),
            parents=pointer(trees.parents),
            depths=pointer(trees.depths),
            scores=pointer(trees.scores, np.float64),
        )


@dataclass(frozen=True)
class Sequential:
    """The sequential head of model/drafters/flash/network.py. before: (vocab, rank)."""

    before: Tensor
    context: Matrix
    state: Matrix
    after: Matrix


class Candidates:
    """Grow best-first trees in one call, as `model.decoding.tree.best_first` does. ends: tokens behind which nothing is
    drafted; offered: (vocab,) those that logits are of, where not all.

    Or a fixed tree, of which `width` must hold all ranks; then without a sequential head, and whatever ends.
    """

    STRUCT = _Draft

    def __init__(
        self,
        width: int,
        ends: Collection[int],
        head: Sequential | None = None,
        fixed: FixedTree | None = None,
        offered: Tensor | None = None,
    ) -> None:
        assert 1 <= width <= MAX_WIDTH
        assert fixed is None or (head is None and fixed.width <= width)
        self.width, self.head = width, head
        self._ends, self._fixed = np.array(sorted(ends), np.int64), None
        self._offered = None if offered is None else offered.numpy().astype(np.int32)
        if fixed is not None:
            self._fixed = np.array((fixed.parents, fixed.ranks, fixed.depths), np.int32).T.copy()

    def most(self, block: int) -> int:
        """Nodes of a tree at most."""
        return block * self.width if self._fixed is None else len(self._fixed)

    def struct(self, *, block: int, vocab: int, logits: Tensor | None = None, contexts: Tensor | None = None) -> _Draft:
        head = self.head
        return _Draft(
            block=block,
            vocab=vocab,
            width=min(self.width, vocab),
            rank=0 if head is None else head.before.shape[1],
            logits=pointer(logits),
            contexts=pointer(contexts),
            before=None if head is None else pointer(head.before),
            state=None if head is None else pointer(head.state.packed),
            after=None if head is None else pointer(head.after.packed),
            fixed=pointer(self._fixed),
            ends=pointer(self._ends, np.int64),
            offered=pointer(self._offered),
            num_fixed=0 if self._fixed is None else len(self._fixed),
            num_ends=len(self._ends),
        )

    def grow(self, hidden: Tensor, logits: Tensor, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """hidden: (batch, block, target_hidden), which only a sequential head looks at; logits: (batch, block, vocab);
        newest, budgets: (batch,) int64."""
        _, block, vocab = logits.shape
        logits = logits.contiguous()
        contexts = None if self.head is None else self.head.context(hidden)
        budgets = np.minimum(budgets, self.most(block))
        trees = roots(newest, 1 + int(budgets.max(initial=0)))
        draft = self.struct(block=block, vocab=vocab, logits=logits, contexts=contexts)
        arrays = TreeArrays.of(trees, budgets)
        bfloat16 = ctypes.c_bool(logits.dtype is torch.bfloat16)
        functions().flash_grow(bfloat16, ctypes.byref(draft), ctypes.byref(arrays))
        return trees
