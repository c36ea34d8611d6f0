"""Provides the output head (lm_head) that a target and its draft share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.backends.native import library
from model.backends.native.library import PackedLinear


class Head:
    """Applies lm_head, for all tokens or a subset: (..., hidden) -> (..., tokens). Differentiable in `hidden`, since
    drafts are trained through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack the weights if the native library can. weight: (tokens, hidden); bias: (tokens,)."""
        self._weight, self._bias = weight, bias
        self.matrix = PackedLinear(weight, bias) if library.supports(weight.dtype, weight.device) else None

    def of(self, tokens: Tensor | None) -> Head:
        """Return a head for these tokens (num,), in their order; None: this head."""
        if tokens is None:
            return self
        return Head(self._weight[tokens], None if self._bias is None else self._bias[tokens])

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the packed weights, which are stored beside the original ones."""
        return 0 if self.matrix is None else self.matrix.packed.nbytes

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its weights."""
        return self._weight.nbytes + self.packed_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.matrix is None or hidden.requires_grad:  # packed weights have no gradient
            return F.linear(hidden, self._weight, self._bias)
        return self.matrix(hidden)
