"""Limit how many requests run or wait at once.

A request asks for admission before its body is read, and is refused then if the service is full. It reserves capacity
once its body has arrived, before any media is loaded; uploads hold none. Counts engine requests, so one with n choices
reserves n. Knows nothing of what a request is for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from service.errors import ClientLimit, NoCapacity


class Reservation:
    """The capacity that one client request has reserved: none at first. `leave` may be called any number of times."""

    def __init__(self, admission: Admission, key: str | None) -> None:
        self._admission = admission
        self._key = key
        self._number = 0

    def add(self, number: int) -> None:
        """Reserve for so many engine requests. Raises ClientLimit or NoCapacity."""
        self._admission.reserve(number, self._key)
        self._number += number

    def release(self, number: int) -> None:
        self._admission.release(number, self._key)
        self._number -= number

    def leave(self) -> None:
        """Release everything; the request has ended."""
        self.release(self._number)
        self._admission.leave(self)


class Admission:
    """Counts engine requests, in all and per API key."""

    def __init__(
        self, capacity: Callable[[], int], unavailable_reason: Callable[[], NoCapacity | None], per_key: int | None
    ) -> None:
        """capacity: engine requests that may be admitted now; unavailable_reason: why none may be, else None."""
        self.in_use = 0
        self._capacity = capacity
        self._unavailable_reason = unavailable_reason
        self._per_key = per_key
        self._by_key: Counter[str] = Counter()
        self._admitted: set[Reservation] = set()  # uploads included, which have reserved nothing yet
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self, key: str | None) -> Reservation:
        """Admit a request if there is capacity for it now. Raises ClientLimit or NoCapacity."""
        if (reason := self._unavailable_reason()) is not None:
            raise reason
        self._check_room(1, key)
        reservation = Reservation(self, key)
        self._admitted.add(reservation)
        self._empty.clear()
        return reservation

    def reserve(self, number: int, key: str | None) -> None:
        """Reserve for an admitted request; it may continue even if the service has become unavailable since."""
        self._check_room(number, key)
        self._change(number, key)

    def release(self, number: int, key: str | None) -> None:
        self._change(-number, key)

    def leave(self, reservation: Reservation) -> None:
        self._admitted.discard(reservation)
        if not self._admitted:
            self._empty.set()

    async def wait_until_empty(self) -> None:
        """Wait until every admitted request has left, uploads included."""
        await self._empty.wait()

    def _check_room(self, number: int, key: str | None) -> None:
        if self.in_use + number > self._capacity():
            raise NoCapacity("the server and its queue are full; try again soon", code="queue_full")
        if key is not None and self._per_key is not None and self._by_key[key] + number > self._per_key:
            raise ClientLimit(f"this key may have {self._per_key} requests running; wait for one of them to end")

    def _change(self, number: int, key: str | None) -> None:
        self.in_use += number
        if self.in_use < 0:
            raise AssertionError("capacity was released twice")
        if key is not None:
            self._by_key[key] += number
