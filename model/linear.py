"""Linear layers for serving: weights packed once for oneDNN where that pays. Knows nothing of what they compute.

torch's own linear lays a bfloat16 weight out anew at every call, which for few rows costs more than the product itself.
Packed once, the product is faster, and a row's bits do not depend on how many rows it is computed with: so a token does
not depend on how it was drafted or batched.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Product(nn.Module):
    """One or several linear layers over the same input: (..., in) -> (..., sum of outs). Not for training."""

    def __init__(self, linears: Seq[nn.Linear]) -> None:
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.packed = None
        if packs(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = self.weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


def packs(weight: Tensor) -> bool:
    """In float32 the stock product is as fast and, for one row, faster."""
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()


def pack(module: nn.Module) -> None:
    """Replace every linear layer inside `module` whose weight packs."""
    for child in module.modules():
        for name, linear in list(child.named_children()):
            if type(linear) is nn.Linear and packs(linear.weight):
                setattr(child, name, Product([linear]))
