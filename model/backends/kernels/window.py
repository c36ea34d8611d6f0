"""Says which keys the rows of a layer with a window, a ring or two-way blocks see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """The earlier positions that rows see, and where a cache keeps them that has no others.

    size: how many positions a row sees, itself included; depths: (batch or 1, rows) int64, how many positions after
    `starts` a row stands; ring: position p is stored at place p % ring, and those from `capacity` on behind the ring;
    None if all positions are stored in order.
    """

    size: int
    depths: Tensor
    ring: int | None = None
    capacity: int | None = None
