"""Start one decoding child, send it jobs, kill and reap it. Knows nothing of media.

Files and pixels go through the socket straight from and into their buffers, in pieces that never block the event loop;
asyncio's streams and transports would copy each of them several times.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import numpy as np

import service
from model.request import VideoMetadata
from service.media import wire

MAX_QUESTIONS = 4  # of one job: about the frames that the packets announce, and about those that are there
ONE_WRITE = 256 * 1024  # bytes; a file up to this size is sent in one write with its message
Buffer = TypeVar("Buffer", bytearray, memoryview)
Choose = Callable[[VideoMetadata], Awaitable[tuple[int, ...] | None]]
PACKAGE_ROOT = Path(service.__file__).resolve().parents[1]


class ChildGone(Exception):
    """The child died or broke the protocol. `by_itself`: it was not killed from outside, so the job is the cause."""

    def __init__(self, *, by_itself: bool) -> None:
        super().__init__("the decoding child is gone")
        self.by_itself = by_itself


def _environment() -> dict[str, str]:
    """Return a child's environment: no keys, tokens or proxies; one thread and few arenas, for its memory limit."""
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG", "LC_ALL") if name in os.environ}
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return {**inherited, **threads, "PYTHONPATH": str(PACKAGE_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


class PixelAllocator(Protocol):
    """Memory for decoded pixels; pool/arena.py has one that workers share."""

    def allocate(self, num_bytes: int) -> np.ndarray | None:
        """Return (num_bytes,) uint8, or None without room."""
        ...


class Child:
    """A decoding child. One task uses it at a time, but anyone may `kill()` it."""

    def __init__(
        self, process: asyncio.subprocess.Process, sock: socket.socket, allocator: PixelAllocator | None
    ) -> None:
        self._process = process
        self._sock = sock
        self._allocator = allocator
        self._loop = asyncio.get_running_loop()
        self.num_jobs = 0

    @classmethod
    async def spawn(cls, setup: wire.Setup, allocator: PixelAllocator | None = None) -> Child:
        """Start a process; it is not warm yet. Raises OSError where that fails."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "service.media.child", msgspec.json.encode(setup).decode()),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                env=_environment(),
                start_new_session=True,  # its own process group to kill, and no Ctrl-C that is meant for the service
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours, allocator)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ready(self) -> None:
        """Wait until the child is warm. Raises ChildGone where it never will be."""
        try:
            reply, _ = await self._receive(max_payload=0)
            if reply != wire.Started():
                raise wire.WireError("expected Started")
        except (OSError, EOFError, wire.WireError) as error:
            raise ChildGone(by_itself=True) from error

    async def run(self, job: wire.Job, data: bytes, *, max_reply: int, choose: Choose) -> tuple[wire.Reply, np.ndarray]:
        """Send one job and wait for its reply: the message, and the payload as (bytes,) uint8.

        choose: answers the child's question which frames of a video are wanted. Raises what `choose` raises, ChildGone,
        and TimeoutError where the processor time is used up. After any exception, cancellation included, the child must
        be killed.
        """
        self.num_jobs += 1
        try:
            await self._send(job, data)
            reply, payload = await self._receive(max_reply)
            for _ in range(MAX_QUESTIONS):
                if not isinstance(reply, wire.Choose):
                    break
                await self._send(wire.Chosen(await choose(reply.source)), b"")
                reply, payload = await self._receive(max_reply)
            return reply, payload
        except wire.WireError as error:
            raise ChildGone(by_itself=True) from error
        except (OSError, EOFError) as error:
            code = await self._process.wait()
            if code in (-signal.SIGPROF, -signal.SIGXCPU):
                raise TimeoutError("out of processor time") from error
            raise ChildGone(by_itself=code != -signal.SIGKILL) from error

    def kill(self) -> None:
        """Kill the child; `reap()` must follow."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Close the socket of a killed child and wait for its end."""
        self._sock.close()
        await self._process.wait()

    async def _send(self, message: wire.Job | wire.Chosen, data: bytes) -> None:
        head = wire.pack(message, len(data))
        if len(data) <= ONE_WRITE:
            await self._loop.sock_sendall(self._sock, head + data)
        else:
            await self._loop.sock_sendall(self._sock, head)
            await self._loop.sock_sendall(self._sock, data)

    async def _receive(self, max_payload: int) -> tuple[wire.Reply, np.ndarray]:
        """Receive a frame. Raises WireError, OSError and EOFError."""
        prefix = await self._read(bytearray(wire.PREFIX.size))
        num_message, num_payload = wire.unpack_prefix(prefix, max_payload=max_payload)
        reply = wire.unpack_reply(await self._read(bytearray(num_message)))
        payload = self._allocator.allocate(num_payload) if self._allocator is not None and num_payload else None
        if payload is None:
            payload = np.empty(num_payload, dtype=np.uint8)
        await self._read(payload.data)
        return reply, payload

    async def _read(self, buffer: Buffer) -> Buffer:
        """Fill the buffer from the socket. Raises EOFError."""
        view = memoryview(buffer)
        while view:
            try:
                received = self._sock.recv_into(view)
            except BlockingIOError:
                received = await self._loop.sock_recv_into(self._sock, view)
            if not received:
                raise EOFError
            view = view[received:]
        return buffer
