"""Run a real Prometheus for tests and query it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from docker.monitoring import dashboard
from tests.service.forking import ROOT

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


JOB = "flashserve"  # the service's name in rules and panels
Samples = list[tuple[dict[str, str], float]]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Yield every query of the dashboard with the name of its row, panel and series."""
    for row, panels in dashboard.ROWS.items():
        for panel in panels:
            for legend, expr in panel.queries.items():
                yield f"{row} / {panel.title} / {legend}", expr


def fill_in(expr: str, *, rate_interval: float, model: str = ".*", instance: str = ".*") -> str:
    """Replace the dashboard's variables, as Grafana does. Raises KeyError for a variable that it does not define."""
    values = {"model": model, "instance": instance, "__rate_interval": f"{rate_interval:.0f}s"}
    return re.sub(r"\$([a-z_]\w*)", lambda found: values[found[1]], expr)


class Prometheus:
    """One process with this configuration, which it reads from `folder`; `url` is its address."""

    def __init__(self, folder: Path, config: str, port: int) -> None:
        (folder / "prometheus.yml").write_text(config)
        self.log = folder / "prometheus.log"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        try:
            self.wait(self._scrapes)
        except BaseException:
            self.close()
            raise

    def get(self, path: str, **params: Any) -> Any:
        response = self.http.get(f"/api/v1/{path}", params=params)
        if "json" not in response.headers.get("Content-Type", ""):
            raise ValueError(f"Prometheus: {response.status_code} {response.text[:200]}")
        body = response.json()
        if body["status"] != "success":
            raise ValueError(f"Prometheus: {body['error']} ({params})")
        return body["data"]

    def value(self, expr: str, *, at: float | None = None) -> Samples:
        """Evaluate an expression at one moment (Unix time, by default now)."""
        result = self.get("query", query=expr, **({} if at is None else {"time": at}))["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def over_time(self, expr: str, start: float, end: float, step: float) -> list[list[float]]:
        """Evaluate an expression from `start` to `end` (Unix times); return the values of each series."""
        result = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return [[float(value) for _, value in each["values"]] for each in result]

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.2)
        return result

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _scrapes(self) -> bool:
        try:
            return bool(self.value(f'up{{job="{JOB}"}} == 1'))
        except (httpx.TransportError, ValueError):  # not up yet, or still reading its storage
            return False


class ProjectPrometheus(Prometheus):
    """Use the project's own configuration and rules, with another target and pace.

    at_once: alerts fire as soon as their condition is met, without waiting for the time that it must last.
    """

    def __init__(self, folder: Path, target: str, *, seconds: float = 1.0, at_once: bool = False) -> None:
        port = free_port()
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
        super().__init__(folder, config, port)

    def firing(self) -> set[tuple[str, str]]:
        """Return the (alert, severity) of every alert that fires now."""
        active = self.get("alerts")["alerts"]
        return {(one["labels"]["alertname"], one["labels"]["severity"]) for one in active if one["state"] == "firing"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
