"""Instances behind nginx are restarted one after the other under load, as Kubernetes would: does a request fail?

    python -m loadtest.rolling [--instances 2] [--users 8] [--manifest k8s/base/deployment.yaml] [--pre-stop 5] ...

Each instance's end follows the order of a pod's: it leaves the load balancer's list (nginx is reloaded, --lag seconds
late, as endpoints are) while preStop's sleep runs and it serves on; then SIGTERM, and it drains; where it is still
there at the end of the grace period, SIGKILL, which counts as a failure. Its successor joins the list when /readyz
says so. Timings come from the manifest where there is one, and from options before that. Needs nginx. The last line
of standard output is one JSON object; the exit code is 1 where a request failed, a process was killed or did not end
with code 0, or no load was there during a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import jinja2
import yaml

from loadtest import measure, scenarios
from loadtest.figures import Objectives, client_figures
from loadtest.measure import Options
from loadtest.service import ROOT, START_SECONDS

MANIFEST = ROOT / "k8s" / "base" / "deployment.yaml"
SETTINGS = ROOT / "k8s" / "base" / "flashserve.env"
PAUSE = 2.0  # seconds of load before, between and after the restarts


@dataclass(frozen=True)
class Timings:
    """Of a pod's end, in seconds. The defaults are for a place without manifests."""

    pre_stop: float = 5.0
    drain: float = 30.0
    grace: float = 60.0

    def check(self) -> Timings:
        if self.grace <= self.pre_stop + self.drain:
            raise SystemExit(f"grace ({self.grace:g} s) must exceed preStop + drain ({self.pre_stop + self.drain:g} s)")
        return self


def timings_of(manifest: Path, settings: Path) -> Timings:
    """What a Deployment and the settings beside it say."""
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
    """`flashserve serve` on a free port."""

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


class Nginx:
    """Debian's nginx, unprivileged, on a free port, with its configuration in a folder of ours."""

    def __init__(self, folder: Path, instances: list[Instance]) -> None:
        self.folder, self.port = folder, free_port()
        self.config = folder / "nginx.conf"
        self.write(instances)
        self.process = subprocess.Popen([binary(), "-p", str(folder), "-c", str(self.config), "-e", "error.log"])
        wait_for(
            lambda: httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200, self.process, folder / "error.log"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, instances: list[Instance]) -> None:
        template = (Path(__file__).parent / "nginx.conf.j2").read_text()
        addresses = [instance.address for instance in instances]
        self.config.write_text(
            jinja2.Template(template, trim_blocks=True).render(
                folder=self.folder, port=self.port, instances=addresses, as_root=os.geteuid() == 0
            )
        )

    def reload(self, instances: list[Instance]) -> None:
        """New connections go to these; the old worker ends with its last stream."""
        self.write(instances)
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        terminate(self.process)


def terminate(process: subprocess.Popen[bytes]) -> None:
    """With SIGTERM, or after 10 s with SIGKILL."""
    process.send_signal(signal.SIGTERM)  # which one that has ended does not get
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


@contextmanager
def loaded(url: str, users: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load until the block is left; then the figures are in what was yielded."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        stop = Path(folder) / "stop"
        asked = Options(
            scenario="chat", warm_up=0, max_tokens=options.max_tokens, stock=32, timeout=options.timeout,
            keep_alive=False, max_requests=1_000_000,
        )  # fmt: skip
        stock = scenarios.draw(scenarios.SCENARIOS["chat"], asked.stock, seed=0, max_tokens=asked.max_tokens)
        stages = scenarios.steady(users, options.max_seconds)
        plan = measure.plan_for(url, asked, stock, stages, "auto", stop=str(stop))
        errors: list[BaseException] = []

        def send() -> None:
            try:
                outcome = measure.generate(plan)
                found.update(client_figures(outcome, Objectives()), seconds=outcome.window[1])
            except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
                errors.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield found
        finally:
            stop.touch()
            thread.join()
        if errors:
            raise errors[0]


def end(instance: Instance, nginx: Nginx, others: list[Instance], timings: Timings, lag: float) -> dict[str, Any]:
    """A pod's termination: preStop and the load balancer's list at once, then SIGTERM, then SIGKILL."""
    began = time.monotonic()
    leaves = threading.Timer(lag, nginx.reload, (others,))
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


def roll(options: argparse.Namespace, timings: Timings) -> dict[str, Any]:
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
        nginx = Nginx(folder, instances)
        stack.callback(nginx.stop)
        with loaded(nginx.url, options.users, options) as found:
            time.sleep(PAUSE)
            for number, old in enumerate(list(instances)):
                successor = None
                if options.surge:  # maxSurge: the successor is ready before the old one goes
                    successor = start(f"second-{number}")
                    successor.await_ready()
                    instances.append(successor)
                    nginx.reload(instances)
                instances.remove(old)
                ends.append(end(old, nginx, instances, timings, options.lag))
                print(f"instance {number}: {ends[-1]}", file=sys.stderr, flush=True)
                if successor is None:
                    successor = start(f"second-{number}")
                    successor.await_ready()
                    instances.append(successor)
                    nginx.reload(instances)
                time.sleep(PAUSE)
        return {"ends": ends, "client": found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.rolling", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--instances", type=int, default=2, choices=range(2, 9))
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
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
    given = {name: value for name in asdict(timings) if (value := getattr(options, name)) is not None}
    timings = Timings(**(asdict(timings) | given)).check()
    binary()
    result = {"timings": asdict(timings), "source": str(options.manifest.name), **roll(options, timings)}
    client = result["client"]
    failed = sum(client["failures"].values())
    well = all(one["exit_code"] == 0 and not one["killed"] for one in result["ends"])
    result["ok"] = not failed and well and client["answered"] > 0
    print(f"{client['sent']} requests in {client['seconds']:.0f} s, {failed} failed {client['failures'] or ''}")
    for kind, words in client["failure_details"].items():
        print(f"  {kind}: {words}")
    for number, one in enumerate(result["ends"]):
        how = "killed" if one["killed"] else f"exit code {one['exit_code']}"
        print(f"instance {number}: gone after {one['seconds']} s, {how}")
    kept = ("sent", "answered", "failures", "seconds", "ttft", "longest_gap")
    print(json.dumps(result | {"client": {name: client[name] for name in kept}}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
