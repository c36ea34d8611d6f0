"""A load test's result as text and as files: report.json, report.txt, and report.html with its plots inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from loadtest import plots
from loadtest.scenarios import SCENARIOS

Run = dict[str, Any]
Column = tuple[str, Callable[[Run], str]]
NAMES = {"auto": "on", "off": "off"}


def _number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _quantile(name: str, quantile: str, digits: int, scale: float = 1.0) -> Callable[[Run], str]:
    return lambda run: _number((run["client"][name] or {}).get(quantile), digits, scale)


def _server(name: str, digits: int = 2, scale: float = 1.0) -> Callable[[Run], str]:
    return lambda run: _number((run["server"] or {}).get(name), digits, scale)


RUN: list[Column] = [("users", lambda run: str(run["users"])), ("speculation", lambda run: NAMES[run["speculation"]])]
CLIENT: list[Column] = [
    *RUN,
    ("tokens/s", lambda run: _number(run["client"]["tokens_per_second"], 0)),
    ("answers/s", lambda run: _number(run["client"]["requests_per_second"], 2)),
    ("goodput/s", lambda run: _number(run["client"]["goodput"], 2)),
    ("in time", lambda run: _share(run["client"]["goodput_share"])),
    ("TTFT p50 s", _quantile("ttft", "p50", 3)),
    ("p95", _quantile("ttft", "p95", 3)),
    ("p99", _quantile("ttft", "p99", 3)),
    ("token p50 ms", _quantile("seconds_per_token", "p50", 2, 1e3)),
    ("p95", _quantile("seconds_per_token", "p95", 2, 1e3)),
    ("p99", _quantile("seconds_per_token", "p99", 2, 1e3)),
    ("longest gap s", _quantile("longest_gap", "max", 2)),
    ("answered", lambda run: str(run["client"]["answered"])),
    ("failed", lambda run: str(sum(run["client"]["failures"].values()))),
]
SERVER: list[Column] = [
    *RUN,
    ("acceptance length", _server("acceptance_length")),
    ("accepted", lambda run: _share((run["server"] or {}).get("accepted_share"))),
    ("from drafts", lambda run: _share((run["server"] or {}).get("share_of_output_drafted"))),
    ("batch", _server("mean_batch", 1)),
    ("queue ms", _server("mean_queue", 0, 1e3)),
    ("TTFT mean s", _server("mean_ttft", 3)),
    ("token mean ms", _server("mean_seconds_per_token", 2, 1e3)),
    ("tokens", _server("generation_tokens", 0)),
    ("usage says", lambda run: _number(run["client"]["tokens"], 0)),
    ("tokens/event", lambda run: _number(run["client"]["tokens_per_event"], 1)),
    ("generator, of a core", lambda run: _share(run["client"]["generator"]["cpu_share"])),
    ("its lag p95 ms", lambda run: _number((run["client"]["generator"]["lag"] or {}).get("p95"), 1, 1e3)),
    ("machine busy", lambda run: _share(run["client"]["generator"]["machine_busy"])),
    ("by others", lambda run: _share(run["others_share"])),
]
SLICE: list[Column] = [
    ("at s", lambda part: _number(part["at"], 0)),
    ("users", lambda part: str(part["users"])),
    ("tokens/s", lambda part: _number(part["tokens_per_second"], 0)),
    ("answers/s", lambda part: _number(part["requests_per_second"], 2)),
    ("TTFT p50 s", lambda part: _number((part["ttft"] or {}).get("p50"), 3)),
    ("p95", lambda part: _number((part["ttft"] or {}).get("p95"), 3)),
    ("token p50 ms", lambda part: _number((part["seconds_per_token"] or {}).get("p50"), 2, 1e3)),
    ("failed", lambda part: str(part["failed"])),
]


def cells(columns: Sequence[Column], rows: Sequence[Run]) -> list[list[str]]:
    return [[title for title, _ in columns], *([value(row) for _, value in columns] for row in rows)]


def aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(lines)


def failures(result: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            str(run["users"]),
            NAMES[run["speculation"]],
            kind,
            str(number),
            run["client"]["failure_details"].get(kind, ""),
        ]
        for run in result["runs"]
        for kind, number in run["client"]["failures"].items()
    ]
    return [["users", "speculation", "failure", "number", "first of them"], *rows] if rows else []


def doubts(result: dict[str, Any]) -> list[str]:
    return [
        f"{run['users']} users, speculation {NAMES[run['speculation']]}: {doubt}"
        for run in result["runs"]
        for doubt in run["doubts"]
    ]


def in_slices(result: dict[str, Any]) -> bool:
    return SCENARIOS[result["options"]["scenario"]].in_slices


def memory(result: dict[str, Any]) -> list[str]:
    """Of a service on this machine, where a run is told over time."""
    return [
        f"{run['users']} users, speculation {NAMES[run['speculation']]}: {before['total']:.0f} MiB resident before, "
        f"{after['total']:.0f} MiB after"
        for run in result["runs"]
        if all(run["memory_mib"])
        for before, after in [run["memory_mib"]]
    ]


def heading(result: dict[str, Any]) -> str:
    options, objectives = result["options"], result["options"]["objectives"]
    about = SCENARIOS[options["scenario"]].about
    return (
        f"Scenario {options['scenario']}: {about}; {options['duration']:g} s for each run after {options['warm_up']:g} "
        f"s of warm-up, answers of at most {options['max_tokens']} tokens, greedy. In time: first token within "
        f"{objectives['ttft']:g} s and {1e3 * objectives['seconds_per_token']:g} ms per further token. "
        f"On {result['machine']['name']}, {result['taken_at']}."
    )


def text(result: dict[str, Any]) -> str:
    parts = [heading(result)]
    parts.append("As clients saw it:\n" + aligned(cells(CLIENT, result["runs"])))
    parts.append(
        "As the service counted it, and what the load generator cost:\n" + aligned(cells(SERVER, result["runs"]))
    )
    if in_slices(result):
        for run in result["runs"]:
            title = f"Over time, {run['users']} users, speculation {NAMES[run['speculation']]}:"
            parts.append(f"{title}\n{aligned(cells(SLICE, run['client']['slices']))}")
        parts += ["Memory: " + "; ".join(memory(result))] if memory(result) else []
    if table := failures(result):
        parts.append("Failures:\n" + aligned(table))
    else:
        parts.append("No request failed.")
    if found := doubts(result):
        parts.append("Take with care:\n" + "\n".join(f"- {doubt}" for doubt in found))
    return "\n\n".join(parts) + "\n"


def write_json(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")


def write(result: dict[str, Any], folder: Path) -> None:
    write_json(result, folder)
    (folder / "report.txt").write_text(text(result))
    pictures = {"by users": plots.by_users(result["runs"], result["options"]["objectives"])}
    if in_slices(result):
        pictures["over time"] = plots.over_time(result["runs"])
    for name, picture in pictures.items():
        (folder / f"{name.replace(' ', '-')}.png").write_bytes(picture)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        result=result,
        heading=heading(result),
        tables={
            "As clients saw it": cells(CLIENT, result["runs"]),
            "As the service counted it, and what the load generator cost": cells(SERVER, result["runs"]),
            "Failures": failures(result),
            **(
                {
                    f"Over time: {run['users']} users, speculation {NAMES[run['speculation']]}": cells(
                        SLICE, run["client"]["slices"]
                    )
                    for run in result["runs"]
                }
                if in_slices(result)
                else {}
            ),
        },
        doubts=doubts(result),
        memory=memory(result) if in_slices(result) else [],
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
    )
    (folder / "report.html").write_text(page)
