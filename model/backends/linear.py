"""Packs linear layers once for serving, if the native library computes them. Not for training."""

from __future__ import annotations

from torch import Tensor, nn

from model.backends.native import library
from model.backends.native.library import PackedLinear


class Packed(nn.Module):
    """A linear layer that the native library computes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., in features) -> (..., out features)."""
        return self.matrix(x)


def pack(module: nn.Module) -> None:
    """Replace, in place, each linear layer inside `module` that the native library supports by its packed form."""
    for child in module.modules():
        for name, linear in list(child.named_children()):
            if type(linear) is nn.Linear and library.supports(linear.weight.dtype, linear.weight.device):
                setattr(child, name, Packed(linear))


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of the module's weights, packed ones included."""
    packed = (part.matrix.packed.nbytes for part in module.modules() if isinstance(part, Packed))
    return sum(parameter.nbytes for parameter in module.parameters()) + sum(packed)
