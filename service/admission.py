"""How many requests may be inside at once. The slot comes first: before the body, before any media, before any work.

Knows nothing of what a request is for; counts engine requests, so one with n choices takes n slots.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from service.errors import KeyLimit, NoCapacity


class Slots:
    """What one client request holds; `release` may be called any number of times."""

    def __init__(self, admission: Admission, key: str | None) -> None:
        self._admission = admission
        self._key = key
        self._held = 0

    def take(self, number: int) -> None:
        self._admission.take(number, self._key)
        self._held += number

    def give_back(self, number: int) -> None:
        self._admission.give_back(number, self._key)
        self._held -= number

    def release(self) -> None:
        self.give_back(self._held)


class Admission:
    def __init__(
        self, capacity: Callable[[], int], closed_because: Callable[[], NoCapacity | None], per_key: int | None
    ) -> None:
        """`capacity`: requests that may be inside now; `closed_because`: why none may enter at all, if so."""
        self.in_use = 0
        self._capacity = capacity
        self._closed_because = closed_because
        self._per_key = per_key
        self._by_key: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self, key: str | None) -> Slots:
        """A slot for one request of that key's, or KeyLimit, or NoCapacity."""
        slots = Slots(self, key)
        slots.take(1)
        return slots

    def take(self, number: int, key: str | None) -> None:
        if (reason := self._closed_because()) is not None:
            raise reason
        if self.in_use + number > self._capacity():
            raise NoCapacity("all places are taken and the queue is full; try again soon", code="queue_full")
        if key is not None and self._per_key is not None and self._by_key[key] + number > self._per_key:
            raise KeyLimit(f"this key may have {self._per_key} requests running; wait for one of them to end")
        self._change(number, key)

    def give_back(self, number: int, key: str | None) -> None:
        self._change(-number, key)

    async def emptied(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    def _change(self, number: int, key: str | None) -> None:
        self.in_use += number
        if self.in_use < 0:
            raise AssertionError("a slot was given back twice")
        if key is not None:
            self._by_key[key] += number
        (self._empty.clear if self.in_use else self._empty.set)()
