"""What a round needs of a target and of a FLASH draft, described for step.h and its like."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata
from model.backends.native.candidates import Candidates, TreeArrays
from model.backends.native.library import K_STEP, Matrix, Mirror, functions, pointer
from model.backends.native.stack import Stack
from model.decoding.tree import Trees, roots


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


class _DraftNetwork(Mirror):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "stack token_table embeddings masks input_norm".split()),
        *((n, Linear) for n in "embed out head".split()),
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
        *((n, ctypes.c_int32) for n in "batch rows axes from_outside".split()),
        *((n, ctypes.c_void_p) for n in "newest budgets roots".split()),
        ("trees", TreeArrays),
        *((n, ctypes.c_void_p) for n in "curve chance tried hits".split()),
        *(
            (n, ctypes.c_void_p)
            for n in "counts positions paths accepted shown taps logits drafted tails chosen emitted".split()
        ),
        ("seconds", ctypes.c_void_p),
    ]


class DraftStep:
    """The FLASH draft's pass from newest tokens to trees, and its reading of what the target kept.

    embeddings: (vocab, target's hidden), the target's, which `embed` maps to the draft's width; token_table: (vocab,
    hidden), what `embed` would give, or None where that would be too large; masks: (block - 1, hidden); input_norm:
    (hidden,); tap_norms: (taps, target's hidden).
    """

    STRUCT = _DraftNetwork

    def __init__(
        self,
        stack: Stack,
        *,
        token_table: Tensor | None,
        embeddings: Tensor,
        masks: Tensor,
        input_norm: Tensor,
        embed: Matrix,
        feature: Matrix,
        out: Matrix,
        head: Matrix,
        tap_norms: Tensor,
        fuse: Matrix,
        fuse_norm: Tensor,
        candidates: Candidates,
    ) -> None:
        self.stack, self.out, self.head, self.fuse, self.embed, self.feature = stack, out, head, fuse, embed, feature
        self.block = 1 + len(masks)
        self.most_nodes = candidates.most(self.block)
        self.candidates, self._token_table = candidates, token_table
        self._kept: list[Tensor] = []  # whatever the library holds pointers to
        self.struct = _DraftNetwork(
            stack=ctypes.cast(ctypes.pointer(stack.struct), ctypes.c_void_p),
            token_table=None if token_table is None else self._keep(token_table),
            embeddings=self._keep(embeddings),
            masks=self._keep(masks),
            input_norm=self._keep(input_norm),
            embed=linear(embed),
            out=linear(out),
            head=linear(head),
            tap_norms=self._keep(tap_norms),
            fuse_norm=self._keep(fuse_norm),
            fuse=linear(fuse),
            feature=linear(feature),
            context=Linear() if candidates.head is None else linear(candidates.head.context),
            num_taps=len(tap_norms),
            candidates=candidates.struct(block=self.block, vocab=head.outputs),
        )
        self._bfloat16 = ctypes.c_bool(stack.dtype is torch.bfloat16)

    def _keep(self, tensor: Tensor) -> int | None:
        self._kept.append(tensor.detach().contiguous())
        return pointer(self._kept[-1])

    @property
    def num_bytes(self) -> int:
        """Of the table of what tokens put into it, which it alone holds."""
        return 0 if self._token_table is None else self._token_table.nbytes

    def propose(
        self, newest: np.ndarray, budgets: np.ndarray, rows: AttentionMetadata, tails: Tensor
    ) -> tuple[Trees, Tensor]:
        """Draft a block behind the newest token of each slot, and grow a tree from it.

        newest, budgets: (batch,) int64; rows: the block's, none where a slot does not draft; tails: (slots, hidden),
        the last row of each context. Returns the trees, and the logits (batch, block, vocab) they are grown from.
        """
        trees = roots(newest, 1 + min(int(budgets.max()), self.most_nodes))
        logits = tails.new_empty(len(newest), self.block, self.head.outputs)
        functions().flash_propose(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            ctypes.c_void_p(tails.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.byref(TreeArrays.of(trees, budgets)),
        )
        return trees, logits

    def observe(self, taps: Tensor, paths: np.ndarray, rows: AttentionMetadata, tails: Tensor) -> None:
        """Add what the target kept to each context.

        taps: (batch, num, taps * target's hidden); paths: (batch, num) int32, which of those rows were kept, in order;
        rows: how many they are, and where they go; tails: (slots, hidden), brought up to date.
        """
        assert paths.shape == taps.shape[:2]
        taps = taps.contiguous()
        functions().flash_observe(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            ctypes.c_void_p(taps.data_ptr()),
            taps.shape[1],
            ctypes.c_void_p(pointer(paths)),
            ctypes.c_void_p(tails.data_ptr()),
        )

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
