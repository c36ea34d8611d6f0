"""On a CPU the engine's threads are not pushed aside by what serves them."""

from __future__ import annotations

import os

import psutil
import pytest

from tests.service.conftest import StartServer


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_everything_around_an_engine_gives_way_to_it(start_server: StartServer) -> None:
    """A worker's first thread computes. Decoding children and the API process serve."""
    server = start_server(device="cpu")
    workers = server.worker_pids()
    children = {child.pid for child in psutil.Process(server.process.pid).children()} - set(workers)
    assert len(workers) >= 1
    assert len(children) >= 1
    assert {os.sched_getscheduler(pid) for pid in workers} == {os.SCHED_OTHER}
    assert {os.sched_getscheduler(pid) for pid in (server.process.pid, *children)} == {os.SCHED_BATCH}
