"""Arrays to a device and back. To a GPU they go through pinned memory and nobody waits; every way back is a wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor of the host, from which a copy to `device` need not be waited for.

    Torch's allocator of pinned memory keeps a block until the copies out of it are over, so it may be dropped at once.
    """
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on `device`; on the CPU it shares its memory."""
    return pinned(array, device).to(device, non_blocking=True)
