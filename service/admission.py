"""How many requests may be inside at once. Each asks at the door, before its body is read, and is refused there where
the house is full; it takes its slots once the body is there, before any media and any work. An upload holds none.

Knows nothing of what a request is for; counts engine requests, so one with n choices takes n slots.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from service.errors import ClientLimit, NoCapacity


class Slots:
    """What one client request holds: nothing at first. `leave` may be called any number of times."""

    def __init__(self, admission: Admission, key: str | None) -> None:
        self._admission = admission
        self._key = key
        self._number = 0

    def take(self, number: int) -> None:
        self._admission.take(number, self._key)
        self._number += number

    def give_back(self, number: int) -> None:
        self._admission.give_back(number, self._key)
        self._number -= number

    def leave(self) -> None:
        self.give_back(self._number)
        self._admission.leave(self)


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
        self._visitors: set[Slots] = set()  # with slots or without
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self, key: str | None) -> Slots:
        """Let a request of that key's in where there is room for it now; raises ClientLimit or NoCapacity."""
        if (reason := self._closed_because()) is not None:
            raise reason
        self._check_room(1, key)
        slots = Slots(self, key)
        self._visitors.add(slots)
        self._empty.clear()
        return slots

    def take(self, number: int, key: str | None) -> None:
        """For one that is inside, and may go on though nobody else may enter any more."""
        self._check_room(number, key)
        self._change(number, key)

    def give_back(self, number: int, key: str | None) -> None:
        self._change(-number, key)

    def leave(self, slots: Slots) -> None:
        self._visitors.discard(slots)
        if not self._visitors:
            self._empty.set()

    async def emptied(self) -> None:
        """Wait until nobody is inside, nor uploading."""
        await self._empty.wait()

    def _check_room(self, number: int, key: str | None) -> None:
        if self.in_use + number > self._capacity():
            raise NoCapacity("all places are taken and the queue is full; try again soon", code="queue_full")
        if key is not None and self._per_key is not None and self._by_key[key] + number > self._per_key:
            raise ClientLimit(f"this key may have {self._per_key} requests running; wait for one of them to end")

    def _change(self, number: int, key: str | None) -> None:
        self.in_use += number
        if self.in_use < 0:
            raise AssertionError("a slot was given back twice")
        if key is not None:
            self._by_key[key] += number
