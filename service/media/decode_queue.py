"""Decide which file is decoded next. Knows nothing of processes or file formats.

A lane decodes one file at a time. Images and videos have separate lanes, and some lanes accept small images only, so
that large ones never occupy all. Waiting files are ordered by a rank that is fixed on arrival:

    rank = time of arrival + patience * share * files of the same client in the queue or in a lane

where `share` (0 to 1) is the file's size as a part of the largest allowed. So a small file overtakes large ones that
arrived up to `patience` seconds earlier, and a client with many files waits behind those with few. After `patience`
seconds a waiting file is refused; where too many wait, the last in order is refused at once.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from service.errors import NoCapacity
from service.media.sniff import Kind

MAX_CLIENT_FACTOR = 16  # clients behind one proxy look like one: the rank of a small file among hundreds must stay low


@dataclass(eq=False)
class Lane:
    """Decodes one file at a time, of these kinds and up to this share of the largest allowed."""

    kinds: frozenset[Kind]
    max_share: float = 1.0
    busy: bool = False

    def accepts(self, kind: Kind, share: float) -> bool:
        return kind in self.kinds and share <= self.max_share


@dataclass(order=True)
class _Waiting:
    rank: float
    number: int  # counts arrivals: equal ranks are served in this order
    kind: Kind = field(compare=False)
    share: float = field(compare=False)
    future: asyncio.Future[Lane] = field(compare=False)


def lanes(num_image: int, num_video: int) -> tuple[Lane, ...]:
    """Return the lanes of a decoder. With `num_video` 0, videos use the lanes of images.

    With two or more lanes for images, one accepts up to a quarter of the largest allowed image; with three or more,
    another up to a sixteenth.
    """
    kinds: frozenset[Kind] = frozenset({"image"} if num_video else {"image", "video"})
    small = (0.25, 1 / 16)[: num_image - 1]
    shares = [1.0] * (num_image - len(small)) + list(small)
    return (*(Lane(kinds, share) for share in shares), *(Lane(frozenset({"video"})) for _ in range(num_video)))


class DecodeQueue:
    """The lanes, and the files that wait for one."""

    def __init__(self, lanes: Sequence[Lane], *, patience: float, max_waiting: int) -> None:
        """patience: seconds that a file may wait."""
        self._lanes = sorted(lanes, key=lambda lane: lane.max_share)  # the narrowest that fits is used
        self._patience, self._max_waiting = patience, max_waiting
        self._waiting: list[_Waiting] = []  # ascending; no free lane accepts any of them
        self._by_client: Counter[str] = Counter()
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def lane(self, kind: Kind, share: float, client: str = "") -> AsyncIterator[None]:
        """Wait for a lane and occupy it within the context. Raises NoCapacity after too long or in a full queue."""
        self._by_client[client] += 1
        lane: Lane | None = None
        try:
            lane = self._occupy_free(kind, share) or await self._wait(kind, share, client)
            yield
        finally:
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
            if lane is not None:
                self._free(lane)

    def refuse_all(self, error: Callable[[], NoCapacity]) -> None:
        """End every wait with an error."""
        while self._waiting:
            self._refuse_last(error)

    def _occupy_free(self, kind: Kind, share: float) -> Lane | None:
        for lane in self._lanes:
            if not lane.busy and lane.accepts(kind, share):
                lane.busy = True
                return lane
        return None

    async def _wait(self, kind: Kind, share: float, client: str) -> Lane:
        """Queue for a lane by rank. Raises NoCapacity after `patience` seconds or in a full queue."""
        self._arrivals += 1
        weight = share * min(self._by_client[client], MAX_CLIENT_FACTOR)
        future: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(time.monotonic() + self._patience * weight, self._arrivals, kind, share, future)
        bisect.insort(self._waiting, waiting)
        if len(self._waiting) > self._max_waiting:
            self._refuse_last(_too_busy)
        try:
            async with asyncio.timeout(self._patience):
                return await future
        except BaseException as error:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not future.cancelled() and future.exception() is None:  # the lane came together with this error
                self._free(future.result())
            if isinstance(error, TimeoutError):
                raise _too_busy() from None
            raise

    def _refuse_last(self, error: Callable[[], NoCapacity]) -> None:
        future = self._waiting.pop().future
        if not future.done():
            future.set_exception(error())

    def _free(self, lane: Lane) -> None:
        """Free a lane, or pass it to the first waiting file that it accepts."""
        lane.busy = False
        for index, each in enumerate(self._waiting):
            if lane.accepts(each.kind, each.share) and not each.future.done():
                lane.busy = True
                del self._waiting[index]
                each.future.set_result(lane)
                return


def _too_busy() -> NoCapacity:
    return NoCapacity("too many images and videos wait to be decoded; try again soon", code="queue_full")
