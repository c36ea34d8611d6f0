"""Chooses the attention kernel for a device. A kernel compiled on this machine is used only if it agrees with
torch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

TreeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float | None], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # maximum difference for values about 1

log = logging.getLogger(__name__)


@cache
def tree_attention(dtype: torch.dtype, head_dim: int, device: torch.device) -> TreeAttention | None:
    """Return the kernel in tree_attention.py; None if there is no GPU, no Triton, or no agreement with torch."""
    if device.type != "cuda" or dtype not in TOLERANCE or find_spec("triton") is None:
        return None
    try:
        from model.backends.kernels.tree_attention import tree_attention as kernel

        off = max(disagreement(kernel, dtype, head_dim, device, rows) for rows in (1, 5, 40))
    except Exception as error:  # any error of the compiler: no C compiler, a driver too old, ...
        log.warning("attention runs through torch: the kernel does not compile here: %s", error)
        return None
    if not off <= TOLERANCE[dtype]:
        log.warning("attention runs through torch: the kernel is off by %g here", off)
        return None
    return kernel


def disagreement(
    kernel: TreeAttention, dtype: torch.dtype, head_dim: int, device: torch.device, rows: int = 5
) -> float:
    """Return the largest difference from torch's attention, over slots of several lengths and random visible rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, num: int) -> Tensor:
        """Return normally distributed numbers (4, heads, num, head_dim)."""
        return torch.randn(4, heads, num, head_dim, generator=generator).to(device, dtype)

    positions = 640
    starts = torch.tensor([0, 61, 255, 600], device=device)
    queries, keys, values = normal(4, rows), normal(2, positions), normal(2, positions)
    visible = (torch.rand(4, rows, rows, generator=generator) < 0.5).to(device) | torch.eye(rows, device=device).bool()
    ours = kernel(queries, keys, values, starts, visible, None)
    behind = torch.arange(positions, device=device) - starts[:, None]
    among = visible.gather(2, behind.clamp(0, rows - 1)[:, None].expand(-1, rows, -1)) & (behind < rows)[:, None]
    allowed = among | (behind < 0)[:, None]
    wide_keys, wide_values = (x.double().repeat_interleave(2, 1) for x in (keys, values))
    theirs = F.scaled_dot_product_attention(queries.double(), wide_keys, wide_values, attn_mask=allowed[:, None])
    return float((ours.double() - theirs).abs().max())
