"""What a round needs of a target and of a FLASH draft, described for step.h and its like."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata
from model.backends.native import structures
from model.backends.native.candidates import Candidates, described_trees
from model.backends.native.library import PackedLinear, constant, functions, pointer
from model.backends.native.stack import Stack
from model.decoding.tree import Trees, roots


def described_linear(linear: PackedLinear) -> structures.Linear:
    """Describe a linear layer whose input rows lie one behind the other."""
    assert linear.inputs % constant("K_STEP") == 0, "rows that are not of whole steps would be read into the next"
    return structures.Linear(pointer(linear.packed), pointer(linear.bias), linear.inputs, linear.outputs)


class Verifier:
    """What a round needs of a target. embeddings: (vocab, hidden), each multiplied by embedding_scale; all but the
    layers stays the caller's."""

    def __init__(
        self, stack: Stack, embeddings: Tensor, head: PackedLinear, num_axes: int = 1, embedding_scale: float = 1.0
    ) -> None:
        assert embeddings.dtype is head.dtype is stack.dtype
        assert num_axes >= stack.num_axes
        self.stack, self.head, self.num_axes, self.embedding_scale = stack, head, num_axes, embedding_scale
        self.embeddings = embeddings.detach().contiguous()


class DraftStep:
    """The FLASH draft's pass from newest tokens to trees, and its reading of what the target kept.

    embeddings: (vocab, target's hidden), the target's, which times embedding_scale `embed` maps to the draft's width;
    token_table: (vocab,
    hidden), what `embed` would give, or None where that would be too large; masks: (block - 1, hidden); input_norm:
    (hidden,); aux_norms: (num_aux, target's hidden).
    """

    def __init__(
        self,
        stack: Stack,
        *,
        token_table: Tensor | None,
        embeddings: Tensor,
        embedding_scale: float = 1.0,
        masks: Tensor,
        input_norm: Tensor,
        embed: PackedLinear,
        feature: PackedLinear,
        out: PackedLinear,
        head: PackedLinear,
        aux_norms: Tensor,
        fuse: PackedLinear,
        fuse_norm: Tensor,
        candidates: Candidates,
    ) -> None:
        self.stack, self.out, self.head, self.fuse, self.embed, self.feature = stack, out, head, fuse, embed, feature
        self.block = 1 + len(masks)
        self.most_nodes = candidates.most(self.block)
        self.candidates, self._token_table = candidates, token_table
        self._kept: list[Tensor] = []  # whatever the library holds pointers to
        self.struct = structures.DraftNetwork(
            stack=ctypes.pointer(stack.struct),
            token_table=None if token_table is None else self._keep(token_table),
            embeddings=self._keep(embeddings),
            masks=self._keep(masks),
            input_norm=self._keep(input_norm),
            embed=described_linear(embed),
            out=described_linear(out),
            head=described_linear(head),
            aux_norms=self._keep(aux_norms),
            fuse_norm=self._keep(fuse_norm),
            fuse=described_linear(fuse),
            feature=described_linear(feature),
            context=structures.Linear() if candidates.head is None else described_linear(candidates.head.context),
            num_aux=len(aux_norms),
            embedding_scale=embedding_scale,
            candidates=candidates.struct(block=self.block, vocab=head.outputs),
        )
        self._bfloat16 = stack.dtype is torch.bfloat16

    def _keep(self, tensor: Tensor) -> int | None:
        self._kept.append(tensor.detach().contiguous())
        return pointer(self._kept[-1])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the table of token inputs, which this object owns alone."""
        return 0 if self._token_table is None else self._token_table.nbytes

    def propose(
        self, newest: np.ndarray, budgets: np.ndarray, rows: AttentionMetadata, last_context: Tensor
    ) -> tuple[Trees, Tensor]:
        """Draft a block behind the newest token of each slot, and grow a tree from it.

        newest, budgets: (batch,) int64; rows: the block's, none where a slot does not draft; last_context: (slots,
        hidden), the last row of each context. Returns the trees, and the logits that they are grown from (batch, block,
        vocab).
        """
        trees = roots(newest, 1 + min(int(budgets.max()), self.most_nodes))
        logits = last_context.new_empty(len(newest), self.block, self.head.outputs)
        functions().flash_propose(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            last_context.data_ptr(),
            logits.data_ptr(),
            ctypes.byref(described_trees(trees, budgets)),
        )
        return trees, logits

    def observe(self, aux: Tensor, paths: np.ndarray, rows: AttentionMetadata, last_context: Tensor) -> None:
        """Add what the target kept to each context.

        aux: (batch, num, num_aux * target's hidden), its auxiliary hidden states; paths: (batch, num) int32, which of
        those rows were kept, in order; rows: how many they are, and where they go; last_context: (slots, hidden), is
        brought up to date.
        """
        assert paths.shape == aux.shape[:2]
        aux = aux.contiguous()
        functions().flash_observe(
            self._bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.stack.described(rows, None)),
            aux.data_ptr(),
            aux.shape[1],
            pointer(paths),
            last_context.data_ptr(),
        )

    def fused(self, aux: Tensor) -> Tensor:
        """Fuse the target's auxiliary hidden states (rows, num_aux * hidden) into context rows (rows, hidden)."""
        aux = aux.contiguous()
        context = aux.new_empty(len(aux), self.fuse.outputs)
        functions().flash_fuse(
            self._bfloat16,
            ctypes.byref(self.struct),
            aux.data_ptr(),
            len(aux),
            context.data_ptr(),
        )
        return context
