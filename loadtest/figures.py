"""From records to figures: what a run's requests say about throughput, times, goodput and failures.

Times are of requests that began in the window and ended well. Throughput is what was delivered in the window, by
requests of any fate: a request's tokens count as spread evenly between its first text and its end, so that neither
the requests that began before the window nor those that were cut off by its end bend it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.plan import Outcome, Record

QUANTILES = (0.5, 0.95, 0.99)
NUM_SLICES = 12


@dataclass(frozen=True)
class Objectives:
    """Goodput counts the answers that kept to both."""

    ttft: float = 1.0
    seconds_per_token: float = 0.05

    def met_by(self, record: Record) -> bool:
        ttft, per_token = record.ttft, record.seconds_per_token
        return ttft is not None and ttft <= self.ttft and (per_token is None or per_token <= self.seconds_per_token)


@dataclass(frozen=True)
class Trust:
    """How much of the generator's own trouble figures may bear before the report says so."""

    cpu_share: float = 0.7  # of one core
    lag: float = 0.2  # its 95th percentile, as a share of the median time to first token
    standstill: float = 0.5  # seconds that the loop stood still at once
    requests: int = 30
    others: float = 0.1  # of the machine's processors, used by neither the service nor the generator


def client_figures(outcome: Outcome, objectives: Objectives) -> dict[str, Any]:
    opened, closed = outcome.window
    return {
        **_between(outcome.records, opened, closed, objectives),
        "seconds": closed - opened,
        "tokens": sum(record.tokens for record in outcome.records),
        "tokens_by_usage": {
            "accepted": sum(record.accepted for record in outcome.records),
            "rejected": sum(record.rejected for record in outcome.records),
        },
        "sent": len(outcome.records),
        "failures": dict(Counter(record.failure for record in outcome.records if record.failure).most_common()),
        "failure_details": _details(outcome.records),
        "by_kind": {
            kind: _between([r for r in outcome.records if r.kind == kind], opened, closed, objectives)
            for kind in sorted({record.kind for record in outcome.records})
        },
        "slices": slices(outcome, objectives),
        "generator": {
            "cpu_share": outcome.cpu_share,
            "machine_busy": outcome.machine_busy,
            "lag": quantiles(outcome.lag),
            "longest_lag": max(outcome.lag, default=0.0),
        },
    }


def slices(outcome: Outcome, objectives: Objectives) -> list[dict[str, Any]]:
    """The window in equal parts, by when a request began."""
    opened, closed = outcome.window
    step = (closed - opened) / NUM_SLICES
    found = []
    for number in range(NUM_SLICES):
        low, high = opened + number * step, opened + (number + 1) * step
        began = [record for record in outcome.records if low <= record.start < high]
        found.append(
            {
                "at": low + step / 2 - opened,
                "users": max((record.users for record in began), default=0),
                **_between(outcome.records, low, high, objectives),
            }
        )
    return found


def _between(records: Sequence[Record], low: float, high: float, objectives: Objectives) -> dict[str, Any]:
    began = [record for record in records if low <= record.start < high]
    well = [record for record in began if record.failure is None]
    ended = [record for record in records if record.failure is None and low <= record.end < high]
    met = [record for record in ended if objectives.met_by(record)]
    return {
        "began": len(began),
        "answered": len(well),
        "failed": len(began) - len(well),
        "tokens_per_second": sum(_tokens_between(record, low, high) for record in records) / (high - low),
        "requests_per_second": len(ended) / (high - low),
        "goodput": len(met) / (high - low),
        "goodput_share": sum(map(objectives.met_by, well)) / len(began) if began else None,
        "ttft": quantiles([t for record in well if (t := record.ttft) is not None]),
        "seconds_per_token": quantiles([t for record in well if (t := record.seconds_per_token) is not None]),
        "latency": quantiles([record.end - record.start for record in well]),
        "longest_gap": quantiles([record.longest_gap for record in well if record.num_events > 1]),
        "tokens_per_event": sum(r.tokens for r in well) / max(1, sum(r.num_events for r in well)),
    }


def _tokens_between(record: Record, low: float, high: float) -> float:
    if record.first is None or not record.tokens:
        return 0.0
    spread = record.end - record.first
    if record.tokens == 1 or spread <= 0:
        return record.tokens if low <= record.first < high else 0.0
    inside = max(0.0, min(high, record.end) - max(low, record.first))
    return (low <= record.first < high) + (record.tokens - 1) * inside / spread


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest rank; with their mean, number and the largest. None where there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{q * 100:g}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}
    return {**found, "max": ordered[-1], "mean": sum(ordered) / len(ordered), "number": len(ordered)}


def _details(records: Sequence[Record]) -> dict[str, str]:
    """The first words that came with each kind of failure."""
    found: dict[str, str] = {}
    for record in records:
        if record.failure and record.detail:
            found.setdefault(record.failure, record.detail)
    return found


def doubts(run: dict[str, Any], outcome: Outcome, trust: Trust, objectives: Objectives) -> list[str]:
    """Why the figures of a run should not be taken at their word; empty where nothing speaks against them."""
    client, server = run["client"], run["server"]
    generator, ttft = client["generator"], client["ttft"]
    found = []
    if generator["cpu_share"] > trust.cpu_share:
        found.append(f"the load generator used {generator['cpu_share']:.0%} of a core: it may be what was measured")
    lag = generator["lag"]
    if ttft and lag and lag["p95"] > trust.lag * ttft["p50"]:
        found.append(
            f"the load generator's loop was late by {1e3 * lag['p95']:.0f} ms (p95), against a median time to first "
            f"token of {1e3 * ttft['p50']:.0f} ms"
        )
    if generator["longest_lag"] > trust.standstill:
        found.append(f"the load generator stood still for {generator['longest_lag']:.1f} s at once")
    if (run["others_share"] or 0) > trust.others:
        found.append(f"other processes used {run['others_share']:.0%} of the machine's processors")
    if client["answered"] < trust.requests:
        found.append(f"only {client['answered']} requests were measured: high percentiles mean little")
    if outcome.truncated:
        found.append("the run ended early, at --max-requests")
    if server is None:
        return found
    told, counted = client["tokens"], server["generation_tokens"]
    if abs(told - counted) > 0.01 * max(told, counted):
        found.append(f"clients were told of {told:.0f} tokens, the service counted {counted:.0f}")
    if (server["encoder_cache_hit_share"] or 0) > 0.02:
        found.append(
            f"{server['encoder_cache_hit_share']:.0%} of the media were in the service's cache: times to first token "
            "are shorter than with new ones"
        )
    for what, name, mean, slack in (
        ("for the first token", "ttft", "mean_ttft", 0.05 * objectives.ttft),
        ("for each further token", "seconds_per_token", "mean_seconds_per_token", 0.2 * objectives.seconds_per_token),
    ):
        seen, said = client[name], server[mean]
        if seen and said and seen["mean"] > 1.5 * said + slack:
            found.append(
                f"clients waited {1e3 * seen['mean']:.1f} ms {what}, the service says {1e3 * said:.1f} ms: something "
                "between them takes the rest"
            )
    if server["worker_restarts"]:
        found.append(f"{server['worker_restarts']:.0f} workers died and were replaced")
    return found
