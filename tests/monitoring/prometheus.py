"""A real Prometheus for tests, with the project's configuration: only targets, pace and waits are changed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from docker.monitoring.panels import Prometheus
from tests.service.server import ROOT

FOLDER = ROOT / "docker" / "monitoring"
RULES = sorted((FOLDER / "rules").glob("*.yml"))

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no Prometheus here (on Debian: apt-get install prometheus)",
)


def groups(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in groups(path) for rule in group["rules"] if "alert" in rule]


def records() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in groups(path) for rule in group["rules"] if "record" in rule]


class RunningPrometheus(Prometheus):
    """One process; `at_once`: alerts fire as soon as their condition holds, without the time it must hold for."""

    def __init__(self, folder: Path, target: str, *, seconds: float = 1.0, at_once: bool = False) -> None:
        port = _free_port()
        rules = folder / "rules"
        rules.mkdir()
        for path in RULES:
            text = path.read_text()
            (rules / path.name).write_text(re.sub(r"^ +for: .*\n", "", text, flags=re.MULTILINE) if at_once else text)
        config = (FOLDER / "prometheus.yml").read_text()
        for old, new in (
            ("flashserve:8000", target),
            ("localhost:9090", f"127.0.0.1:{port}"),
            (": 10s", f": {seconds:g}s"),
        ):
            assert old in config
            config = config.replace(old, new)
        (folder / "prometheus.yml").write_text(config)
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
                    *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
                ],
                stdout=log,
                stderr=log,
            )
        super().__init__(f"http://127.0.0.1:{port}")
        try:
            self.wait(self._scrapes)
        except BaseException:
            self.close()
            raise

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.2)
        return result

    def firing(self) -> set[tuple[str, str]]:
        """(alert, severity) of all that fire now."""
        active = self.get("alerts")["alerts"]
        return {(one["labels"]["alertname"], one["labels"]["severity"]) for one in active if one["state"] == "firing"}

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._http.close()

    def _scrapes(self) -> bool:
        try:
            return bool(self.value('up{job="flashserve"}'))
        except (httpx.TransportError, ValueError):  # not up yet, or still reading its storage
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
