"""Start one worker process, talk to it, and restart it when it dies.

Reports what happens through `WorkerEvents`; knows nothing of requests.
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
STEADY_AFTER = 60.0  # seconds of readiness after which earlier deaths no longer count
STOP_GRACE = 5.0  # seconds for a process to end by itself
WATCH_INTERVAL = 1.0

State = Literal["loading", "ready", "dead", "given_up", "stopped"]


@dataclass(frozen=True, eq=False)
class Death:
    """One death of a worker process; the worker and all requests that it was decoding refer to the same object."""

    worker: int


class WorkerEvents(Protocol):
    """What a worker reports to its owner, the pool."""

    def options_for(self, worker: Worker) -> dict[str, Any]: ...  # engine options that override the config's
    def on_ready(self, worker: Worker) -> None: ...
    def on_message(self, worker: Worker, message: m.FromWorker) -> None: ...
    def on_death(self, worker: Worker, death: Death) -> None: ...  # followed by on_restart or on_failed
    def on_restart(self, worker: Worker) -> None: ...
    def on_failed(self, worker: Worker) -> None: ...
    def is_busy(self, worker: Worker) -> bool: ...


@dataclass(frozen=True)
class WorkerConfig:
    """How to start a worker, and when to kill it or stop restarting it."""

    engine: str  # "module:callable"
    options: dict[str, Any]
    load_timeout: float  # seconds
    stall_timeout: float  # seconds
    max_restarts: int
    arena: Arena | None = None  # for decoded media


class _Connection(asyncio.Protocol):
    """The API's end of a worker's socket. A protocol, since a reading task would cost more than most messages."""

    def __init__(self, on_message: Callable[[m.FromWorker], None], arena: Arena | None) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # raises where it broke
        self._on_message = on_message
        self._reader, self._encoder = m.FrameReader(), m.encoder(arena)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._reader.feed(data):
                self._on_message(m.from_worker.decode(payload))
        except Exception as error:  # a bad message ends this connection, not the service
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
    """A supervised worker process; `index` stays the same over restarts."""

    def __init__(self, index: int, config: WorkerConfig, events: WorkerEvents) -> None:
        self.index = index
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.load_error: str | None = None
        self._config = config
        self._events = events
        self._deaths: set[Death] = set()  # in a row, unless a request was at fault
        self._needs_self_test = False  # after deaths that were blamed on a request
        self._last_message_at = 0.0
        self._ready_at: float | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._connection: _Connection | None = None
        self._stopping = asyncio.Event()

    async def supervise(self) -> None:
        """Run the process and restart it after each death, until stopped or dead too often in a row."""
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
            if num_deaths > self._config.max_restarts:
                self.state = "given_up"
                log.critical("worker %d is given up after %d deaths in a row", self.index, num_deaths)
                self._events.on_failed(self)
                return
            self._events.on_restart(self)
            backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 4.0 ** min(8, max(0, num_deaths - 1)))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff)
            self.restarts += 1
        self.state = "stopped"

    def send(self, message: m.ToWorker) -> None:
        """Send without waiting: the transport buffers. Messages to a dead worker are dropped."""
        if self._connection is not None:
            self._connection.send(message)

    def on_request_finished(self) -> None:
        """Forget earlier deaths: the worker has shown that it works."""
        self._deaths.clear()

    def forgive(self, deaths: set[Death]) -> None:
        """Count these deaths no longer: a request caused them. The worker must then pass a self-test before it is
        ready; otherwise a broken engine would look like a series of bad requests and restart for ever."""
        self._needs_self_test |= bool(self._deaths & deaths)
        self._deaths -= deaths

    def stop(self) -> None:
        """Stop a ready worker after its present step; kill one that is still loading."""
        self._stopping.set()
        if self.state == "ready":
            self.send(m.Stop())
        else:
            self.kill()

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        # Through its handle: its process id may have been reused.
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _run_once(self) -> tuple[int | None, float]:
        """Start the process and wait for its end; return its exit code and for how many seconds it was ready."""
        ours, theirs = socket.socketpair()
        command = ["-m", "service.pool.worker", "--fd", str(theirs.fileno()), "--engine", self._config.engine]
        fds = [theirs.fileno()]
        if self._config.arena is not None:
            command += ["--pixels", str(self._config.arena.fd)]
            fds.append(self._config.arena.fd)
        try:
            # The kernel kills it with the thread that starts it (PR_SET_PDEATHSIG): here the event loop's.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *command),
                pass_fds=fds,
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
        self._last_message_at = time.monotonic()
        self._ready_at = None
        self._connection = connection = _Connection(self._on_message, self._config.arena)
        await asyncio.get_running_loop().create_connection(lambda: connection, sock=ours)
        watchdog = asyncio.create_task(self._watch())
        try:
            self.send(m.Load(self._config.options | self._events.options_for(self), self._needs_self_test))
            await connection.closed
        except Exception:
            log.exception("worker %d sent an invalid message", self.index)
            self.kill()
        finally:
            self.state = "dead"
            watchdog.cancel()
            connection.close()
            code = await self._reap(process)
        return code, 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def _on_message(self, message: m.FromWorker) -> None:
        """Note when a message arrived, and handle it or pass it on."""
        self._last_message_at = time.monotonic()
        if isinstance(message, m.Ready):
            self._ready_at = self._last_message_at
            self.info, self.state, self._needs_self_test = message.info, "ready", False
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
        """Kill the process when it is busy or loading and has sent nothing for too long."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            loading = self.state == "loading"
            limit = self._config.load_timeout if loading else self._config.stall_timeout
            if not loading and not self._events.is_busy(self):
                self._last_message_at = time.monotonic()
            if time.monotonic() - self._last_message_at > limit:
                log.error("worker %d (pid %s) was silent for %.0f s and is killed", self.index, self.pid, limit)
                self.kill()

    async def _reap(self, process: asyncio.subprocess.Process) -> int | None:
        """Wait for the process, kill it after STOP_GRACE, and return its exit code."""
        try:
            async with asyncio.timeout(STOP_GRACE):
                return await process.wait()
        except TimeoutError:
            self.kill()
            return await process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
