"""The load itself: locust's users, each of whom asks, reads the stream to its end, and asks again.

    python -m loadtest.generator PLAN OUTCOME      (both msgpack, see plan.py; `python -m loadtest run` starts it)

A process of its own: what it costs can be told apart, and gevent's patches stay in here. Lines are read by
geventhttpclient as they arrive; locust's own FastHttpUser collects 1 KiB before it hands anything on, which would make
every time to first token wrong. No request is ever sent twice.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path
from typing import ClassVar

from locust import LoadTestShape, User, task  # first: gevent patches sockets  # isort: skip
from locust.env import Environment  # isort: skip
from locust.exception import StopUser  # isort: skip

import gevent
import msgspec
import psutil
from gevent import GreenletExit
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from loadtest.plan import Outcome, Plan, Prepared, Record
from loadtest.stream import Malformed, Stream

PAUSE_AFTER_FAILURE = 0.25  # seconds: a service that refuses everything is not asked in a tight loop
TICK = 0.02  # seconds between two looks at how late the loop is
GRACE = 5.0  # seconds beyond a request's own limit until the last is given up


class Load:
    """What all users share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.records: list[Record] = []
        self.began = time.perf_counter()
        self.numbers = count()
        self.users = 0
        self.over = False

    def now(self) -> float:
        return time.perf_counter() - self.began

    @property
    def truncated(self) -> bool:
        return len(self.records) >= self.plan.max_requests


class Asker(User):
    load: ClassVar[Load]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        plan = self.load.plan
        self.http = HTTPClient.from_url(
            plan.url, connection_timeout=plan.timeout, network_timeout=plan.timeout, concurrency=1
        )

    @task
    def turn(self) -> None:
        load = self.load
        number = next(load.numbers)
        if load.over or number >= load.plan.max_requests:
            raise StopUser
        record = self.ask(load.plan.requests[number % len(load.plan.requests)])
        load.records.append(record)
        if record.failure is not None:
            gevent.sleep(PAUSE_AFTER_FAILURE)

    def on_stop(self) -> None:
        self.http.close()

    def ask(self, prepared: Prepared) -> Record:
        load, stream = self.load, Stream()
        record = Record(prepared.kind, load.now(), 0.0, load.users)
        try:
            with gevent.Timeout(load.plan.timeout):
                record.failure = self.read(prepared.body, stream, record)
        except (gevent.Timeout, TimeoutError):
            record.failure = "timeout"
        except GreenletExit:
            record.failure = "unfinished"  # the load is over, and so is the patience
        except Malformed as error:
            record.failure, record.detail = "malformed", str(error)
        except (OSError, HTTPParseError) as error:
            # In the midst of an answer, or before it began?
            record.failure = stream.failure if stream.opened else "connection"
            record.detail = repr(error)[:200]
        record.end = load.now() if stream.last is None or record.failure else stream.last
        stream.fill(record)
        return record

    def read(self, body: bytes, stream: Stream, record: Record) -> str | None:
        """What went wrong, if it did not stop everything; the words of a refusal go to the record."""
        with self.http.request("POST", self.load.plan.path, body, self.load.plan.headers) as response:
            if response.status_code != 200:
                record.detail = bytes(response.read())[:200].decode(errors="replace")
                return f"http {response.status_code}"
            stream.opened = True
            while line := response.readline(b"\n"):
                stream.line(line, self.load.now())
        return stream.failure


class Shape(LoadTestShape):
    """The stages of the plan."""

    def __init__(self, load: Load) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.load = load

    def tick(self) -> tuple[int, float] | None:
        passed, end, load = self.load.now(), 0.0, self.load
        for seconds, users in load.plan.stages:
            end += seconds
            if passed < end and not load.truncated and not load.over:
                load.users = users
                return users, float(max(users, 1))
        load.over = True
        return None


def run(plan: Plan) -> Outcome:
    load = Asker.load = Load(plan)
    environment = Environment(user_classes=[Asker], shape_class=Shape(load), stop_timeout=plan.timeout + GRACE)
    runner = environment.create_local_runner()
    me = psutil.Process()
    lag: list[float] = []
    load.began = time.perf_counter()
    runner.start_shape()
    shaping = runner.shape_greenlet

    # Until the window opens, and then until the last stage is over.
    seconds = sum(seconds for seconds, _ in plan.stages)
    gevent.sleep(plan.warm_up)
    opened, cpu, machine = load.now(), me.cpu_times(), psutil.cpu_times()
    stop = None if plan.stop is None else Path(plan.stop)
    while not load.over and load.now() < seconds and not (stop is not None and stop.exists()):
        due = time.perf_counter() + TICK
        gevent.sleep(TICK)
        lag.append(time.perf_counter() - due)
    closed, cpu_after, machine_after = load.now(), me.cpu_times(), psutil.cpu_times()
    load.over = True

    # Those under way may end; they count for times, and for tokens up to the end of the window.
    if shaping is not None:
        shaping.join(plan.timeout + 2 * GRACE)
    runner.quit()
    used = cpu_after.user + cpu_after.system - cpu.user - cpu.system
    every = sum(machine_after) - sum(machine)
    idle = machine_after.idle + machine_after.iowait - machine.idle - machine.iowait
    return Outcome(
        records=load.records,
        window=(opened, closed),
        cpu_share=used / (closed - opened),
        machine_busy=1 - idle / every if every else 0.0,
        lag=sorted(lag),
        truncated=load.truncated,
    )


def main() -> None:
    plan, outcome = map(Path, sys.argv[1:])
    result = run(msgspec.msgpack.decode(plan.read_bytes(), type=Plan))
    outcome.write_bytes(msgspec.msgpack.encode(result))


if __name__ == "__main__":
    main()
