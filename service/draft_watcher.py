"""Watch a folder and serve each new draft that is written there.

Writing a draft may take a while, so it is loaded only after two checks in a row see the same sizes and times of both
files; and only once, refused or not, until they change again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.errors import NoCapacity, ServiceError
from service.pool.drafts import FILES

log = logging.getLogger("flashserve")

Fingerprint = tuple[tuple[int, int, int], ...]  # inode, bytes, nanoseconds of each file


def fingerprint(folder: str) -> Fingerprint | None:
    """Identify the draft in a folder by its files' metadata, or return None where a file is missing."""
    try:
        stats = [(Path(folder) / name).stat() for name in FILES]
    except OSError:
        return None
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)


class DraftWatcher:
    """Checks a folder periodically; assumes that the draft in it at the start is the served one."""

    def __init__(self, folder: str, interval: float, change: Callable[[str], Awaitable[object]]) -> None:
        """interval: seconds between checks; change: loads the draft in the folder, or raises ServiceError."""
        self._folder, self._interval, self._change = folder, interval, change
        self._handled = self._previous = fingerprint(folder)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.check()

    async def check(self) -> None:
        """Load the draft in the folder if it is new and complete."""
        current = await asyncio.to_thread(fingerprint, self._folder)  # slow on network file systems
        if current is not None and current == self._previous and current != self._handled:
            try:
                await self._change(self._folder)
                self._handled = current
            except NoCapacity:
                pass  # no worker is up at the moment: try again at the next check
            except ServiceError as error:
                self._handled = current
                log.warning("the draft in %s is refused, the old one stays: %s", self._folder, error.message)
            except Exception:  # a bug; the watcher continues
                self._handled = current
                log.exception("the draft in %s could not be loaded", self._folder)
        self._previous = current
