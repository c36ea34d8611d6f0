"""Candidate trees from a draft's logits, as candidates.h grows them: `model.decoding.tree.best_first`."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.backends.native import structures
from model.backends.native.library import PackedLinear, constant, functions, pointer
from model.decoding.tree import FixedTree, Trees, roots


def described_trees(trees: Trees, budgets: np.ndarray) -> structures.Trees:
    """Describe trees of roots alone, to be grown to at most budgets (batch,) int64 nodes beside them."""
    return structures.Trees(
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
    context: PackedLinear
    state: PackedLinear
    after: PackedLinear


class Candidates:
    """Grow best-first trees in one call, as `model.decoding.tree.best_first` does.

    width: nodes kept at each depth; eos_tokens: those behind which nothing is drafted; num_tokens: of the target's
    vocabulary; draft_vocab: (vocab,) tokens that logits are of, where not all. Or grow a fixed tree, of which `width`
    must hold all ranks; then without a sequential head, and whatever ends an answer.
    """

    def __init__(
        self,
        width: int,
        eos_tokens: Collection[int],
        num_tokens: int,
        head: Sequential | None = None,
        fixed: FixedTree | None = None,
        draft_vocab: Tensor | None = None,
    ) -> None:
        assert 1 <= width <= constant("MAX_WIDTH")
        assert head is None or head.before.shape[1] <= constant("MAX_RANK")
        assert fixed is None or (head is None and fixed.width <= width)
        self.width, self.head, self._num_tokens = width, head, num_tokens
        self._eos_tokens, self._fixed = np.array(sorted(eos_tokens), np.int64), None
        self._draft_vocab = None if draft_vocab is None else draft_vocab.numpy().astype(np.int32)
        if fixed is not None:
            self._fixed = np.array((fixed.parents, fixed.ranks, fixed.depths), np.int32).T.copy()

    def most(self, block: int) -> int:
        """How many nodes a tree has at most."""
        return block * self.width if self._fixed is None else len(self._fixed)

    def struct(
        self, *, block: int, vocab: int, logits: Tensor | None = None, contexts: Tensor | None = None
    ) -> structures.Draft:
        """Describe trees for the library that are grown from blocks of `block` tokens, of `vocab` each."""
        assert block <= constant("MAX_BLOCK")
        head = self.head
        return structures.Draft(
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
            eos_tokens=pointer(self._eos_tokens, np.int64),
            draft_vocab=pointer(self._draft_vocab),
            num_fixed=0 if self._fixed is None else len(self._fixed),
            num_eos=len(self._eos_tokens),
            num_tokens=self._num_tokens,
        )

    def grow(self, hidden: Tensor, logits: Tensor, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Grow a tree behind each newest token.

        hidden: (batch, block, target_hidden), which only a sequential head looks at; logits: (batch, block, vocab);
        newest, budgets: (batch,) int64.
        """
        _, block, vocab = logits.shape
        logits = logits.contiguous()
        contexts = None if self.head is None else self.head.context(hidden)
        budgets = np.minimum(budgets, self.most(block))
        trees = roots(newest, 1 + int(budgets.max(initial=0)))
        draft = self.struct(block=block, vocab=vocab, logits=logits, contexts=contexts)
        arrays = described_trees(trees, budgets)
        functions().flash_grow(logits.dtype is torch.bfloat16, ctypes.byref(draft), ctypes.byref(arrays))
        return trees
