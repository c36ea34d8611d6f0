"""Memory that the service shares with its workers: pixels are written into it once, and only their place is sent.

The service alone gives it out, piece by piece, and has a piece back when nobody holds its array any more. Workers read,
and copy what they read: what a request leaves behind may soon be another's.
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
KEPT = 32 << 20  # bytes at its front that it keeps, filled or not: to have them from the system takes time


class Arena:
    """num_bytes of it are taken from the system only where something is put, and beyond KEPT given back thereafter."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError where there is no such memory, AttributeError where the system has none of this kind."""
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("flashserve-media", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        self._memory = mmap.mmap(self.fd, num_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = [(0, num_bytes)]  # pieces, ascending, no two of them neighbours
        self._returned: deque[tuple[int, int]] = deque()  # from wherever an array ended, any thread

    def take(self, num_bytes: int) -> np.ndarray | None:
        """(num_bytes,) uint8, whatever it holds; None where there is no room."""
        while self._returned:
            self._join(*self._returned.popleft())
        wanted = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        for number, (start, end) in enumerate(self._free):
            if end - start >= wanted:
                self._free[number : number + 1] = [(start + wanted, end)] if end - start > wanted else []
                piece: Any = (ctypes.c_uint8 * num_bytes).from_buffer(self._memory, start)
                weakref.finalize(piece, self._returned.append, (start, start + wanted)).atexit = False
                array: np.ndarray = np.frombuffer(piece, np.uint8)
                return array
        return None

    def place_of(self, array: np.ndarray) -> int | None:
        """Where in it an array begins that lies in it, whole and in order; None of any other."""
        at = array.ctypes.data - self._address
        inside = 0 <= at and at + array.nbytes <= self.num_bytes
        return at if inside and array.flags.c_contiguous else None

    def _join(self, start: int, end: int) -> None:
        beyond = max(start, KEPT)
        if beyond < end:
            with contextlib.suppress(AttributeError, OSError):  # where there is no such call it stays taken
                self._memory.madvise(mmap.MADV_REMOVE, beyond, end - beyond)
        at = bisect.bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
            at -= 1
        self._free.insert(at, (start, end))


class Shared:
    """The same, in a worker."""

    def __init__(self, fd: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
        os.close(fd)

    def read(self, at: int, num_bytes: int) -> np.ndarray:
        """A copy."""
        if not 0 <= at <= at + num_bytes <= len(self._memory):
            raise ValueError(f"{num_bytes} bytes at {at} are outside of the shared memory")
        return self._memory[at : at + num_bytes].copy()
