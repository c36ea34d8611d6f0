"""How many connections there may be, which of them goes where there are too many, and the descriptors they take.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Protocol

log = logging.getLogger("flashserve")

MAX_DESCRIPTORS = 65_536  # more is never wanted, and some systems have no limit
OTHER_DESCRIPTORS = 256  # for workers, media children, files and what is fetched
QUIET = 10.0  # seconds between two lines of the log


class Connection(Protocol):
    transport: asyncio.Transport


class Connections:
    """Those that wait for their client, to send a request or to read an answer, the longest wait first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: dict[Connection, None] = {}
        self._num_closed = 0  # since the last line of the log
        self._logged = float("-inf")

    def waits(self, connection: Connection) -> None:
        self._waiting[connection] = None

    def goes_on(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def make_room(self, newcomer: Connection) -> bool:
        """Close the one that has waited longest; whether there is any but the newcomer."""
        longest = next((one for one in self._waiting if one is not newcomer), None)
        if longest is not None:
            self.goes_on(longest)
            if longest.transport.get_write_buffer_size():  # closing it would wait for its client once more
                longest.transport.abort()
            else:
                longest.transport.close()
        self._log(longest is not None)
        return longest is not None

    def _log(self, closed: bool) -> None:
        self._num_closed += closed
        if (now := time.monotonic()) < self._logged + QUIET:
            return
        log.warning(
            "there are %d connections, as many as may be (--max-connections, and the limit on open files): closed %d "
            "that waited for their clients%s",
            *(self.most, self._num_closed, "" if closed else ", and refused new ones where none did"),
        )
        self._logged, self._num_closed = now, 0


def raise_descriptor_limit(max_connections: int) -> int:
    """Let this process open as many files as it may; how many connections then fit, up to `max_connections`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    else:
        limit = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    fitting = max(limit - OTHER_DESCRIPTORS, limit // 2)
    if fitting < max_connections:
        log.warning("the limit of %d open files leaves room for %d connections (--max-connections)", limit, fitting)
    return min(fitting, max_connections)
