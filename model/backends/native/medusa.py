"""What medusa.h offers: the Medusa draft's pass, from hidden states to trees, in one call."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from model.backends.native.candidates import Candidates, TreeArrays
from model.backends.native.library import Matrix, Mirror, functions, pointer
from model.backends.native.step import Linear, Results, linear
from model.decoding.tree import Trees, roots


class _MedusaNetwork(Mirror):
    _fields_ = [
        ("norm", ctypes.c_void_p),
        *((n, Linear) for n in "heads head".split()),
        ("eps", ctypes.c_float),
        ("candidates", Candidates.STRUCT),
    ]


class MedusaStep:
    """norm: (hidden,); heads: hidden -> block * hidden, one below the other; head: from there to the tokens offered."""

    def __init__(self, norm: Tensor, heads: Matrix, head: Matrix, block: int, candidates: Candidates) -> None:
        self._norm, self._heads, self._head, self._candidates = norm.detach().contiguous(), heads, head, candidates
        self._most, self._block = candidates.most(block), block
        self._logits = Results(norm, head.outputs)
        self._bfloat16 = ctypes.c_bool(heads.dtype is torch.bfloat16)
        self._struct = _MedusaNetwork(
            pointer(self._norm),
            linear(heads),
            linear(head),
            1e-6,
            candidates.struct(block=block, vocab=head.outputs),
        )

    def observe(self, taps: Tensor, rows: list[int], last: Tensor, slots: list[int]) -> None:
        """Rows of taps (batch, num, hidden), counted through, go to those slots of last (slots, hidden). By memmove: to
        ask torch takes ten times as long."""
        taps, size = taps.contiguous(), last.shape[1] * last.itemsize
        source, target = taps.data_ptr(), last.data_ptr()
        for row, slot in zip(rows, slots, strict=True):
            ctypes.memmove(target + slot * size, source + row * size, size)

    def propose(self, last: Tensor, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """last: (batch, hidden); newest, budgets (batch,) int64. See `model.decoding.tree.best_first`."""
        trees = roots(newest, 1 + min(int(budgets.max()), self._most))
        logits = self._logits.of(len(newest), self._block)
        functions().flash_propose_medusa(
            self._bfloat16,
            ctypes.byref(self._struct),
            ctypes.c_void_p(last.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.byref(TreeArrays.of(trees, budgets)),
        )
        return trees
