"""Copies arrays to a device. Copies to a GPU go through pinned memory and do not block; copies back to the host do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the array as a host tensor that can be copied to `device` without blocking.

    Torch's allocator of pinned memory keeps a block until the copies out of it are over, so the tensor may be dropped
    at once.
    """
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy the array to `device`. On the CPU the tensor shares the array's memory."""
    return pinned(array, device).to(device, non_blocking=True)
