"""Shared memory for decoded media: the API process writes pixels once and sends workers only their offset.

The API process allocates blocks and gets a block back when its array is garbage-collected. Workers copy what they read,
because a block may be reused as soon as its request ends.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import weakref
from collections import deque
from typing import Any

import numpy as np

ALIGNMENT = 4096
RETAINED = 32 << 20  # bytes at the front that stay mapped when free: mapping them again takes time


class Arena:
    """Allocates blocks of one shared mapping. Pages beyond RETAINED go back to the system when they become free."""

    def __init__(self, num_bytes: int) -> None:
        """Map `num_bytes`. Raises OSError without enough memory, AttributeError without `memfd_create`."""
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("flashserve-media", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        self._memory = mmap.mmap(self.fd, num_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = [(0, num_bytes)]  # blocks, ascending, no two of them adjacent
        self._returned: deque[tuple[int, int]] = deque()  # blocks to free, appended by whichever thread drops an array

    def allocate(self, num_bytes: int) -> np.ndarray | None:
        """Return an uninitialised (num_bytes,) uint8 array, or None without room."""
        while self._returned:
            self._free_block(*self._returned.popleft())
        size = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        for number, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[number : number + 1] = [(start + size, end)] if end - start > size else []
                block: Any = (ctypes.c_uint8 * num_bytes).from_buffer(self._memory, start)
                weakref.finalize(block, self._returned.append, (start, start + size)).atexit = False
                array: np.ndarray = np.frombuffer(block, np.uint8)
                return array
        return None

    def offset_of(self, array: np.ndarray) -> int | None:
        """Return where a contiguous array begins in this arena, or None if it lies elsewhere."""
        at = array.ctypes.data - self._address
        inside = 0 <= at and at + array.nbytes <= self.num_bytes
        return at if inside and array.flags.c_contiguous else None

    def _free_block(self, start: int, end: int) -> None:
        """Unmap the pages of a block and merge it with its free neighbours."""
        beyond = max(start, RETAINED)
        if beyond < end:
            with contextlib.suppress(AttributeError, OSError):  # without MADV_REMOVE the pages stay mapped
                self._memory.madvise(mmap.MADV_REMOVE, beyond, end - beyond)
        at = bisect.bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
            at -= 1
        self._free.insert(at, (start, end))


class ArenaReader:
    """Reads an arena from a worker process."""

    def __init__(self, fd: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
        os.close(fd)

    def read(self, at: int, num_bytes: int) -> np.ndarray:
        """Copy `num_bytes` from offset `at`. Raises ValueError outside of the memory."""
        if not 0 <= at <= at + num_bytes <= len(self._memory):
            raise ValueError(f"bytes {at} to {at + num_bytes} are outside of the shared memory")
        return self._memory[at : at + num_bytes].copy()
