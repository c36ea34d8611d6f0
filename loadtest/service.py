"""Start and stop a service to load, or use one that runs; read its processes and its metrics."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300


@dataclass
class Exit:
    """How a service that was started here ended; filled in when it has ended."""

    exit_code: int | None = None
    log: str = ""
    children_left: int = 0


@contextmanager
def own_service(exited: Exit) -> Iterator[str]:
    """Run `flashserve serve` on a free port, with the FLASH_* variables that are set; yield its base URL."""
    with tempfile.TemporaryFile("w+") as log:
        env = {**os.environ, "FLASH_HOST": "127.0.0.1", "FLASH_PORT": "0", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-m", "service.cli", "serve"], env=env, stdout=log, stderr=log)

        def text() -> str:
            log.seek(0)
            return log.read()

        try:
            yield _await_ready(process, text)
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            exited.exit_code = process.wait()
            _, left = psutil.wait_procs(children, timeout=5)
            exited.children_left, exited.log = len(left), text()


@contextmanager
def service(url: str | None, exited: Exit) -> Iterator[str]:
    """Yield the URL of the service that runs at `url`, or of one that is started and stopped here."""
    if url is not None:
        yield url
        return
    with own_service(exited) as own:
        yield own


def _await_ready(process: subprocess.Popen[bytes], text: Any) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the service ended with code {process.returncode}:\n{text()}")
        found = re.search(r"running on (http://[\d.]+:\d+)", text())
        with suppress(httpx.TransportError):  # it ends where it cannot load its model
            if found is not None and httpx.get(f"{found[1]}/readyz").status_code == 200:
                return found[1]
        time.sleep(0.1)
    sys.exit(f"the service was not ready within {START_SECONDS} s:\n{text()}")


@dataclass(frozen=True)
class Footprint:
    """Resident bytes by kind of process, the number of processes, and the open files of the API process."""

    api: int
    workers: int
    media: int
    num_processes: int
    num_files: int

    @property
    def total(self) -> int:
        return self.api + self.workers + self.media


def footprint(client: httpx.Client) -> Footprint | None:
    """Measure the service's processes; None if it runs on another machine."""
    if (found := _processes(client)) is None:
        return None
    try:
        return Footprint(
            api=_resident([found.api]),
            workers=_resident(found.workers),
            media=_resident(found.media),
            num_processes=len(found.all),
            num_files=found.api.num_fds(),
        )
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class _Processes:
    api: psutil.Process
    workers: list[psutil.Process]
    media: list[psutil.Process]

    @property
    def all(self) -> list[psutil.Process]:
        return [self.api, *self.workers, *self.media]


def _processes(client: httpx.Client) -> _Processes | None:
    pids = [worker["pid"] for worker in client.get("/health").json()["workers"]]
    try:
        workers = [psutil.Process(pid) for pid in pids]
        api = workers[0].parent()
        if api is None or "service.pool.worker" not in workers[0].cmdline():
            return None
        return _Processes(api, workers, [child for child in api.children(recursive=True) if child.pid not in pids])
    except psutil.NoSuchProcess:
        return None


def _resident(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def metric(text: str, name: str, **labels: str) -> float:
    """Add up the series of this name that have these labels, in the text of /metrics."""
    total = 0.0
    for found in re.finditer(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
        if all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            total += float(found[2])
    return total
