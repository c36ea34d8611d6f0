"""One worker slot: a child process that is started, listened to, and started again when it dies.

Tells its owner what happens through `WorkerEvents` and knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from model.request import EngineInfo
from service.pool import messages as m
from service.pool.arena import Arena
from service.settings import holds_keys

log = logging.getLogger("flashserve.pool")

FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 30.0
STEADY_AFTER = 60.0  # seconds up, after which earlier deaths are forgotten
STOP_GRACE = 5.0
WATCH_INTERVAL = 1.0

State = Literal["loading", "ready", "dead", "given_up", "stopped"]


@dataclass(frozen=True, eq=False)
class Death:
    """Of one worker process: it and every request that was there have the same one."""

    worker: int


class WorkerEvents(Protocol):
    def options_for(self, worker: Worker) -> dict[str, Any]: ...  # beside its plan's, when it starts
    def on_ready(self, worker: Worker) -> None: ...
    def on_message(self, worker: Worker, message: m.FromWorker) -> None: ...
    def on_death(self, worker: Worker, death: Death) -> None: ...  # then one of these two
    def on_restart(self, worker: Worker) -> None: ...
    def on_given_up(self, worker: Worker) -> None: ...
    def is_busy(self, worker: Worker) -> bool: ...


@dataclass(frozen=True)
class WorkerPlan:
    """How a worker is started, and how much is put up with."""

    engine: str
    options: dict[str, Any]
    load_timeout: float
    stall_timeout: float
    max_restarts: int
    arena: Arena | None = None  # where media lie


class _Wire(asyncio.Protocol):
    """Our end of a worker's socket. A task that reads it would cost more than most messages."""

    def __init__(self, take: Callable[[m.FromWorker], None], arena: Arena | None) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # or what went wrong
        self._take = take
        self._frames, self._encoder = m.Frames(), m.encoder(arena)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._take(m.from_worker.decode(payload))
        except Exception as error:  # what a worker says is not worth the service
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        self._end(None)

    def send(self, message: m.ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(m.frame(message, self._encoder))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _end(self, error: Exception | None) -> None:
        if self.closed.done():
            return
        if error is None:
            self.closed.set_result(None)
        else:
            self.closed.set_exception(error)


class Worker:
    def __init__(self, index: int, plan: WorkerPlan, events: WorkerEvents) -> None:
        self.index = index
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.load_error: str | None = None
        self._plan = plan
        self._events = events
        self._deaths: set[Death] = set()  # in a row, for which no request is known to be the cause
        self._on_probation = False  # some were laid to a request: it is to show that it can serve another
        self._heard_at = 0.0
        self._ready_at: float | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._wire: _Wire | None = None
        self._stopping = asyncio.Event()

    async def supervise(self) -> None:
        """Keep one process alive until stopped or beyond hope."""
        while not self._stopping.is_set():
            self.state = "loading"
            code, seconds_up = await self._run_once()
            if self._stopping.is_set():
                break
            log.error("worker %d (pid %s) died: exit code %s", self.index, self.pid, code)
            if seconds_up >= STEADY_AFTER:
                self._deaths.clear()
            death = Death(self.index)
            self._deaths.add(death)
            self._events.on_death(self, death)
            num_deaths = len(self._deaths)
            if num_deaths > self._plan.max_restarts:
                self.state = "given_up"
                log.critical("worker %d is given up after %d deaths in a row", self.index, num_deaths)
                self._events.on_given_up(self)
                return
            self._events.on_restart(self)
            backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 4.0 ** min(8, max(0, num_deaths - 1)))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff)
            self.restarts += 1
        self.state = "stopped"

    def send(self, message: m.ToWorker) -> None:
        """Never waits: what the socket does not take at once is kept. A dead worker's mail is dropped."""
        if self._wire is not None:
            self._wire.send(message)

    def did_well(self) -> None:
        """It finished a request: it is fit for work, and earlier deaths were not its own fault."""
        self._deaths.clear()

    def excuse(self, deaths: set[Death]) -> None:
        """These were a request's doing. Before it is ready again it has to answer one of our own: else an engine that
        is broken would look like a series of bad requests, and be started again for ever."""
        self._on_probation |= bool(self._deaths & deaths)
        self._deaths -= deaths

    def stop(self) -> None:
        """A worker that is ready ends after its present step; one that is still loading is not waited for."""
        self._stopping.set()
        if self.state == "ready":
            self.send(m.Stop())
        else:
            self.kill()

    def kill(self) -> None:
        # By its handle, which knows when it has ended: its number may be another process's by then.
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _run_once(self) -> tuple[int | None, float]:
        """One life of the process: its exit code and how many seconds it was ready."""
        ours, theirs = socket.socketpair()
        command = ["-m", "service.pool.worker", "--fd", str(theirs.fileno()), "--engine", self._plan.engine]
        given = [theirs.fileno()]
        if self._plan.arena is not None:
            command += ["--pixels", str(self._plan.arena.fd)]
            given.append(self._plan.arena.fd)
        try:
            # The kernel kills it with the thread that starts it here, the loop's, which lives as long as the service.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *command),
                pass_fds=given,
                stdin=asyncio.subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not holds_keys(name)},
            )
        except OSError:
            log.exception("worker %d cannot be started", self.index)
            ours.close()
            return None, 0.0
        finally:
            theirs.close()
        self._process, self.pid = process, process.pid
        self._heard_at = time.monotonic()
        self._ready_at = None
        self._wire = wire = _Wire(self._take, self._plan.arena)
        await asyncio.get_running_loop().create_connection(lambda: wire, sock=ours)
        watchdog = asyncio.create_task(self._watch())
        try:
            self.send(m.Load(self._plan.options | self._events.options_for(self), self._on_probation))
            await wire.closed
        except Exception:
            log.exception("worker %d does not speak our language", self.index)
            self.kill()
        finally:
            self.state = "dead"
            watchdog.cancel()
            wire.close()
            code = await self._reap(process)
        return code, 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def _take(self, message: m.FromWorker) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, m.Ready):
            self._ready_at = self._heard_at
            self.info, self.state, self._on_probation = message.info, "ready", False
            log.info("worker %d (pid %s) is ready on %s", self.index, self.pid, message.info.device)
            self._events.on_ready(self)
        elif isinstance(message, m.DraftUsed):
            self.info = message.info
            self._events.on_message(self, message)
        elif isinstance(message, m.LoadFailed):
            self.load_error = message.reason
        else:
            self._events.on_message(self, message)

    async def _watch(self) -> None:
        """Kill a process that is silent for too long: one that hangs is as dead as one that is gone."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            loading = self.state == "loading"
            limit = self._plan.load_timeout if loading else self._plan.stall_timeout
            if not loading and not self._events.is_busy(self):
                self._heard_at = time.monotonic()
            if time.monotonic() - self._heard_at > limit:
                log.error("worker %d (pid %s) said nothing for %.0f s", self.index, self.pid, limit)
                self.kill()

    async def _reap(self, process: asyncio.subprocess.Process) -> int | None:
        try:
            async with asyncio.timeout(STOP_GRACE):
                return await process.wait()
        except TimeoutError:
            self.kill()
            return await process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
