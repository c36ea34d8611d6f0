"""What eagle.h offers: the EAGLE draft's tree, grown by a pass per depth in one call, and its reading of what was
kept."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import Rows
from model.backends.native.candidates import TreeArrays
from model.backends.native.library import functions, pointer
from model.backends.native.step import DraftStep
from model.decoding.tree import Trees, roots


class EagleStep:
    """draft: the network around its one layer, without masks; block: how deep trees become."""

    def __init__(self, draft: DraftStep, block: int) -> None:
        self._draft, self._struct = draft, draft.struct
        self._most = draft.candidates.most(block)
        self._struct.candidates.block = block
        self._bfloat16 = ctypes.c_bool(draft.stack.dtype is torch.bfloat16)

    def fused(self, taps: Tensor) -> Tensor:
        """(rows, taps * hidden) -> features (rows, hidden)."""
        return self._draft.fused(taps)

    def propose(self, newest: np.ndarray, budgets: np.ndarray, rows: Rows, pending: Tensor) -> Trees:
        """newest, budgets (batch,) int64; rows: where a sequence's next row would be; pending (slots, hidden): the
        feature of its last kept position."""
        trees = roots(newest, 1 + min(int(budgets.max()), self._most))
        functions().flash_propose_eagle(
            self._bfloat16,
            ctypes.byref(self._struct),
            ctypes.byref(self._draft.stack.described(rows, None)),
            ctypes.c_void_p(pending.data_ptr()),
            ctypes.byref(TreeArrays.of(trees, budgets)),
        )
        return trees

    def observe(self, tokens: np.ndarray, taps: Tensor, paths: np.ndarray, rows: Rows, pending: Tensor) -> None:
        """tokens (batch, num) int64; taps (batch, num, taps * hidden); paths (batch, rows) int32: which of them were
        kept, in order; pending (slots, hidden) is brought up to date."""
        functions().flash_observe_eagle(
            self._bfloat16,
            ctypes.byref(self._struct),
            ctypes.byref(self._draft.stack.described(rows, None)),
            ctypes.c_void_p(taps.data_ptr()),
            taps.shape[1],
            ctypes.c_void_p(pointer(paths)),
            ctypes.c_void_p(pointer(tokens, np.int64)),
            ctypes.c_void_p(pending.data_ptr()),
        )
