"""Limit the number of connections: close the one that has waited longest, and raise the limit on file descriptors.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Protocol

log = logging.getLogger("flashserve")

MAX_DESCRIPTORS = 65_536  # enough; some systems have no limit
OTHER_DESCRIPTORS = 256  # for workers, media children, files and fetches
LOG_INTERVAL = 10.0  # seconds between two log lines


class Connection(Protocol):
    transport: asyncio.Transport


class Connections:
    """The connections that wait for their client to send a request or to read a response, the longest wait first."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._waiting: dict[Connection, None] = {}
        self._num_closed = 0  # since the last log line
        self._logged_at = float("-inf")

    def mark_waiting(self, connection: Connection) -> None:
        self._waiting[connection] = None

    def mark_active(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def make_room(self, new: Connection) -> bool:
        """Close the connection, other than the new one, that has waited longest; return whether there is one."""
        longest = next((one for one in self._waiting if one is not new), None)
        if longest is not None:
            self.mark_active(longest)
            if longest.transport.get_write_buffer_size():  # close() would wait for the client again
                longest.transport.abort()
            else:
                longest.transport.close()
        self._log(longest is not None)
        return longest is not None

    def _log(self, closed: bool) -> None:
        """Log that the limit is reached, at most once per LOG_INTERVAL."""
        self._num_closed += closed
        if (now := time.monotonic()) < self._logged_at + LOG_INTERVAL:
            return
        log.warning(
            "there are %d connections, the maximum (--max-connections, and the limit on open files): closed %d that "
            "waited for their clients%s",
            *(self.maximum, self._num_closed, "" if closed else ", and refused new ones when none waited"),
        )
        self._logged_at, self._num_closed = now, 0


def raise_descriptor_limit(max_connections: int) -> int:
    """Raise the soft limit on open files; return how many connections then fit, up to `max_connections`."""
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
