"""What scaling and the gateway ask for is there: a real Prometheus scrapes a real server, idle and under load."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.k8s.manifests import K8S, needs_kubectl, of_kind, one, picker_specs, queries, render
from tests.monitoring.prometheus import Prometheus, free_port, needs_prometheus
from tests.service.server import Server

pytestmark = [needs_kubectl, pytest.mark.slow]

POD = "flashserve-0"
BATCH, CLIENTS = 2, 5  # so that three wait
PATIENCE = 120.0


class PatientServer(Server):
    def _await(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        return super()._await(condition, max(seconds, PATIENCE))


class PodPrometheus(Prometheus):
    """Scrape one server every second, with the labels that the operator would give a pod of the PodMonitor."""

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
        super().__init__(folder, yaml.safe_dump(config), free_port())

    def single(self, expression: str) -> float:
        """Return the one value of an expression, as KEDA reads it."""
        ((_, value),) = self.value(expression)
        return value


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
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodPrometheus]:
    prometheus = PodPrometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://"))
    yield prometheus
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
def test_an_idle_service_has_a_value_for_every_trigger(prometheus: PodPrometheus) -> None:
    """Not an empty answer, nor a NaN: KEDA would take either for an error."""
    for trigger, query in queries(render("cpu", "autoscaling-keda")).items():
        value = prometheus.single(query)
        assert not math.isnan(value), trigger
        assert value < 1, trigger


@needs_prometheus
def test_every_trigger_rises_under_load(server: Server, prometheus: PodPrometheus) -> None:
    triggers = queries(render("cpu", "autoscaling-keda"))
    with load(server):
        wait_for(lambda: prometheus.single(triggers["waiting"]) == CLIENTS - BATCH)
        wait_for(lambda: prometheus.single(triggers["in-flight"]) == CLIENTS)
        wait_for(lambda: prometheus.single(triggers["time-to-first-token"]) > 0)
    wait_for(lambda: prometheus.single(triggers["in-flight"]) == 0)


@needs_prometheus
def test_the_hpa_finds_its_metrics_by_pod(server: Server, prometheus: PodPrometheus) -> None:
    waiting, running = (adapter_queries()[f"flash_requests_{state}"] for state in ("waiting", "running"))
    with load(server):
        wait_for(lambda: prometheus.value(waiting) == [({"pod": POD}, CLIENTS - BATCH)])
        wait_for(lambda: prometheus.value(running) == [({"pod": POD}, BATCH)])


@needs_prometheus
def test_the_adapters_rule_finds_these_metrics_and_no_others(prometheus: PodPrometheus) -> None:
    (rule,) = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter-rules.yaml").read_text())["rules"]["custom"]
    series = prometheus.get("series", **{"match[]": rule["seriesQuery"]})
    assert {each["__name__"] for each in series} == adapter_queries().keys()


@needs_prometheus
def test_what_cannot_be_seen_is_no_zero(prometheus: PodPrometheus) -> None:
    """No answer keeps replicas; a zero would take them away while Prometheus has lost its targets."""
    for trigger in ("waiting", "in-flight"):
        assert (
            prometheus.value(queries(render("cpu", "autoscaling-keda"))[trigger].replace('"flashserve"', '"elsewhere"'))
            == []
        )


def test_the_picker_reads_all_three_of_its_metrics(server: Server) -> None:
    specs = picker_specs(render("cpu", "gateway"))
    assert {key: as_the_picker_reads(server, spec) for key, spec in specs.items()} == dict.fromkeys(specs, 0)
    with load(server):
        wait_for(lambda: as_the_picker_reads(server, specs["queuedRequestsSpec"]) == CLIENTS - BATCH)
        wait_for(lambda: as_the_picker_reads(server, specs["runningRequestsSpec"]) == BATCH)
        wait_for(lambda: as_the_picker_reads(server, specs["kvUsageSpec"]) == 1)
        # Without the label it would read the first series: requests that no worker has yet, mostly none.
        assert as_the_picker_reads(server, "flash_requests_waiting") == 0
