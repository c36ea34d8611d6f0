"""Linear layers for serving: weights packed once, where the native library computes them. Not for training."""

from __future__ import annotations

from torch import Tensor, nn

from model.backends.native import library
from model.backends.native.library import PackedLinear


class Packed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(x)


def pack(module: nn.Module) -> None:
    """Replace every linear layer inside `module` that can be packed here."""
    for child in module.modules():
        for name, linear in list(child.named_children()):
            if type(linear) is nn.Linear and library.supports(linear.weight.dtype, linear.weight.device):
                setattr(child, name, Packed(linear))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of its weights, packed ones included."""
    packed = (part.matrix.packed.nbytes for part in module.modules() if isinstance(part, Packed))
    return sum(parameter.nbytes for parameter in module.parameters()) + sum(packed)
