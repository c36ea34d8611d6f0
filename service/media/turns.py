"""Decides which file is decoded next, and where. Knows nothing of processes, nor of what a file is.

A place decodes one file at a time. Pictures and videos have places of their own, and some places take small pictures
only, so that there is always one which large ones do not occupy. Those who wait are ordered by a rank that is fixed on
arrival:

    rank = time of arrival + patience * share * files of the same client that are here

where `share` (0 to 1) is the part of the largest allowed file that this one is. So a small file overtakes large ones
that came up to `patience` seconds before it, a client with many files waits for those with few, and nobody is overtaken
for ever: after `patience` seconds a file that still waits is refused, and so is the last in order when too many wait.
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

MAX_CLIENT_FACTOR = 16  # clients behind one proxy look like one: a small file's rank must stay low among hundreds


@dataclass(eq=False)
class Place:
    """Takes files of these kinds, up to this share of the largest."""

    kinds: frozenset[Kind]
    max_share: float = 1.0
    busy: bool = False

    def fits(self, kind: Kind, share: float) -> bool:
        return kind in self.kinds and share <= self.max_share


@dataclass(order=True)
class _Waiting:
    rank: float
    number: int  # of arrival: equal ranks are served in that order
    kind: Kind = field(compare=False)
    share: float = field(compare=False)
    future: asyncio.Future[Place] = field(compare=False)


def places(num_image: int, num_video: int) -> tuple[Place, ...]:
    """The places of a pool: with two or more for images, one takes quarters of the largest allowed and less; with three
    or more, another takes sixteenths. `num_video` 0: videos use the places of images."""
    kinds: frozenset[Kind] = frozenset({"image"} if num_video else {"image", "video"})
    small = (0.25, 1 / 16)[: num_image - 1]
    shares = [1.0] * (num_image - len(small)) + list(small)
    return (*(Place(kinds, share) for share in shares), *(Place(frozenset({"video"})) for _ in range(num_video)))


class Turns:
    def __init__(self, places: Sequence[Place], *, patience: float, max_waiting: int) -> None:
        """patience: seconds that a file may wait."""
        self._places = sorted(places, key=lambda place: place.max_share)  # the narrowest that fits is taken
        self._patience, self._max_waiting = patience, max_waiting
        self._waiting: list[_Waiting] = []  # ascending; no free place fits any of them
        self._by_client: Counter[str] = Counter()
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, kind: Kind, share: float, client: str = "") -> AsyncIterator[None]:
        """Wait for a place and hold it. Raises NoCapacity where too many wait or it takes too long."""
        self._by_client[client] += 1
        place: Place | None = None
        try:
            place = self._take(kind, share) or await self._wait(kind, share, client)
            yield
        finally:
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
            if place is not None:
                self._free(place)

    def refuse_all(self, error: Callable[[], NoCapacity]) -> None:
        """End every wait with such an error."""
        while self._waiting:
            self._refuse_last(error)

    def _take(self, kind: Kind, share: float) -> Place | None:
        for place in self._places:
            if not place.busy and place.fits(kind, share):
                place.busy = True
                return place
        return None

    async def _wait(self, kind: Kind, share: float, client: str) -> Place:
        self._arrivals += 1
        weight = share * min(self._by_client[client], MAX_CLIENT_FACTOR)
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
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
            elif not future.cancelled() and future.exception() is None:  # it came as we were about to leave
                self._free(future.result())
            if isinstance(error, TimeoutError):
                raise _too_busy() from None
            raise

    def _refuse_last(self, error: Callable[[], NoCapacity]) -> None:
        future = self._waiting.pop().future
        if not future.done():
            future.set_exception(error())

    def _free(self, place: Place) -> None:
        """Pass the place on to the first in order that fits."""
        place.busy = False
        for index, each in enumerate(self._waiting):
            if place.fits(each.kind, each.share) and not each.future.done():
                place.busy = True
                del self._waiting[index]
                each.future.set_result(place)
                return


def _too_busy() -> NoCapacity:
    return NoCapacity("too many images and videos wait to be decoded; try again soon", code="queue_full")
