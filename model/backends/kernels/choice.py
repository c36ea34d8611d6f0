"""Chooses the attention kernel for a device. A kernel compiled on this machine is used only if it agrees with
torch's."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.backends.kernels.window import Window

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # maximum difference for values about 1

log = logging.getLogger(__name__)


class TreeAttention(Protocol):
    """Attends to a few rows of every slot: see tree_attention.py."""

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        visible: Tensor,
        scale: float | None = None,
        *,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return the result of `attention.attend`."""
        ...


class Options(NamedTuple):
    """What a layer asks of attention beyond plain attention. A kernel is compiled for every set of them.

    value_width: of values that are narrower than keys; window: it sees the last positions only; ring: those alone are
    stored.
    """

    value_width: int | None = None
    window: bool = False
    ring: bool = False
    softcap: bool = False
    sinks: bool = False


PLAIN = Options()


@cache
def tree_attention(
    dtype: torch.dtype, head_dim: int, device: torch.device, options: Options = PLAIN
) -> TreeAttention | None:
    """Return the kernel in tree_attention.py; None if there is no GPU, no Triton, or no agreement with torch."""
    if device.type != "cuda" or dtype not in TOLERANCE or find_spec("triton") is None:
        return None
    try:
        from model.backends.kernels.tree_attention import tree_attention as kernel

        off = max(disagreement(kernel, dtype, head_dim, device, rows, options) for rows in (1, 5, 40))
    except Exception as error:  # any error of the compiler: no C compiler, a driver too old, ...
        log.warning("attention runs through torch: the kernel does not compile here for %s: %s", options, error)
        return None
    if not off <= TOLERANCE[dtype]:
        log.warning("attention runs through torch: the kernel is off by %g here for %s", off, options)
        return None
    return kernel


def disagreement(
    kernel: TreeAttention,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    rows: int = 5,
    options: Options = PLAIN,
) -> float:
    """Return the largest difference from torch's attention, over slots of several lengths and random visible rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, num: int, width: int = head_dim) -> Tensor:
        """Return normally distributed numbers (4, heads, num, width)."""
        return torch.randn(4, heads, num, width, generator=generator).to(device, dtype)

    # One window begins with the last key of a block of 64; rows go beyond the capacity.
    positions, capacity, ring, size = 640, 602, 256, 90
    starts = torch.tensor([0, 61, 255, 600], device=device)
    queries, keys = normal(4, rows), normal(2, positions)
    values = normal(2, positions, options.value_width or head_dim)
    visible = (torch.rand(4, rows, rows, generator=generator) < 0.5).to(device) | torch.eye(rows, device=device).bool()
    depths = torch.randint(rows, (4, rows), generator=generator).to(device)
    depths[:, 0] = 0
    behind = torch.arange(positions, device=device) - starts[:, None]
    among = visible.gather(2, behind.clamp(0, rows - 1)[:, None].expand(-1, rows, -1)) & (behind < rows)[:, None]
    earlier = (behind < 0)[:, None].expand(-1, rows, -1)
    if options.window:
        earlier = earlier & (depths[..., None] - behind[:, None] < size)
    softcap = 1.5 if options.softcap else None
    sinks = torch.randn(4, generator=generator).to(device, dtype) if options.sinks else None
    theirs = _attention(queries, keys, values, (among & (behind >= 0)[:, None]) | earlier, softcap, sinks)
    if options.ring:
        keys, values = (_in_ring(both, (starts + rows).tolist(), ring, capacity) for both in (keys, values))
    window = Window(size, depths, *((ring, capacity) if options.ring else ())) if options.window else None
    ours = kernel(queries, keys, values, starts, visible, None, window=window, softcap=softcap, sinks=sinks)
    return float((ours.double() - theirs).abs().max())


def _in_ring(stored: Tensor, ends: list[int], ring: int, capacity: int) -> Tensor:
    """Return rows (batch, heads, positions, width) as a ring has them after positions up to `ends` were written."""
    places = torch.zeros_like(stored[:, :, : ring + stored.shape[2] - capacity])
    for slot, end in enumerate(ends):
        for position in range(max(0, min(end, capacity) - ring), end):
            place = position % ring if position < capacity else ring + position - capacity
            places[slot, :, place] = stored[slot, :, position]
    return places


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend in float64 where `allowed` (batch, rows, positions) says so."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (both.double().repeat_interleave(groups, 1) for both in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return weights @ values / total
