"""Provides helpers that drafters share: exchanging slots, indexing by paths, and taking the last kept state."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor


def take_last(states: Tensor, rows: Tensor, counts: Tensor) -> None:
    """Replace states (batch, width), in place, by the last of the first counts (batch,) int64 rows of rows (batch,
    rows, width). Sequences with count 0 keep their state."""
    last = rows.gather(1, (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
    states.copy_(torch.where(counts[:, None] > 0, last, states))


def exchange_rows(rows: Tensor, one: int, other: int) -> None:
    """Exchange two rows of a tensor."""
    kept = rows[one].clone()
    rows[one], rows[other] = rows[other], kept


def exchange_items(by_slot: dict[int, Any], one: int, other: int) -> None:
    """Exchange the entries of two slots in a table, either of which may be missing."""
    found = {slot: by_slot.pop(slot) for slot in (one, other) if slot in by_slot}
    by_slot.update({one + other - slot: item for slot, item in found.items()})


def indexed(paths: Seq[list[int]], width: int) -> np.ndarray:
    """Convert paths to an array (batch, width) int32, padded with zeros."""
    index = np.zeros((len(paths), width), np.int32)
    for b, path in enumerate(paths):
        index[b, : len(path)] = path
    return index
