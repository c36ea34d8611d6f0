"""Allocates memory that every step reads from end to end, in huge pages if the system has them.

A step reads all weights once, megabytes in less than a millisecond. With pages of 4 KiB a processor has to translate
thousands of addresses, more than it caches, and scattered pages evict each other from its caches. Linux provides pages
of 2 MiB on request if `transparent_hugepage` is `madvise` or `always`. Elsewhere this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
ALIGNED = 64  # bytes: a cache line, and a vector of the native kernels
SHARED = 4 << 20  # bytes of a block that small tensors share


class _Bytes:
    """A block of memory, handed out from the front. It is freed with the last tensor in it."""

    def __init__(self, size: int) -> None:
        """Map `size` bytes, aligned to a huge page."""
        mapped = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or no huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        everything = torch.frombuffer(mapped, dtype=torch.uint8)  # it and all its views keep `mapped` alive
        start = -everything.data_ptr() % PAGE
        self._left = everything[start : start + size]

    def take(self, size: int) -> Tensor | None:
        """Hand out the next `size` bytes; None if fewer are left."""
        if size > len(self._left):
            return None
        block, self._left = self._left[:size], self._left[-(-size // ALIGNED) * ALIGNED :]
        return block


_shared = _Bytes(0)  # the block that new small tensors share
_one_at_a_time = threading.Lock()


def zeros(numbers: int, dtype: torch.dtype) -> Tensor:
    """Allocate (numbers,) zeros on the CPU.

    Nothing is written: the system provides zeroed pages, which take memory only once they are written to. No bytes are
    handed out twice.
    """
    global _shared  # noqa: PLW0603
    size = numbers * dtype.itemsize
    with _one_at_a_time:
        block = _Bytes(size).take(size) if size >= SHARED else _shared.take(size)
        if block is None:
            _shared = _Bytes(SHARED)
            block = _shared.take(size)
    assert block is not None
    return block.view(dtype)
