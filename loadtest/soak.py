"""Send thousands of requests of random kinds, sizes and parameters, drop a fifth of them, and check that nothing leaks.

    python -m loadtest.soak [--requests 2000] [--url http://...]

Without --url it starts `flashserve serve` with the FLASH_* variables that are set, and stops it at the end. It checks
that every request that was not dropped got its answer or the expected error; that a question sent several times (by
either route, streamed or not, with or without speculation) got the same answer each time; that afterwards no request,
slot, child process, open file or KV block is left; and that the second half of the requests did not increase memory.
The last line of standard output is one JSON object; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx
from tqdm import tqdm

from loadtest.client import Answer, Disconnected, Question, ask
from loadtest.mixture import Mixture, Planned
from loadtest.service import Exit, Footprint, footprint, metric, service

MIB = 1024 * 1024
QUIET_SECONDS = 60.0  # at most until the last dropped request is gone
SAMPLES = 8  # measurements of memory, a quarter of a second apart; the median is used
MORE_FILES = 4  # allowed difference of open files between the halves


@dataclass
class Record:
    """Outcomes, times and answers of all requests."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, outcome)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of answers, by kind
    texts: dict[Question, set[str]] = field(default_factory=lambda: defaultdict(set))
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)

    def usual_seconds(self) -> float:
        return statistics.median(times) if (times := [t for each in self.seconds.values() for t in each]) else 0.5


async def send_all(url: str, plans: list[Planned], concurrency: int, record: Record, progress: Any) -> None:
    left = iter(plans)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one_client() -> None:
            for plan in left:
                await send(client, plan, record)
                progress.update()

        await asyncio.gather(*(one_client() for _ in range(concurrency)))


async def send(client: httpx.AsyncClient, plan: Planned, record: Record) -> None:
    disconnect, begun = plan.disconnect, time.monotonic()
    if disconnect is not None and disconnect.at == "wait":
        disconnect = replace(disconnect, amount=disconnect.amount * record.usual_seconds())
    try:
        answer = await ask(client, plan.question, plan.variant, disconnect)
    except Disconnected:
        record.rows[plan.kind, "dropped"] += 1
        return
    except Exception as error:
        # Every exception is a failure to report: a broken connection, a stream cut short, an answer that is not JSON.
        record.rows[plan.kind, "failed"] += 1
        record.failures.append(f"{plan.kind} by {plan.variant}: {error!r}")
        return
    complaint = wrong_with(plan, answer)
    if complaint is not None:
        record.rows[plan.kind, "failed"] += 1
        record.failures.append(f"{plan.kind} by {plan.variant}: {complaint}")
    elif not plan.valid:
        record.rows[plan.kind, "refused"] += 1
    else:
        record.rows[plan.kind, "answered"] += 1
        record.seconds[plan.kind].append(time.monotonic() - begun)
        record.texts[plan.question].add(answer.texts[0])
        record.num_tokens += answer.usage["completion_tokens"]


def wrong_with(plan: Planned, answer: Answer) -> str | None:
    if answer.status not in plan.statuses:
        return f"status {answer.status}, expected {sorted(plan.statuses)}: {answer.error or answer.texts}"
    if answer.status != 200:
        return None if answer.error.get("message") and answer.error.get("code") else "the refusal has no envelope"
    if answer.error:
        return f"an error in the stream: {answer.error}"
    if len(answer.texts) != plan.variant.n or not all(reason in ("stop", "length") for reason in answer.finish_reasons):
        return f"{len(answer.texts)} choices, ended by {answer.finish_reasons}"
    tokens, most = answer.usage["completion_tokens"], plan.variant.n * plan.question.sampling["max_tokens"]
    return None if 0 < tokens <= most else f"{tokens} tokens where at most {most} were asked for"


def remains(client: httpx.Client) -> dict[str, float]:
    """Read the figures that are all 0 in an idle service."""
    health, text = client.get("/health").json(), client.get("/metrics").text
    return {
        "requests": health["requests"],
        "requests at workers": sum(worker["requests"] for worker in health["workers"]),
        "running": metric(text, "flash_requests_running"),
        "waiting": metric(text, "flash_requests_waiting"),
        "KV in use": metric(text, "flash_kv_cache_usage_ratio"),
        "workers down": len(health["workers"]) - metric(text, "flash_worker_up"),
    }


def when_idle(client: httpx.Client, num_processes: int | None) -> tuple[dict[str, float], list[Footprint]]:
    """Wait until the service is idle, at most QUIET_SECONDS; return what remains, and a few samples of its memory."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        found = footprint(client)
        settled = found is None or num_processes is None or found.num_processes == num_processes
        if settled and not any(remains(client).values()):
            break
        time.sleep(0.2)
    samples = []
    for _ in range(SAMPLES):
        time.sleep(0.25)
        if (found := footprint(client)) is not None:
            samples.append(found)
    return remains(client), samples


@dataclass(frozen=True)
class Snapshot:
    """The idle service before the soak, after the first half of the requests, or after the second."""

    left: dict[str, float]
    samples: list[Footprint]

    @property
    def mib(self) -> dict[str, float]:
        """Median resident MiB of each part and of the total."""
        parts = {name: [getattr(sample, name) for sample in self.samples] for name in ("api", "workers", "media")}
        parts["total"] = [sample.total for sample in self.samples]
        return {name: round(statistics.median(values) / MIB, 1) for name, values in parts.items() if values}


def checks(
    record: Record,
    snapshots: list[Snapshot],
    outcomes: dict[str, float],
    *,
    exact: bool,
    growth: float,
    num_to_drop: int,
) -> dict[str, str]:
    """Return a complaint for each check, empty if it passed. `exact`: equal questions must have equal answers."""
    before, first, second = snapshots
    differing = [texts for texts in record.texts.values() if len(texts) > 1]
    dropped = sum(number for (_, outcome), number in record.rows.items() if outcome == "dropped")
    found = {
        "as many were dropped as should be": "" if dropped >= 0.9 * num_to_drop else f"{dropped} of {num_to_drop}",
        "every request got what it should": "; ".join(record.failures[:5]),
        "a question has one answer": f"{len(differing)} have several: {differing[:2]}" if differing and exact else "",
        "nothing is left": ", ".join(f"{name}: {number:g}" for name, number in second.left.items() if number),
        "no answer failed or timed out inside": ", ".join(f"{k}: {v:g}" for k, v in outcomes.items() if v),
    }
    if first.samples and second.samples:
        processes = {sample.num_processes for sample in (*before.samples, *second.samples)}
        files = second.samples[-1].num_files - first.samples[-1].num_files
        ratio = second.mib["total"] / first.mib["total"] - 1
        found["processes are as they were"] = "" if len(processes) == 1 else f"{sorted(processes)}"
        found["no open file is left"] = f"{files} more" if files > MORE_FILES else ""
        found[f"memory within {growth:.0%}"] = "" if abs(ratio) <= growth else f"{ratio:+.1%}"
    return found


def print_tables(record: Record, snapshots: list[Snapshot]) -> None:
    outcomes = ("answered", "refused", "dropped", "failed")
    print(f"{'kind':10}" + "".join(f"{name:>10}" for name in outcomes) + f"{'p50 s':>10}{'p99 s':>10}")
    kinds = sorted({kind for kind, _ in record.rows})
    for kind in [*kinds, "all"]:
        counts = [sum(n for (k, o), n in record.rows.items() if o == name and kind in (k, "all")) for name in outcomes]
        times = sorted(t for k, each in record.seconds.items() for t in each if kind in (k, "all"))
        quantiles = [f"{times[int(q * (len(times) - 1))]:10.2f}" for q in (0.5, 0.99)] if times else ["", ""]
        print(f"{kind:10}" + "".join(f"{count:10}" for count in counts) + "".join(quantiles))
    if snapshots[0].samples:
        columns = ("api", "workers", "media", "total", "processes", "api files")
        print(f"\n{'memory, MiB':16}" + "".join(f"{name:>11}" for name in columns))
        for name, snapshot in zip(("at the start", "after half", "at the end"), snapshots, strict=True):
            parts, last = snapshot.mib, snapshot.samples[-1]
            row = "".join(f"{parts[part]:11.1f}" for part in ("api", "workers", "media", "total"))
            print(f"{name:16}{row}{last.num_processes:11}{last.num_files:11}")


def soak(url: str, options: argparse.Namespace) -> dict[str, Any]:
    record, snapshots = Record(), []
    with httpx.Client(base_url=url, timeout=60) as client:
        health = client.get("/health").json()
        engine = health["engine"]
        mixture = Mixture(
            options.seed,
            num_questions=max(12, options.requests // 10),
            num_frames=max(1, min(8, engine["max_model_len"] // 2 // engine["tokens_per_image"])),
            max_tokens=options.max_tokens,
        )
        plans = mixture.plans(options.requests, abort_share=options.abort_share)
        before = Snapshot(*when_idle(client, None))
        snapshots.append(before)
        num_processes = before.samples[-1].num_processes if before.samples else None
        begun = time.monotonic()
        with tqdm(total=len(plans), unit="requests", file=sys.stderr) as progress:
            for half in (plans[: len(plans) // 2], plans[len(plans) // 2 :]):
                asyncio.run(send_all(url, half, options.concurrency, record, progress))
                snapshots.append(Snapshot(*when_idle(client, num_processes)))
        seconds = time.monotonic() - begun
        text = client.get("/metrics").text
    outcomes = {name: metric(text, "flash_requests_total", outcome=name) for name in ("error", "timeout")}
    outcomes["worker restarts"] = metric(text, "flash_worker_restarts_total")
    print_tables(record, snapshots)
    return {
        "requests": len(plans),
        "concurrency": options.concurrency,
        "seconds": round(seconds, 1),
        "tokens": record.num_tokens,
        "questions": len(record.texts),
        "engine": engine,
        **{
            o: sum(n for (_, one), n in record.rows.items() if one == o)
            for o in ("answered", "refused", "dropped", "failed")
        },
        "memory_mib": [snapshot.mib for snapshot in snapshots],
        "samples": [[asdict(sample) for sample in snapshot.samples] for snapshot in snapshots]
        if options.samples
        else None,
        "checks": checks(
            record,
            snapshots,
            outcomes,
            exact=engine["dtype"] == "float32",
            growth=options.max_growth,
            num_to_drop=sum(plan.disconnect is not None for plan in plans),
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--url", help="a service that runs already; without it, one is started")
    parser.add_argument("--requests", type=int, default=2000, help="requests to send (default 2000)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in progress (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other requests (default 0)")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="each request asks for 1 to this many tokens (default 64)"
    )
    parser.add_argument(
        "--abort-share", type=float, default=0.2, help="share of requests that the client drops (default 0.2)"
    )
    parser.add_argument(
        "--max-growth",
        type=float,
        default=0.02,
        help="allowed growth of memory between the halves, as a share (default 0.02)",
    )
    parser.add_argument("--samples", action="store_true", help="put every measurement of memory into the JSON")
    options = parser.parse_args()
    exited = Exit()
    with service(options.url, exited) as url:
        result = soak(url, options)
    if options.url is None:
        result["checks"] |= {
            "it stopped well": "" if exited.exit_code == 0 else f"exit code {exited.exit_code}",
            "no process outlived it": f"{exited.children_left} did" if exited.children_left else "",
            "its log has no traceback": exited.log[exited.log.find("Traceback") :][:2000]
            if "Traceback" in exited.log
            else "",
        }
    print()
    for check, complaint in result["checks"].items():
        print(f"{'FAILED' if complaint else 'ok':8}{check}{': ' if complaint else ''}{complaint}")
    result["ok"] = not any(result["checks"].values())
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps({"machine": machine, "command": sys.argv, **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
