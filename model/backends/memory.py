"""Memory that every step reads from end to end, in huge pages where the system has them to give.

A step reads all weights once, megabytes in less than a millisecond. In pages of 4 KiB that is thousands of addresses
to be translated, more than a processor remembers, and pages scattered over memory push each other out of its caches.
Linux gives pages of 2 MiB to who asks, where `transparent_hugepage` is `madvise` or `always`; elsewhere this is
ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
ALIGNED = 64  # bytes: a cache line, and a vector of the native kernels
SHARED = 4 << 20  # bytes that small tensors share


class _Bytes:
    """Given out from the front; the system gets them back with the last tensor that lies in them."""

    def __init__(self, size: int) -> None:
        mapped = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # not Linux; or one without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        everything = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps `mapped`, as do all its views
        start = -everything.data_ptr() % PAGE
        self._left = everything[start : start + size]

    def take(self, size: int) -> Tensor | None:
        """None where that many are not left."""
        if size > len(self._left):
            return None
        block, self._left = self._left[:size], self._left[-(-size // ALIGNED) * ALIGNED :]
        return block


_shared = _Bytes(0)  # by the small tensors to come
_one_at_a_time = threading.Lock()


def zeros(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers,) zeros on the CPU. Nothing is written: pages come from the system as zeros, and only once something is
    written there do they take memory. No part is given out twice."""
    global _shared  # noqa: PLW0603
    size = numbers * dtype.itemsize
    with _one_at_a_time:
        block = _Bytes(size).take(size) if size >= SHARED else _shared.take(size)
        if block is None:
            _shared = _Bytes(SHARED)
            block = _shared.take(size)
    assert block is not None
    return block.view(dtype)
