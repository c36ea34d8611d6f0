"""Restart instances behind nginx in turn under load, as Kubernetes does, and check that no request fails.

    python -m loadtest.rolling [--instances 2] [--users 8] [--manifest k8s/base/deployment.yaml] [--pre-stop 5] ...

Each instance ends as a pod does. While preStop sleeps the instance still serves, and nginx is reloaded without it
--lag seconds later, as endpoints are. Then comes SIGTERM, and the instance drains. If it still runs at the end of the
grace period it gets SIGKILL, which counts as a failure. Its successor joins nginx's list when /readyz answers 200.
Timings are those of the options, or else of the manifest. Needs nginx. The last line of standard output is one JSON
object; the exit code is 1 if a request failed, a process was killed or exited with another code than 0, or no request
was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jinja2
import yaml

from loadtest.client import Question, Variant, ask
from loadtest.prompts import draw
from loadtest.service import ROOT, START_SECONDS

MANIFEST = ROOT / "k8s" / "base" / "deployment.yaml"
SETTINGS = ROOT / "k8s" / "base" / "flashserve.env"
PAUSE = 2.0  # seconds of load before, between and after the restarts
THINK = 1.0  # seconds at most from an answer to the next request: so answers do not all end together


@dataclass(frozen=True)
class Timings:
    """Timings of a pod's end, in seconds. The defaults apply without a manifest."""

    pre_stop: float = 5.0
    drain: float = 30.0
    grace: float = 60.0

    def check(self) -> Timings:
        if self.grace <= self.pre_stop + self.drain:
            raise SystemExit(f"grace ({self.grace:g} s) must exceed preStop + drain ({self.pre_stop + self.drain:g} s)")
        return self


def timings_of(manifest: Path, settings: Path) -> Timings:
    """Read the timings from a Deployment and the settings beside it."""
    pod = yaml.safe_load(manifest.read_text())["spec"]["template"]["spec"]
    (container,) = (one for one in pod["containers"] if "lifecycle" in one)
    hook = container["lifecycle"]["preStop"]
    command = " ".join(hook.get("exec", {}).get("command", ()))
    slept = re.search(r"sleep (\d+)", command)
    env = {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
    if settings.exists():
        env |= dict(re.findall(r"^(FLASH_\w+)=(.*)$", settings.read_text(), re.MULTILINE))
    return Timings(
        pre_stop=float(slept[1] if slept else hook["sleep"]["seconds"]),
        drain=float(env.get("FLASH_DRAIN_TIMEOUT", Timings.drain)),
        grace=float(pod["terminationGracePeriodSeconds"]),
    )


class Instance:
    """Run `flashserve serve` on a free port."""

    def __init__(self, folder: Path, name: str, drain: float) -> None:
        self.log = folder / f"{name}.log"
        self.port = free_port()
        env = {**os.environ, "FLASH_HOST": "127.0.0.1", "FLASH_PORT": str(self.port)}
        env |= {"FLASH_DRAIN_TIMEOUT": str(drain), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"], env=env, stdout=log, stderr=log
            )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def await_ready(self) -> None:
        wait_for(
            lambda: httpx.get(f"http://{self.address}/readyz", timeout=5).status_code == 200, self.process, self.log
        )

    def kill(self) -> None:
        terminate(self.process)


def addresses(instances: list[Instance]) -> list[str]:
    return [instance.address for instance in instances]


class Nginx:
    """Run nginx on a free port, unprivileged, with its configuration in `folder`."""

    def __init__(self, folder: Path, addresses: list[str], *, buffering: bool = False) -> None:
        """buffering: hold answers back as nginx does by default, instead of passing on each token as it comes."""
        self.folder, self.port, self.buffering = folder, free_port(), buffering
        self.config = folder / "nginx.conf"
        self.write(addresses)
        self.process = subprocess.Popen([binary(), "-p", str(folder), "-c", str(self.config), "-e", "error.log"])
        wait_for(
            lambda: httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200, self.process, folder / "error.log"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, addresses: list[str]) -> None:
        template = (Path(__file__).parent / "nginx.conf.j2").read_text()
        self.config.write_text(
            jinja2.Template(template, trim_blocks=True).render(
                folder=self.folder,
                port=self.port,
                addresses=addresses,
                buffering=self.buffering,
                as_root=os.geteuid() == 0,
            )
        )

    def reload(self, addresses: list[str]) -> None:
        """Send new connections to these instances; connections in progress are not cut."""
        self.write(addresses)
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        terminate(self.process)


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Stop a process with SIGTERM, or after 10 s with SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def binary() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise SystemExit("nginx is not installed; on Debian: apt-get install nginx-light")
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"it ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
        with suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.1)
    raise SystemExit(f"not ready within {START_SECONDS} s:\n{log.read_text()[-3000:]}")


@dataclass
class Tally:
    """Count what became of the requests sent so far."""

    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by kind
    details: dict[str, str] = field(default_factory=dict)  # the first message of each kind
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        return self.answered + self.failures.total()

    def fail(self, kind: str, detail: object) -> None:
        self.failures[kind] += 1
        self.details.setdefault(kind, str(detail)[:200])


async def send(client: httpx.AsyncClient, question: Question, tally: Tally) -> None:
    """Send one streamed request and count what became of it. Nothing is sent twice: a retry would hide a failure."""
    try:
        answer = await ask(client, question, Variant(stream=True))
    except httpx.TimeoutException as error:
        tally.fail("timeout", repr(error))
    except httpx.TransportError as error:
        tally.fail("connection", repr(error))
    except ValueError as error:  # a stream without its last event, or a body that is not JSON
        tally.fail("malformed", error)
    else:
        if answer.status != 200:
            tally.fail(f"http {answer.status}", answer.error)
        elif answer.error:
            tally.fail("error event", answer.error)
        else:
            tally.answered += 1


@contextmanager
def loaded(url: str, options: argparse.Namespace) -> Iterator[Tally]:
    """Keep `options.users` users asking until the block ends; yield the tally, complete once the block has ended."""
    tally, over = Tally(), threading.Event()
    questions = itertools.cycle(draw(32, max_tokens=options.max_tokens))
    deadline = time.monotonic() + options.max_seconds

    async def user(number: int, client: httpx.AsyncClient) -> None:
        think = random.Random(number)
        while not over.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(think.uniform(0, THINK))
            await send(client, next(questions), tally)

    async def crowd() -> None:
        new_connections = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=options.timeout, limits=new_connections) as client:
            await asyncio.gather(*(user(number, client) for number in range(options.users)))

    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        users = pool.submit(lambda: asyncio.run(crowd()))
        try:
            yield tally
        finally:
            over.set()
            users.result()
            tally.seconds = time.monotonic() - began


def end(instance: Instance, nginx: Nginx, others: list[Instance], timings: Timings, lag: float) -> dict[str, Any]:
    """End an instance as Kubernetes ends a pod; return how long it took and how it ended."""
    began = time.monotonic()
    leaves = threading.Timer(lag, nginx.reload, (addresses(others),))
    leaves.start()
    time.sleep(timings.pre_stop)
    instance.process.send_signal(signal.SIGTERM)
    killed = False
    try:
        instance.process.wait(timings.grace - timings.pre_stop)
    except subprocess.TimeoutExpired:
        killed = True
        instance.process.kill()
        instance.process.wait()
    seconds = round(time.monotonic() - began, 2)
    leaves.join()
    return {"seconds": seconds, "exit_code": instance.process.returncode, "killed": killed}


def roll(options: argparse.Namespace, timings: Timings) -> tuple[list[dict[str, Any]], Tally]:
    """Restart every instance in turn under load; return how each ended, and what became of the requests."""
    ends: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        instances: list[Instance] = []

        def start(name: str) -> Instance:
            instance = Instance(folder, name, timings.drain)
            stack.callback(instance.kill)
            return instance

        for number in range(options.instances):
            instances.append(start(f"first-{number}"))
        for instance in instances:
            instance.await_ready()
        nginx = Nginx(folder, addresses(instances))
        stack.callback(nginx.stop)
        with loaded(nginx.url, options) as tally:
            time.sleep(PAUSE)
            for number, old in enumerate(list(instances)):
                successor = None
                if options.surge:  # maxSurge: the successor is ready before the old one goes
                    successor = start(f"second-{number}")
                    successor.await_ready()
                    instances.append(successor)
                    nginx.reload(addresses(instances))
                instances.remove(old)
                ends.append(end(old, nginx, instances, timings, options.lag))
                print(f"instance {number}: {ends[-1]}", file=sys.stderr, flush=True)
                if successor is None:
                    successor = start(f"second-{number}")
                    successor.await_ready()
                    instances.append(successor)
                    nginx.reload(addresses(instances))
                time.sleep(PAUSE)
        return ends, tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.rolling", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--instances", type=int, default=2, choices=range(2, 9), help="instances behind nginx (default 2)"
    )
    parser.add_argument("--users", type=int, default=8, help="requests in progress (default 8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer (default 128)")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="a Deployment; its timings are taken")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="its FLASH_* settings, one to a line")
    parser.add_argument("--pre-stop", type=float, help="seconds of preStop; by default the manifest's, or 5")
    parser.add_argument("--drain", type=float, help="FLASH_DRAIN_TIMEOUT; by default the manifest's, or 30")
    parser.add_argument("--grace", type=float, help="terminationGracePeriodSeconds; the manifest's, or 60")
    parser.add_argument("--lag", type=float, default=1.0, help="seconds until the load balancer learns of the end")
    parser.add_argument("--surge", action="store_true", help="start the successor before the old one goes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    parser.add_argument("--max-seconds", type=float, default=1800.0, help="of load, at most")
    options = parser.parse_args()
    timings = timings_of(options.manifest, options.settings) if options.manifest.exists() else Timings()
    overrides = {name: value for name in asdict(timings) if (value := getattr(options, name)) is not None}
    timings = Timings(**(asdict(timings) | overrides)).check()
    binary()
    ends, tally = roll(options, timings)
    well = all(one["exit_code"] == 0 and not one["killed"] for one in ends)
    ok = well and not tally.failures and tally.answered > 0
    print(
        f"{tally.sent} requests in {tally.seconds:.0f} s, {tally.failures.total()} failed {dict(tally.failures) or ''}"
    )
    for kind, detail in tally.details.items():
        print(f"  {kind}: {detail}")
    for number, one in enumerate(ends):
        how = "killed" if one["killed"] else f"exit code {one['exit_code']}"
        print(f"instance {number}: gone after {one['seconds']} s, {how}")
    client = {"sent": tally.sent, "answered": tally.answered, "failures": tally.failures, "seconds": tally.seconds}
    timing = {"timings": asdict(timings), "source": str(options.manifest.name)}
    print(json.dumps({**timing, "ends": ends, "client": client, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
