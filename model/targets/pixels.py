"""Converts frames of the right size to a tower's input, with the arithmetic of the checkpoint's image processor. It
uses a table over all byte values, since the processor takes longer than a tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def shades(processor: Any) -> Tensor:
    """Compute the table for a processor that rescales and normalises: (3, 256) float32, the result for each channel and
    byte."""
    mean, std = (torch.tensor(of, dtype=torch.float32)[:, None] for of in (processor.image_mean, processor.image_std))
    table: Tensor = (torch.arange(256.0) - mean / processor.rescale_factor) / (std / processor.rescale_factor)
    return table


def shown(frames: np.ndarray, table: Tensor) -> Tensor:
    """Convert frames to pixel values: (frames, height, width, 3) uint8 -> (frames, 3, height, width) float32."""
    bytes_ = torch.from_numpy(np.ascontiguousarray(frames)).long()
    return torch.stack([table[channel][bytes_[..., channel]] for channel in range(3)], 1)


def cut(pixels: Tensor, patch: int) -> Tensor:
    """Cut pixels into patches, ordered by channel, y and x: (frames, channels, height, width) -> (frames, patches,
    numbers)."""
    split = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # frames, c, down, y, across, x
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
