"""The plots of a report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {"off": ("tab:gray", "without speculation"), "auto": ("tab:blue", "with speculation")}
Runs = Sequence[dict[str, Any]]


def by_users(runs: Runs, objectives: dict[str, float]) -> bytes:
    """Throughput, times, goodput and acceptance length over the number of users."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    for speculation, (colour, label) in STYLES.items():
        some = [run for run in runs if run["speculation"] == speculation]
        if not some:
            continue
        for axis, value in zip(axes.flat, PANELS.values(), strict=True):
            _line(axis, some, value, color=colour, marker="o", markersize=4, label=label)
        for axis, name in ((axes[0, 1], "ttft"), (axes[0, 2], "seconds_per_token")):
            _line(axis, some, _quantile(name, "p95"), color=colour, linestyle=":", label=f"{label}, p95")
    axes[0, 1].axhline(objectives["ttft"], color="tab:red", linewidth=0.8)
    axes[0, 2].axhline(1e3 * objectives["seconds_per_token"], color="tab:red", linewidth=0.8)
    users = sorted({run["users"] for run in runs})
    for axis, title in zip(axes.flat, PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xticks(users, [str(number) for number in users])
        axis.set_xlabel("users", fontsize=9)
        axis.grid(alpha=0.3)
        if "time" in title:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0, 1].legend(fontsize=8)
    return _png(figure)


def over_time(runs: Runs) -> bytes:
    """Users, throughput, time to first token and failures in the course of each run."""
    figure = Figure(figsize=(11, 2.2 * len(TIME_PANELS)), layout="constrained")
    axes = figure.subplots(len(TIME_PANELS), 1, sharex=True)
    for axis, (title, value) in zip(axes, TIME_PANELS.items(), strict=True):
        for run in runs:
            colour, label = STYLES[run["speculation"]]
            parts = [(part["at"], found) for part in run["client"]["slices"] if (found := value(part)) is not None]
            label = f"{run['users']} users, {label}"
            alpha = 0.3 + 0.7 * run["users"] / max(one["users"] for one in runs)
            axis.plot(*zip(*parts, strict=True) if parts else ((), ()), color=colour, alpha=alpha, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("seconds", fontsize=9)
    return _png(figure)


def _quantile(name: str, quantile: str, scale: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    scale = 1e3 if name == "seconds_per_token" else scale
    return lambda run: scale * found[quantile] if (found := run["client"][name]) else None


PANELS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "throughput, tokens/s": lambda run: run["client"]["tokens_per_second"],
    "time to first token, s (p50)": _quantile("ttft", "p50"),
    "time per output token, ms (p50)": _quantile("seconds_per_token", "p50"),
    "answers per second": lambda run: run["client"]["requests_per_second"],
    "goodput: answers within the objectives per s": lambda run: run["client"]["goodput"],
    "acceptance length": lambda run: (run["server"] or {}).get("acceptance_length"),
}
TIME_PANELS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "users": lambda part: part["users"],
    "throughput, tokens/s": lambda part: part["tokens_per_second"],
    "time to first token, s (p95)": lambda part: part["ttft"]["p95"] if part["ttft"] else None,
    "failed requests": lambda part: part["failed"],
}


def _line(axis: Axes, runs: Runs, value: Callable[[dict[str, Any]], float | None], **style: Any) -> None:
    points = [(run["users"], found) for run in runs if (found := value(run)) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
