"""What a round needs of a target and of a FLASH draft, described for step.h and its like."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.backends.native.candidates import Candidates, TreeArrays
from model.backends.native.library import K_STEP, Matrix, Mirror, functions, pointer
from model.backends.native.stack import Stack


class Linear(Mirror):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "packed bias".split()),
        *((n, ctypes.c_int32) for n in "inputs outputs".split()),
    ]


def linear(matrix: Matrix) -> Linear:
    """Whose rows lie one behind the other."""
    assert matrix.inputs % K_STEP == 0, "rows that are not of whole steps would be read into the next"
    return Linear(pointer(matrix.packed), pointer(matrix.bias), matrix.inputs, matrix.outputs)


class Verifier:
    """What a round needs of a target. embeddings: (vocab, hidden); all but the layers stays the caller's."""

    def __init__(self, stack: Stack, embeddings: Tensor, head: Matrix, num_axes: int = 1) -> None:
        assert embeddings.dtype is head.dtype is stack.dtype
        self.stack, self.head, self.num_axes = stack, head, num_axes
        self.embeddings = embeddings.detach().contiguous()


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


class _DraftNetwork(Mirror):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "stack entries masks entry_norm".split()),
        *((n, Linear) for n in "out head".split()),
        *((n, ctypes.c_void_p) for n in "tap_norms fuse_norm".split()),
        *((n, Linear) for n in "fuse feature context".split()),
        ("num_taps", ctypes.c_int32),
        ("candidates", Candidates.STRUCT),
    ]


class CacheArrays(Mirror):
    NAME = "Cache"
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in "layer_stride values_stride slot_stride head_stride".split()),
        ("lengths", ctypes.c_void_p),
    ]


class RoundArrays(Mirror):
    NAME = "Round"
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "target embeddings".split()),
        ("head", Linear),
        ("draft", ctypes.c_void_p),
        *((n, CacheArrays) for n in "target_cache draft_cache".split()),
        *((n, ctypes.c_int32) for n in "batch rows axes given".split()),
        *((n, ctypes.c_void_p) for n in "newest budgets roots".split()),
        ("trees", TreeArrays),
        *((n, ctypes.c_void_p) for n in "curve chance tried held".split()),
        *(
            (n, ctypes.c_void_p)
            for n in "counts positions paths accepted shown taps logits drafted tails chosen emitted".split()
        ),
        ("seconds", ctypes.c_void_p),
    ]


class DraftStep:
    """The FLASH draft's pass from newest tokens to trees, and its reading of what the target kept.

    entries: (vocab, hidden), masks: (block - 1, hidden): what enters the layers, with `feature` of the last row of the
    context; tap_norms: (taps, target's hidden). EAGLE's goes another way, with neither masks nor an entry_norm.
    """

    STRUCT = _DraftNetwork

    def __init__(
        self,
        stack: Stack,
        *,
        entries: Tensor,
        feature: Matrix,
        out: Matrix,
        head: Matrix,
        tap_norms: Tensor,
        fuse: Matrix,
        fuse_norm: Tensor,
        candidates: Candidates,
        masks: Tensor | None = None,
        entry_norm: Tensor | None = None,
    ) -> None:
        self.stack, self.out, self.head, self.fuse, self.feature = stack, out, head, fuse, feature
        self.block = 1 if masks is None else 1 + len(masks)
        self.most_nodes = candidates.most(self.block)
        given = (entries, masks, entry_norm, tap_norms, fuse_norm)
        tensors = [None if tensor is None else tensor.detach().contiguous() for tensor in given]
        self.candidates, self._kept, self._entries = candidates, tensors, entries
        self.struct = _DraftNetwork(
            ctypes.cast(ctypes.pointer(stack.struct), ctypes.c_void_p),
            *map(pointer, tensors[:3]),
            linear(out),
            linear(head),
            *map(pointer, tensors[3:]),
            linear(fuse),
            linear(feature),
            Linear() if candidates.head is None else linear(candidates.head.context),
            len(tap_norms),
            candidates.struct(block=self.block, vocab=head.outputs),
        )

    @property
    def num_bytes(self) -> int:
        """Of the table of what tokens put into it, which it alone holds."""
        return self._entries.nbytes

    def fused(self, taps: Tensor) -> Tensor:
        """(rows, taps * hidden) -> context (rows, hidden)."""
        taps = taps.contiguous()
        context = taps.new_empty(len(taps), self.fuse.outputs)
        functions().flash_fuse(
            ctypes.c_bool(self.stack.dtype is torch.bfloat16),
            ctypes.byref(self.struct),
            ctypes.c_void_p(taps.data_ptr()),
            len(taps),
            ctypes.c_void_p(context.data_ptr()),
        )
        return context
