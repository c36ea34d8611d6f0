"""A folder that is looked at now and then: a draft that was written there is taken once it is complete.

Whoever writes it may take a while: a draft is taken only if two looks, one after the other, find the same sizes and
times of both files, and only once, refused or not, until they change again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.errors import NoCapacity, ServiceError
from service.pool.drafts import FILES

log = logging.getLogger("flashserve")

Look = tuple[tuple[int, int, int], ...]  # inode, bytes, nanoseconds of each file


def look(folder: str) -> Look | None:
    """What can be told of the draft in it without reading; None where a file is missing."""
    try:
        found = [(Path(folder) / name).stat() for name in FILES]
    except OSError:
        return None
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


class Watch:
    def __init__(self, folder: str, interval: float, change: Callable[[str], Awaitable[object]]) -> None:
        """interval: seconds between looks; change: takes the folder, or raises ServiceError. What is there now is
        what is served."""
        self._folder, self._interval, self._change = folder, interval, change
        self._taken = self._before = look(folder)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.once()

    async def once(self) -> None:
        now = await asyncio.to_thread(look, self._folder)  # a network's folder may take its time
        if now is not None and now == self._before and now != self._taken:
            try:
                await self._change(self._folder)
                self._taken = now
            except NoCapacity:
                pass  # no worker at the moment: next time
            except ServiceError as error:
                self._taken = now
                log.warning("the draft in %s is not taken, the old one stays: %s", self._folder, error.message)
            except Exception:  # ours; the watch goes on
                self._taken = now
                log.exception("the draft in %s could not be taken", self._folder)
        self._before = now
