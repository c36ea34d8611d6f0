"""A whole load test: for each number of users and each way of decoding, one run of the generator, with what the
service says of itself before and after."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import msgspec
import psutil

from loadtest import figures, scenarios, scrape
from loadtest.asking import Question, Way, chat_body
from loadtest.figures import Objectives, Trust
from loadtest.plan import Outcome, Plan, Prepared
from loadtest.service import ROOT, footprint, processor_seconds

PATH = "/v1/chat/completions"
Speculation = Literal["auto", "off"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Options:
    scenario: str = "mixed"
    users: tuple[int, ...] = (1, 4, 16, 64)
    duration: float = 30.0
    warm_up: float = 3.0
    speculation: tuple[Speculation, ...] = ("off", "auto")
    objectives: Objectives = field(default_factory=Objectives)
    trust: Trust = field(default_factory=Trust)
    max_tokens: int = 128
    stock: int = 128
    seed: int = 0
    timeout: float = 120.0
    max_requests: int = 20_000
    keep_alive: bool = True
    api_key: str | None = None
    model: str | None = None


def run(url: str, options: Options, metrics: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One run after the other, as soon as it is done; speculation off and on take turns at each number of users."""
    scenario = scenarios.SCENARIOS[options.scenario]
    stock = scenarios.draw(scenario, options.stock, seed=options.seed, max_tokens=options.max_tokens)
    addresses = list(metrics) or [f"{url.rstrip('/')}/metrics"]
    for users in options.users:
        for speculation in options.speculation:
            plan = plan_for(url, options, stock, scenario.stages(users, options.duration), speculation)
            before, memory, work = scrape.scrape(addresses), _memory(url), Work.so_far(url)
            outcome = generate(plan)
            after, done = scrape.scrape(addresses), Work.so_far(url)
            told = after - before if before is not None and after is not None else None
            found: dict[str, Any] = {
                "users": users,
                "speculation": speculation,
                "client": figures.client_figures(outcome, options.objectives),
                "server": scrape.server_figures(told) if told is not None else None,
                "memory_mib": [memory, _memory(url)],
                "others_share": done.share_of_others(work),
            }
            found["doubts"] = figures.doubts(found, outcome, options.trust, options.objectives)
            yield found


def generate(plan: Plan) -> Outcome:
    """The plan carried out, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        told, found = Path(folder) / "plan", Path(folder) / "outcome"
        told.write_bytes(msgspec.msgpack.encode(plan))
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        limit = sum(seconds for seconds, _ in plan.stages) + plan.timeout + 120
        command = [sys.executable, "-m", "loadtest.generator", str(told), str(found)]
        done = subprocess.run(command, env=env, timeout=limit, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"the load generator failed:\n{done.stderr[-3000:]}")
        return msgspec.msgpack.decode(found.read_bytes(), type=Outcome)


def plan_for(
    url: str,
    options: Options,
    stock: Sequence[tuple[str, Question]],
    stages: scenarios.Stages,
    speculation: Speculation,
    stop: str | None = None,
) -> Plan:
    (first, users), *others = stages
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if not options.keep_alive:
        headers["Connection"] = "close"
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    own = {} if options.model is None else {"model": options.model}
    way = Way(stream=True, speculation=speculation)
    return Plan(
        url=url,
        path=PATH,
        headers=headers,
        requests=[Prepared(kind, json.dumps(chat_body(asked, way) | own).encode()) for kind, asked in stock],
        stages=[(first + options.warm_up, users), *others],
        warm_up=options.warm_up,
        timeout=options.timeout,
        max_requests=options.max_requests,
        stop=stop,
    )


@dataclass(frozen=True)
class Work:
    """Processor seconds so far: of this machine, busy and all; of the service, where it runs here; of the generator."""

    busy: float
    all: float
    service: float | None
    generator: float

    @classmethod
    def so_far(cls, url: str) -> Work:
        machine, children = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        every = sum(machine)
        return cls(
            busy=every - machine.idle - getattr(machine, "iowait", 0.0),
            all=every,
            service=_local(url, processor_seconds),
            generator=children.ru_utime + children.ru_stime,
        )

    def share_of_others(self, before: Work) -> float | None:
        """What neither the service nor the generator used, as a share of the machine; None for another machine."""
        if self.service is None or before.service is None or self.all <= before.all:
            return None
        ours = self.service - before.service + self.generator - before.generator
        return max(0.0, (self.busy - before.busy - ours) / (self.all - before.all))


def _memory(url: str) -> dict[str, float] | None:
    """Resident MiB by part of the service."""
    if (found := _local(url, footprint)) is None:
        return None
    return {part: round(getattr(found, part) / 2**20, 1) for part in ("api", "workers", "media", "total")}


def _local(url: str, look: Callable[[httpx.Client], Found | None]) -> Found | None:
    """None where the service is another machine's, or not ours to look into."""
    try:
        with httpx.Client(base_url=url, timeout=10) as client:
            return look(client)
    except (httpx.HTTPError, ValueError, KeyError, psutil.Error):
        return None


def as_json(options: Options) -> dict[str, Any]:
    told = asdict(options)
    del told["api_key"]
    return told
