"""What scaling and the gateway ask for is there: a real Prometheus scrapes a real server, idle and under load."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.k8s.agreement import picker_specs, queries
from tests.k8s.manifests import K8S, needs_kubectl, of_kind, one, render
from tests.service.server import Server

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="prometheus is not installed (Debian: apt-get install prometheus)"
)
pytestmark = [needs_kubectl, pytest.mark.slow]

POD = "flashserve-0"
BATCH, CLIENTS = 2, 5  # so that three wait
PATIENCE = 120.0


class PatientServer(Server):
    def _await(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        return super()._await(condition, max(seconds, PATIENCE))


class Prometheus:
    """Scrapes one server every second, with the labels that the operator would give a pod of the PodMonitor."""

    def __init__(self, folder: Path, target: str) -> None:
        monitor = one(render("cpu", "monitoring"), "PodMonitor")
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        namespace = monitor["metadata"]["namespace"]
        labels = {"namespace": namespace, "pod": POD, "container": "flashserve", "job": "flashserve"}
        scrape = {
            "job_name": "podMonitor/flashserve/flashserve/0",
            "metrics_path": endpoint["path"],
            "static_configs": [{"targets": [target], "labels": labels}],
        }
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
                    *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"),
                ],
                stdout=log,
                stderr=log,
            )
        self.http = httpx.Client(base_url=f"http://{address}", timeout=30)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        answer = self.http.get("/api/v1/query", params={"query": expression}).raise_for_status().json()
        return [(each["metric"], float(each["value"][1])) for each in answer["data"]["result"]]

    def value(self, expression: str) -> float:
        """As KEDA reads it: one element and no more."""
        ((_, value),) = self.query(expression)
        return value

    def is_up(self) -> bool:
        try:
            return self.query("up == 1") != []
        except httpx.HTTPError:  # not yet listening, or not yet serving
            return False

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(30)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = PatientServer(tmp_path_factory.mktemp("server"), {"delay": 0.02}, {"max_num_seqs": BATCH})
    yield server
    assert server.close() == 0, server.log_text()


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://"))
    try:
        wait_for(prometheus.is_up)
        yield prometheus
    finally:
        prometheus.close()


@contextmanager
def load(server: Server) -> Iterator[None]:
    """A few clients that ask again as soon as they were answered; more than are decoded at once."""
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            assert server.chat(max_tokens=200, ignore_eos=True).status_code == 200

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            yield
        finally:
            over.set()
    for each in clients:
        each.result()


def keda() -> dict[str, str]:
    return {where.removeprefix("trigger "): query for where, query in queries(render("cpu", "autoscaling-keda"))}


def adapter_queries() -> dict[str, str]:
    """What prometheus-adapter asks for on behalf of the HPA: its template, filled in as it does."""
    (rule,) = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter-rules.yaml").read_text())["rules"]["custom"]
    (scaler,) = of_kind(render("cpu", "autoscaling-hpa"), "HorizontalPodAutoscaler")
    matchers = f'namespace="{scaler["metadata"]["namespace"]}",pod=~"{POD}"'
    return {
        name: rule["metricsQuery"]
        .replace("<<.Series>>", name)
        .replace("<<.LabelMatchers>>", matchers)
        .replace("<<.GroupBy>>", "pod")
        for name in (metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"])
    }


def as_the_picker_reads(server: Server, spec: str) -> float:
    """The first series of that name which has the label, and no other."""
    name, _, label = spec.rstrip("}").partition("{")
    key, _, value = label.partition("=")
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return next(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and (not key or sample.labels.get(key) == value.strip('"'))
    )


@needs_prometheus
def test_an_idle_service_has_a_value_for_every_trigger(prometheus: Prometheus) -> None:
    """Not an empty answer, nor a NaN: KEDA would take either for an error."""
    for trigger, query in keda().items():
        value = prometheus.value(query)
        assert not math.isnan(value), trigger
        assert value < 1, trigger


@needs_prometheus
def test_every_trigger_rises_under_load(server: Server, prometheus: Prometheus) -> None:
    triggers = keda()
    with load(server):
        wait_for(lambda: prometheus.value(triggers["waiting"]) == CLIENTS - BATCH)
        wait_for(lambda: prometheus.value(triggers["in-flight"]) == CLIENTS)
        wait_for(lambda: prometheus.value(triggers["time-to-first-token"]) > 0)
    wait_for(lambda: prometheus.value(triggers["in-flight"]) == 0)


@needs_prometheus
def test_the_hpa_finds_its_metrics_by_pod(server: Server, prometheus: Prometheus) -> None:
    waiting, running = (adapter_queries()[f"flash_requests_{state}"] for state in ("waiting", "running"))
    with load(server):
        wait_for(lambda: prometheus.query(waiting) == [({"pod": POD}, CLIENTS - BATCH)])
        wait_for(lambda: prometheus.query(running) == [({"pod": POD}, BATCH)])


@needs_prometheus
def test_the_adapters_rule_finds_these_metrics_and_no_others(prometheus: Prometheus) -> None:
    (rule,) = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter-rules.yaml").read_text())["rules"]["custom"]
    series = prometheus.http.get("/api/v1/series", params={"match[]": rule["seriesQuery"]}).json()["data"]
    assert {each["__name__"] for each in series} == adapter_queries().keys()


@needs_prometheus
def test_what_cannot_be_seen_is_no_zero(prometheus: Prometheus) -> None:
    """No answer keeps replicas; a zero would take them away while Prometheus has lost its targets."""
    for trigger in ("waiting", "in-flight"):
        assert prometheus.query(keda()[trigger].replace('"flashserve"', '"elsewhere"')) == []


def test_the_picker_reads_all_three_of_its_metrics(server: Server) -> None:
    specs = picker_specs(render("cpu", "gateway"))
    assert {key: as_the_picker_reads(server, spec) for key, spec in specs.items()} == dict.fromkeys(specs, 0)
    with load(server):
        wait_for(lambda: as_the_picker_reads(server, specs["queuedRequestsSpec"]) == CLIENTS - BATCH)
        wait_for(lambda: as_the_picker_reads(server, specs["runningRequestsSpec"]) == BATCH)
        wait_for(lambda: as_the_picker_reads(server, specs["kvUsageSpec"]) == 1)
        # Without the label it would read the first series: requests that no worker has yet, mostly none.
        assert as_the_picker_reads(server, "flash_requests_waiting") == 0
