"""What step.h offers, as Python sees it: the parts of a decoding step that are one native call each.

The same as the engine's torch path would compute, in fewer pieces: between two of them only tokens are looked at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.attention import Rows
from model.kv_cache import KVCache
from model.native.candidates import Candidates, TreeArrays
from model.native.library import Matrix, functions, pointer
from model.native.stack import Stack
from model.tree import Trees, roots


class Linear(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "packed bias".split()),
        *((n, ctypes.c_int32) for n in "inputs outputs".split()),
    ]


def linear(matrix: Matrix) -> Linear:
    return Linear(pointer(matrix.packed), pointer(matrix.bias), matrix.inputs, matrix.outputs)


class Results:
    """Memory for what passes of changing shapes give, (batch, rows, width): made once, and good until the next pass."""

    def __init__(self, like: Tensor, width: int) -> None:
        self._memory, self._width = like.new_empty(0), width
        self._views: dict[tuple[int, int], Tensor] = {}

    def of(self, batch: int, rows: int) -> Tensor:
        view = self._views.get((batch, rows))
        if view is None:
            count = batch * rows * self._width
            if count > len(self._memory):
                self._memory = self._memory.new_empty(count)
                self._views.clear()
            self._views[batch, rows] = view = self._memory[:count].view(batch, rows, self._width)
        return view


class Verifier:
    """A target's pass over trees, from their tokens to its own answer at every node.

    embeddings: (vocab, hidden); all but the layers stays the caller's, and must outlive this.
    """

    def __init__(self, stack: Stack, embeddings: Tensor, head: Matrix) -> None:
        assert embeddings.dtype is head.dtype is stack.dtype
        self.stack, self.head = stack, head
        self._embeddings, self._head = embeddings.detach().contiguous(), linear(head)
        self._taps = Results(embeddings, stack.num_taps * stack.shape.hidden)
        self._logits = Results(embeddings, head.outputs)
        self._bfloat16 = ctypes.c_bool(stack.dtype is torch.bfloat16)

    def __call__(self, tokens: np.ndarray, positions: np.ndarray, rows: Rows) -> tuple[np.ndarray, Tensor, Tensor]:
        """tokens (batch, rows) int64, positions (axes, batch, rows) int32: the likeliest token behind each of them
        (batch, rows) int64, logits (batch, rows, vocab) and taps (batch, rows, num_taps * hidden).

        Rows that are not real stay unset; the next call uses the same memory.
        """
        stack, batch, num = self.stack, rows.batch, rows.num
        taps, logits = self._taps.of(batch, num), self._logits.of(batch, num)
        chosen = np.zeros(tokens.shape, np.int64)
        functions().flash_verify(
            self._bfloat16,
            ctypes.byref(stack.struct),
            ctypes.byref(stack.described(rows, positions)),
            ctypes.c_void_p(self._embeddings.data_ptr()),
            ctypes.c_void_p(pointer(tokens, np.int64)),
            ctypes.byref(self._head),
            ctypes.c_void_p(taps.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_void_p(pointer(chosen, np.int64)),
        )
        return chosen, logits, taps


class _DraftNetwork(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "stack entries masks".split()),
        *((n, Linear) for n in "out head".split()),
        *((n, ctypes.c_void_p) for n in "tap_norms fuse_norm".split()),
        ("fuse", Linear),
        ("num_taps", ctypes.c_int32),
        ("candidates", Candidates.STRUCT),
    ]


class DraftStep:
    """The FLASH draft's pass from newest tokens to trees, and its reading of what the target kept.

    entries: (vocab, hidden), masks: (block - 1, hidden): what enters the layers; tap_norms: (taps, target's hidden).
    """

    STRUCT = _DraftNetwork

    def __init__(
        self,
        stack: Stack,
        *,
        entries: Tensor,
        masks: Tensor,
        out: Matrix,
        head: Matrix,
        tap_norms: Tensor,
        fuse: Matrix,
        fuse_norm: Tensor,
        candidates: Candidates,
    ) -> None:
        self.stack, self.out, self.head, self.fuse = stack, out, head, fuse
        self._most = candidates.most(block := len(masks) + 1)
        tensors = [tensor.detach().contiguous() for tensor in (entries, masks, tap_norms, fuse_norm)]
        self._logits = Results(entries, head.outputs)
        self.candidates, self._kept = candidates, tensors
        self.struct = _DraftNetwork(
            ctypes.cast(ctypes.pointer(stack.struct), ctypes.c_void_p),
            pointer(tensors[0]),
            pointer(tensors[1]),
            linear(out),
            linear(head),
            pointer(tensors[2]),
            pointer(tensors[3]),
            linear(fuse),
            len(tap_norms),
            candidates.struct(block=block, vocab=head.outputs),
        )
        self._bfloat16 = ctypes.c_bool(stack.dtype is torch.bfloat16)

    def propose(self, newest: np.ndarray, budgets: np.ndarray, rows: Rows) -> tuple[Trees, Tensor]:
        """newest, budgets (batch,) int64; rows: a block for each that drafts. See `model.tree.best_first`; its logits
        (batch, block, vocab) too, unset for those that do not draft, and good until the next call."""
        logits = self._logits.of(rows.batch, rows.num)
        trees = roots(newest, 1 + min(int(budgets.max()), self._most))
        functions().flash_propose(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.byref(TreeArrays.of(trees, budgets)),
        )
        return trees, logits

    def fused(self, taps: Tensor) -> Tensor:
        """(rows, taps * hidden) -> context (rows, hidden)."""
        taps = taps.contiguous()
        context = taps.new_empty(len(taps), self.fuse.outputs)
        functions().flash_fuse(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.c_void_p(taps.data_ptr()),
            len(taps),
            ctypes.c_void_p(context.data_ptr()),
        )
        return context

    def observe(self, taps: Tensor, paths: np.ndarray, rows: Rows) -> None:
        """taps (batch, num, taps * hidden); paths (batch, rows) int32: which of them become context, in order."""
        functions().flash_observe(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            ctypes.c_void_p(taps.data_ptr()),
            taps.shape[1],
            ctypes.c_void_p(pointer(paths)),
        )


def tree_seconds() -> float:
    """What `DraftStep.propose` has spent on trees so far."""
    return float(functions().flash_tree_seconds())


def move(cache: KVCache, moves: Seq[tuple[int, int, int]]) -> None:
    """In every layer and head of a slot, the row at one position goes to another: (slot, from, to), in order."""
    data = cache.data
    strides = np.array(cache.strides, np.int64) * data.itemsize
    listed = np.array(moves, np.int32)
    functions().flash_move(
        ctypes.c_void_p(cache.address),
        data.shape[0],
        data.shape[3],
        ctypes.c_void_p(pointer(strides, np.int64)),
        ctypes.c_long(data.shape[-1] * data.itemsize),
        ctypes.c_void_p(pointer(listed)),
        len(listed),
    )
