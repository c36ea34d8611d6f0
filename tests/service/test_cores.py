"""Cores are counted as a container has them, and on a CPU nothing pushes the engine's threads aside."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from service.cores import available
from tests.service.conftest import StartServer


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "6400000 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_processor_counts(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert available(tmp_path) == (cores or len(os.sched_getaffinity(0)))


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
