"""Starts server processes quickly, forked from a process that has imported everything and has run nothing.

    python -m tests.service.forking FD MODULE...

`Popen` starts that process once for each set of modules, and asks it for `flashserve serve`. What it forks is a server
process like any other: it has its own environment, folder, log and exit code, and it starts media children as always.
Only its workers are forked too, by the server itself, so that they are its children; a worker begins with its files,
signals, loggers and environment as if it had been executed. Nobody imports torch and transformers for each.

A forked process shares pages with its siblings and shows the command line and environment of the first one in /proc:
tests of those start a server by its command line (`Server(..., forked=False)`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATH = os.pathsep.join(map(str, (HERE, ROOT)))
SERVICE = ("service.cli", "service.app", "service.server", "service.pool.worker", "uvloop")
ENGINE = (*SERVICE, "model.engine.engine")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


class Origin:
    """The process that forks servers; used from one thread."""

    running: dict[tuple[str, ...], Origin] = {}

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._socket, theirs = socket.socketpair()
        env = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "FAKE_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.forking", str(theirs.fileno()), *modules],
            env={**env, "PYTHONPATH": PATH},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._replies = self._socket.makefile("r")
        atexit.register(self.close)

    @classmethod
    def of(cls, modules: tuple[str, ...]) -> Origin:
        """Return the process with these modules, started when it is first wanted."""
        if modules not in cls.running:
            cls.running[modules] = cls(modules)
        return cls.running[modules]

    def call(self, **question: Any) -> Any:
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        return json.loads(self._replies.readline())

    def close(self) -> None:
        self._replies.close()
        self._socket.close()
        self._process.wait()


class Popen:
    """What the tests use of `subprocess.Popen`, for a forked server."""

    def __init__(self, modules: tuple[str, ...], env: dict[str, str], cwd: Path, stdout: IO[bytes]) -> None:
        self._origin = Origin.of(modules)
        self.returncode: int | None = None
        self.pid: int = self._origin.call(env=env, cwd=str(cwd), log=stdout.name)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._origin.call(pid=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["flashserve", "serve"], timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Import the modules, then fork and reap servers until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # a collection would touch every page that is shared
    with connection, connection.makefile("r") as questions:
        for line in questions:
            question = json.loads(line)
            if "pid" in question:
                pid, status = os.waitpid(question["pid"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif not (answer := os.fork()):
                run_server(**question)
            connection.sendall(json.dumps(answer).encode() + b"\n")


def run_server(env: dict[str, str], cwd: str, log: str) -> NoReturn:
    """Run `flashserve serve` as a process would that was executed, and end with its exit code."""
    with ending():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        close_all_but(0, 1, 2)
        replace_environment(env)
        os.chdir(cwd)
        sys.path.insert(0, cwd)
        sys.argv = ["flashserve", "serve"]
        from service import cli
        from service.pool import supervisor

        vars(supervisor)["asyncio"] = AsyncioOfSupervisor()
        try:
            cli.app()
        finally:  # what the interpreter does at its end
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        sys.exit()


class AsyncioOfSupervisor:
    """asyncio, as the module sees it that starts the workers."""

    def __getattr__(self, name: str) -> Any:
        return fork_worker if name == "create_subprocess_exec" else getattr(asyncio, name)


class ForkedWorker:
    """What the supervisor uses of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, life: int) -> None:
        """life: a pipe whose other end only the worker has open."""
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._life = life
        asyncio.get_running_loop().add_reader(life, self._reap)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._life)
        os.close(self._life)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()


async def fork_worker(*command: str, pass_fds: list[int], stdin: int, env: dict[str, str]) -> ForkedWorker:
    """Fork a worker where the supervisor would execute `python -m service.pool.worker ...`."""
    assert command[:3] == (sys.executable, "-m", "service.pool.worker")
    assert stdin == asyncio.subprocess.DEVNULL
    life, end_of_life = os.pipe()
    if pid := os.fork():
        os.close(end_of_life)
        return ForkedWorker(pid, life)
    run_worker(command[3:], {*pass_fds, end_of_life}, env)


def run_worker(arguments: Sequence[str], fds: set[int], env: dict[str, str]) -> NoReturn:
    """Run a worker with nothing of the server that it was forked from but the modules."""
    with ending():
        gc.freeze()  # no object of the server is finalised here
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
            with contextlib.suppress(OSError):  # those that the C library keeps for itself
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        close_all_but(0, 1, 2, *fds)
        replace_environment(env)
        logging.root.handlers.clear()
        for name in (None, *logging.root.manager.loggerDict):
            logging.getLogger(name).setLevel(logging.NOTSET if name else logging.WARNING)
        libc = ctypes.CDLL(None)  # the server sets a threshold, which an executed process would not have
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        from service.pool import worker

        sys.exit(worker.main(list(arguments)))


class ending:  # noqa: N801
    """Ends the process with the block, so that nothing returns into the code that forked it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> NoReturn:
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        if error is not None and not isinstance(error, SystemExit):
            sys.excepthook(kind, error, traceback)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def replace_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def close_all_but(*kept: int) -> None:
    edges = [-1, *sorted(set(kept)), os.sysconf("SC_OPEN_MAX")]
    for low, high in zip(edges, edges[1:], strict=False):
        if low + 1 < high:  # an empty range closes all, in Python 3.11
            os.closerange(low + 1, high)


if __name__ == "__main__":
    main()
