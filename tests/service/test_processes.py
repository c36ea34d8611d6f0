"""Processes that cannot load, are stopped or outlive others; which of them know the keys."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.settings import holds_keys
from tests.service.conftest import StartServer


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(start_server: StartServer, workers: int) -> None:
    server = start_server({"fail_load": "model", "load_delay": 1}, wait=False, workers=workers)
    assert server.process.wait(15) == 1
    assert "cannot serve: ValueError: there is no checkpoint at this path" in server.log_text()
    assert server.log_text().count("Traceback") == workers, "it may be a bug"


def test_a_setting_that_cannot_be_used_is_told_without_tracebacks(start_server: StartServer) -> None:
    server = start_server({"fail_load": "setting", "load_delay": 1}, wait=False)
    assert server.process.wait(15) == 1
    assert "cannot serve: there is no checkpoint at this path" in server.log_text()
    assert "Traceback" not in server.log_text()


def test_one_load_that_fails_costs_no_worker_where_others_load(start_server: StartServer) -> None:
    """What another could load is no matter of settings: it is tried again."""
    server = start_server({"fail_load": "once"}, workers=2)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    assert server.metric("flash_worker_restarts_total") == 1


def test_workers_end_when_the_server_is_killed(start_server: StartServer) -> None:
    server = start_server(workers=2)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 3, "two workers and a media child"
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left


@pytest.mark.parametrize(
    ("settings", "fake", "stopped"),
    [
        ({}, {}, "worker"),
        ({"workers": 2}, {}, "all"),
        ({}, {"load_delay": 60}, "loading"),
        ({}, {}, "media child"),
    ],
)
def test_a_stopped_process_does_not_outlive_a_killed_server(
    start_server: StartServer, settings: dict[str, Any], fake: dict[str, Any], stopped: str
) -> None:
    """It cannot see that its socket closed: the kernel has to end it."""
    server = start_server(fake, wait=stopped != "loading", **settings)
    server.wait(lambda: all(server.worker_pids()))
    if stopped == "loading":
        server.wait(lambda: is_set_up(server.worker_pids()[0]))
    workers = set(server.worker_pids())
    children = psutil.Process(server.process.pid).children(recursive=True)
    for child in children:
        if stopped == "all" or (child.pid in workers) == (stopped != "media child"):
            child.suspend()
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    for child in left:
        child.kill()
    assert not left


def is_set_up(pid: int) -> bool:
    """Whether a worker runs our code: it ignores SIGTERM from then on."""
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return ignored is not None and bool(int(ignored[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_no_child_knows_the_keys(start_server: StartServer) -> None:
    """The API process alone checks them; children run models and strangers' files."""
    keys = {"api_key": "key-of-clients,another-key", "admin_key": "key-of-operators"}
    server = start_server(workers=2, forked=False, **keys)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 3, "two workers and a media child"
    for child in children:
        known = Path(f"/proc/{child.pid}/environ").read_bytes() + " ".join(child.cmdline()).encode()
        assert b"key-of" not in known
        assert b"another-key" not in known


@pytest.mark.parametrize("name", ["FLASH_API_KEY", "FLASH_ADMIN_KEY", "flash_api_key", "Flash_Admin_Key"])
def test_variables_with_keys_are_known_however_they_are_written(name: str) -> None:
    assert holds_keys(name)
    assert not any(map(holds_keys, ("FLASH_MODEL", "PATH", "HF_TOKEN", "FLASH_API_KEYS", "API")))
