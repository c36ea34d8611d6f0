"""Keep a number of decoding children warm, lend them out, and replace those that fail.

A replacement starts in the background; with more children than are in use at a time, nobody waits for it. Knows nothing
of jobs or their order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

from service.errors import NoCapacity
from service.media import wire
from service.media.child_process import Child, ChildGone, PixelAllocator


class ChildPool:
    """`await start()`, then any number of `await borrow()`, each with its `release()`; finally `await close()`."""

    def __init__(self, setup: wire.Setup, allocator: PixelAllocator | None, size: int) -> None:
        self.num_started = 0  # children that became warm
        self._setup, self._allocator, self._size = setup, allocator, size
        self._all: set[Child] = set()  # all with a process: starting, idle, in use or about to be reaped
        self._idle: list[Child] = []
        self._in_use: set[Child] = set()
        self._borrowers: deque[asyncio.Future[Child]] = deque()
        self._num_starting = 0
        self._tasks: set[asyncio.Task[None]] = set()  # each starts or reaps a child
        self._none_in_use = asyncio.Event()
        self._open = False

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._all if child.alive)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    async def start(self) -> None:
        """Start all children and wait until they are warm. Raises RuntimeError where one cannot be started."""
        self._open = True
        self._start_missing()
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
            if self.num_started < self._size:
                raise RuntimeError("media decoding children do not start; see standard error")
        except BaseException:
            await self.close()
            raise

    async def borrow(self) -> Child:
        """Return a warm child, waiting for one if none is idle. Raises NoCapacity where none can be started."""
        if not self._open:
            raise shutting_down()
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                self._in_use.add(child)
                self._start_missing()  # retries an earlier start that failed
                return child
            self._replace(child)
        borrower: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._borrowers.append(borrower)
        self._start_missing()
        try:
            return await borrower
        except asyncio.CancelledError:
            if borrower.done() and not borrower.cancelled() and borrower.exception() is None:
                self.release(borrower.result(), keep=True)
            raise

    def release(self, child: Child, *, keep: bool) -> None:
        """Return a borrowed child; without `keep` it is replaced. Never awaits, since the caller may be cancelled."""
        self._in_use.discard(child)
        if keep and self._open:
            self._hand_out(child)
        else:
            self._replace(child)
        if not self._in_use:
            self._none_in_use.set()

    async def close(self) -> None:
        """Kill every child, busy ones included, and wait until all are gone."""
        if not self._open:
            return
        self._open = False
        for child in self._all:
            child.kill()
        self._fail_borrowers(shutting_down())
        while self._idle:
            self._replace(self._idle.pop())
        while self._in_use:  # each is reaped when its borrower releases it
            self._none_in_use.clear()
            await self._none_in_use.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _hand_out(self, child: Child) -> None:
        """Pass a warm child to the first waiting borrower."""
        while self._borrowers:
            borrower = self._borrowers.popleft()
            if not borrower.done():
                self._in_use.add(child)
                borrower.set_result(child)
                return
        self._idle.append(child)

    def _replace(self, child: Child) -> None:
        child.kill()
        self._run(self._end(child))
        self._start_missing()

    async def _end(self, child: Child) -> None:
        await child.reap()
        self._all.discard(child)

    def _start_missing(self) -> None:
        while self._open and len(self._idle) + len(self._in_use) + self._num_starting < self._size:
            self._num_starting += 1
            self._run(self._start())

    async def _start(self) -> None:
        """Start one more child; where that fails, the next `borrow()` tries again."""
        child = await self._warm_child()
        self._num_starting -= 1
        if child is not None:
            self.num_started += 1
            self._in_use.add(child)
            self.release(child, keep=True)
        elif not self._num_starting:
            self._fail_borrowers(NoCapacity("media cannot be decoded at the moment"))

    async def _warm_child(self) -> Child | None:
        """Start a child and wait until it is warm; return None where that fails."""
        child: Child | None = None
        try:
            child = await Child.spawn(self._setup, self._allocator)
            self._all.add(child)
            if not self._open:  # closed meanwhile
                child.kill()
            async with asyncio.timeout(self._setup.limits.start_seconds):
                await child.ready()
            return child
        except (OSError, ChildGone):
            if child is not None:
                child.kill()
                await self._end(child)
            return None

    def _fail_borrowers(self, error: NoCapacity) -> None:
        while self._borrowers:
            borrower = self._borrowers.popleft()
            if not borrower.done():
                borrower.set_exception(NoCapacity(error.message))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def shutting_down() -> NoCapacity:
    return NoCapacity("the service is shutting down")
