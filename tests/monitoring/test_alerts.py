"""Each alert fires when its condition has lasted, not before, and no longer than it lasts: `promtool test rules`.

A case is a service that does well for some time, then ill, then well again; no alerts but those expected may fire.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.monitoring.prometheus import RULES, alerts, needs_prometheus

HOUR = 60
ONE = '{job="flashserve", instance="a:8000", model="m"}'


def series(name: str, **labels: str) -> str:
    more = "".join(f', {label}="{value}"' for label, value in labels.items())
    return name + ONE.replace("}", more + "}")


UP = 'up{job="flashserve", instance="a:8000"}'
WORKER, RESTARTS = series("flash_worker_up", worker="0"), series("flash_worker_restarts_total", worker="0")
SECOND_WORKER = series("flash_worker_up", worker="1")
RUNNING, WAITING = series("flash_requests_running", worker="0"), series("flash_requests_waiting", worker="0")
KV = series("flash_kv_cache_usage_ratio", worker="0")
GENERATED, PROMPT = series("flash_generation_tokens_total", worker="0"), series("flash_prompt_tokens_total", worker="0")
DRAFTS, ACCEPTED = series("flash_spec_drafts_total", worker="0"), series("flash_spec_accepted_tokens_total", worker="0")
FIRST = series("flash_spec_accepted_tokens_per_position_total", position="0")
STOP, ERROR = series("flash_requests_total", outcome="stop"), series("flash_requests_total", outcome="error")
FULL = series("flash_requests_rejected_total", reason="queue_full")
INVALID = series("flash_requests_rejected_total", reason="invalid_request")
TTFT_IN_TIME, TTFT = (
    series("flash_time_to_first_token_seconds_bucket", le="2.5"),
    series("flash_time_to_first_token_seconds_count"),
)
TPOT_IN_TIME, TPOT = (
    series("flash_time_per_output_token_seconds_bucket", le="0.1"),
    series("flash_time_per_output_token_seconds_count"),
)

# What gauges are, and by how much counters grow in a minute, while all is well.
GAUGES: dict[str, float] = {UP: 1, WORKER: 1, SECOND_WORKER: 1, RUNNING: 4, WAITING: 0, KV: 0.3}
COUNTERS: dict[str, float] = {
    **{RESTARTS: 0, GENERATED: 6000, PROMPT: 3000, DRAFTS: 1000, ACCEPTED: 4000, FIRST: 900},
    **{STOP: 60, ERROR: 0, FULL: 0, INVALID: 0, TTFT_IN_TIME: 60, TTFT: 60, TPOT_IN_TIME: 60, TPOT: 60},
}
CRITICAL, WARNING = "critical", "warning"
Fired = set[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    name: str
    ill: dict[str, float]  # instead of the above
    fires: dict[int, Fired]  # after that many minutes of illness
    well: int = 2 * HOUR  # minutes
    again: int = 40  # minutes after which all is quiet again
    lasts: int | None = None  # minutes of illness, where it ends before the last look
    growing: set[str] = field(default_factory=set)  # gauges that grow by so much a minute


CASES = [
    Case("the service is gone", {UP: 0}, {1: set(), 3: {("FlashServeDown", CRITICAL)}}),
    Case(
        "no worker is up",
        {WORKER: 0, SECOND_WORKER: 0},
        {
            1: set(),
            3: {("FlashServeNoWorker", CRITICAL)},
            17: {("FlashServeNoWorker", CRITICAL), ("FlashServeWorkerDown", WARNING)},
        },
    ),
    Case("one of two workers is down", {WORKER: 0}, {14: set(), 16: {("FlashServeWorkerDown", WARNING)}}),
    Case("a worker dies twice", {RESTARTS: 1}, {10: set()}, lasts=2),
    Case("a worker dies three times", {RESTARTS: 1}, {4: {("FlashServeWorkerRestarts", WARNING)}}, lasts=3),
    Case(
        "nothing moves though requests run",
        {GENERATED: 0, PROMPT: 0, DRAFTS: 0, ACCEPTED: 0, FIRST: 0, STOP: 0, TTFT: 0, TTFT_IN_TIME: 0},
        {1: set(), 5: {("FlashServeStalled", CRITICAL)}},
    ),
    Case(
        "only a long prompt is read",
        {GENERATED: 0, DRAFTS: 0, ACCEPTED: 0, FIRST: 0, STOP: 0, TTFT: 0, TTFT_IN_TIME: 0},
        {10: set()},
    ),
    Case("nobody asks", {**dict.fromkeys(COUNTERS, 0.0), RUNNING: 0}, {90: set()}),
    Case("the queue grows", {WAITING: 1}, {8: set(), 15: {("FlashServeQueueGrowing", WARNING)}}, growing={WAITING}),
    Case("a long queue that does not grow", {WAITING: 3}, {60: set()}),
    Case("there is no room", {FULL: 2}, {10: set(), 25: {("FlashServeRefusing", CRITICAL)}}),
    Case("clients send nonsense", {INVALID: 200}, {60: set()}),
    Case("KV memory is nearly full", {KV: 0.95}, {10: set(), 17: {("FlashServeKVCacheNearlyFull", WARNING)}}),
    Case(
        "all answers fail",
        {STOP: 0, ERROR: 60},
        {
            3: set(),
            10: {("FlashServeErrors", CRITICAL)},
            30: {("FlashServeErrors", CRITICAL), ("FlashServeErrors", WARNING)},
        },
        again=HOUR,
    ),
    Case("some answers fail, for hours", {STOP: 57.6, ERROR: 2.4}, {HOUR: set(), 420: {("FlashServeErrors", WARNING)}}),
    Case("a few answers fail", {STOP: 59.9, ERROR: 0.1}, {420: set()}),
    Case(
        "first tokens are late",
        {TTFT_IN_TIME: 0},
        {
            5: set(),
            13: {("FlashServeFirstTokenSlow", CRITICAL)},
            40: {("FlashServeFirstTokenSlow", CRITICAL), ("FlashServeFirstTokenSlow", WARNING)},
        },
        again=HOUR,
    ),
    Case("a tenth of first tokens is late", {TTFT_IN_TIME: 54}, {420: {("FlashServeFirstTokenSlow", WARNING)}}),
    Case(
        "tokens are slow",
        {TPOT_IN_TIME: 0},
        {
            5: set(),
            13: {("FlashServeOutputSlow", CRITICAL)},
            40: {("FlashServeOutputSlow", CRITICAL), ("FlashServeOutputSlow", WARNING)},
        },
        again=HOUR,
    ),
    Case("a tenth of answers is slow", {TPOT_IN_TIME: 54}, {420: {("FlashServeOutputSlow", WARNING)}}),
    Case(
        "the draft is worse",
        {ACCEPTED: 2000, FIRST: 500},
        {10: set(), 45: {("FlashServeAcceptanceCollapsed", WARNING)}},
        well=4 * HOUR,
    ),
    Case("less is drafted because of the load", {ACCEPTED: 2000}, {90: set()}, well=4 * HOUR),
    Case(
        "nothing is drafted any more",
        {DRAFTS: 0, ACCEPTED: 0, FIRST: 0},
        {10: set(), 45: {("FlashServeDraftingStopped", WARNING)}},
        well=4 * HOUR,
        again=HOUR,
    ),
]


def gauge(*spans: tuple[float, int]) -> str:
    """In promtool's notation: this value for so many minutes."""
    return " ".join(f"{value:g}+0x{minutes - 1}" for value, minutes in spans if minutes)


def counter(*spans: tuple[float, int], start: float = 0) -> str:
    parts = []
    for growth, minutes in spans:
        parts.append(f"{start:.6f}+{growth:g}x{minutes - 1}" if minutes else "")
        start += growth * minutes
    return " ".join(part for part in parts if part)


def staged(case: Case) -> tuple[dict[str, str], dict[int, Fired]]:
    ill = case.lasts or max(case.fires) + 1
    rest = max(max(case.fires) - ill, 0) + case.again
    values: dict[str, str] = {}
    for name, normal in GAUGES.items():
        value = case.ill.get(name, normal)
        spans = ((normal, case.well), (value, ill), (normal, rest + 1))
        grown = f"{gauge(spans[0])} {counter(spans[1])} {gauge(spans[2])}"
        values[name] = grown if name in case.growing else gauge(*spans)
    for name, normal in COUNTERS.items():
        values[name] = counter((normal, case.well), (case.ill.get(name, normal), ill), (normal, rest + 1))
    looks = {case.well + minutes: fired for minutes, fired in case.fires.items()}
    return values, {case.well - 1: set()} | looks | {case.well + ill + rest: set()}


def promtool(folder: Path, values: dict[str, str], looks: dict[int, Fired]) -> None:
    checks = [
        {
            "expr": 'max by (alertname, severity) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": f'{{alertname="{name}", severity="{severity}"}}', "value": 1}
                for name, severity in sorted(fired)
            ],
        }
        for minute, fired in looks.items()
    ]
    test: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": value} for name, value in values.items()],
        "promql_expr_test": checks,
    }
    file = folder / "test.json"  # which is YAML too
    file.write_text(
        json.dumps({"rule_files": [str(path) for path in RULES], "evaluation_interval": "1m", "tests": [test]})
    )
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alerts_fire_while_it_lasts(case: Case, tmp_path: Path) -> None:
    promtool(tmp_path, *staged(case))


@needs_prometheus
def test_a_service_that_nobody_scrapes_is_missed(tmp_path: Path) -> None:
    promtool(tmp_path, {UP: "1+0x59 stale"}, {59: set(), 63: set(), 66: {("FlashServeMissing", CRITICAL)}})


@needs_prometheus
def test_a_single_slow_answer_in_a_quiet_night_wakes_nobody(tmp_path: Path) -> None:
    quiet = {name: counter((0, 120)) for name in COUNTERS}
    one = {name: f"{counter((0, 60))} 1+0x60" for name in (STOP, TTFT, TPOT)}
    gauges = {name: gauge((value, 121)) for name, value in GAUGES.items()} | {RUNNING: "0+0x120"}
    promtool(tmp_path, gauges | quiet | one, {61: set(), 64: set(), 80: set(), 119: set()})


def test_every_alert_has_a_case() -> None:
    fired = {one for case in CASES for each in case.fires.values() for one in each} | {("FlashServeMissing", CRITICAL)}
    assert fired == {(alert["alert"], alert["labels"]["severity"]) for alert in alerts()}
