"""Read a dashboard's file and query Prometheus as Grafana does: fill in variables, query, name series by their legends.

This module supports only the part of Grafana that dashboards/flashserve.json uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

DASHBOARD = Path(__file__).parent / "dashboards" / "flashserve.json"
JOB = "flashserve"


@dataclass(frozen=True)
class Panel:
    """Hold one panel as the dashboard's file describes it."""

    title: str
    row: str
    kind: str  # Grafana's type
    unit: str
    grid: tuple[int, int, int, int]  # x, y, width, height
    queries: tuple[tuple[str, str], ...]  # (legend, expression), with variables
    steps: tuple[tuple[float | None, str], ...]
    most: float | None
    decimals: int | None
    stacked: bool


def read(path: Path = DASHBOARD) -> list[Panel]:
    """Read the panels of a dashboard's file."""
    dashboard = json.loads(path.read_text())
    row, panels = "", []
    for each in dashboard["panels"]:
        if each["type"] == "row":
            row = each["title"]
            continue
        defaults = each["fieldConfig"]["defaults"]
        grid = each["gridPos"]
        panels.append(
            Panel(
                title=each["title"],
                row=row,
                kind=each["type"],
                unit=defaults["unit"],
                grid=(grid["x"], grid["y"], grid["w"], grid["h"]),
                queries=tuple((target["legendFormat"], target["expr"]) for target in each["targets"]),
                steps=tuple((step["value"], step["color"]) for step in defaults.get("thresholds", {}).get("steps", [])),
                most=defaults.get("max"),
                decimals=defaults.get("decimals"),
                stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
            )
        )
    return panels


def fill_in(expr: str, *, rate_interval: float, model: str = ".*", instance: str = ".*") -> str:
    """Replace the dashboard's variables in an expression. Raises KeyError for an unknown variable."""
    values = {"model": model, "instance": instance, "__rate_interval": f"{rate_interval:.0f}s"}
    return re.sub(r"\$([a-z_]\w*)", lambda found: values[found[1]], expr)


def legend(template: str, labels: dict[str, str]) -> str:
    """Fill labels into a legend's template; a missing label becomes empty."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template).strip()


@dataclass(frozen=True)
class Series:
    """Hold one series of a panel."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]  # (Unix time, value); NaN where 0 was divided by 0


class Prometheus:
    """Query the HTTP API of a Prometheus server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """Return the data of one API call. Raises ValueError with Prometheus' message if the call fails."""
        response = self._http.get(f"/api/v1/{path}", params=params)
        if "json" not in response.headers.get("Content-Type", ""):
            raise ValueError(f"Prometheus: {response.status_code} {response.text[:200]}")
        body = response.json()
        if body["status"] != "success":
            raise ValueError(f"Prometheus: {body['error']} ({params})")
        return body["data"]

    def value(self, expr: str, *, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression at one time, by default now: pairs of labels and value."""
        result = self.get("query", query=expr, **({} if at is None else {"time": at}))["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def over_time(
        self, expr: str, start: float, end: float, step: float
    ) -> Iterator[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Evaluate an expression every `step` seconds: pairs of labels and points (Unix time, value)."""
        for each in self.get("query_range", query=expr, start=start, end=end, step=step)["result"]:
            yield each["metric"], [(at, float(value)) for at, value in each["values"]]

    def scrape_interval(self) -> float:
        """Return the scrape interval of the service's targets in seconds; Grafana has it in its data source.

        Raises ValueError if Prometheus has no target of the job.
        """
        targets = self.get("targets", state="active")["activeTargets"]
        intervals = [each["scrapeInterval"] for each in targets if each["labels"]["job"] == JOB]
        if not intervals:
            raise ValueError(f"Prometheus has no target of the job {JOB}")
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
        parts: list[tuple[str, str]] = re.findall(r"(\d+)(ms|s|m|h)", intervals[0])
        return sum(int(number) * units[unit] for number, unit in parts)

    def data(self, panel: Panel, start: float, end: float, step: float, scrape_interval: float) -> list[Series]:
        """Return the series that Grafana would draw, with its rate interval of at least four scrapes."""
        rate_interval = max(step + scrape_interval, 4 * scrape_interval)
        return [
            Series(legend(template, labels), labels, points)
            for template, expr in panel.queries
            for labels, points in self.over_time(fill_in(expr, rate_interval=rate_interval), start, end, step)
        ]
