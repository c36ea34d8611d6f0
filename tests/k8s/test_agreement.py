"""Check that manifests agree with the code and with each other, in every overlay with every component.

The API server accepts a probe of a route that does not exist, a setting that the service does not know, a query for a
metric that nobody exports: these faults show only in a cluster. At the end each check is shown a manifest with such a
fault, and must find it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

import model
from service.app import create_app
from service.metrics import RATE_WINDOW, Metrics
from service.pool.supervisor import STOP_GRACE
from service.server import CLOSE_TIMEOUT
from service.settings import Settings
from tests.docker.image import last
from tests.k8s.manifests import (
    COMBINATIONS,
    COMPONENTS,
    Object,
    change,
    containers,
    main_container,
    needs_kubectl,
    of_kind,
    one,
    picker_specs,
    pod_spec,
    queries,
    render,
)

pytestmark = needs_kubectl

ROUTES = {route.path for route in create_app(Settings(), print).routes}  # type: ignore[attr-defined]


def exported() -> dict[str, set[str]]:
    """Return every series that a server with one worker exports from its start, with its labels."""
    metrics = Metrics("any")
    metrics.worker_up(0, False)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


METRICS = exported()


def environment(objects: list[Object]) -> dict[str, str]:
    """Return the container's FLASH_* variables; those from a Secret or from the pod's fields get a stand-in."""
    container = main_container(objects)
    values: dict[str, str] = {}
    for source in container["envFrom"]:
        values |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container["env"]:
        stand_in = "1" if "resourceFieldRef" in variable.get("valueFrom", {}) else "secret"
        values[variable["name"]] = variable.get("value", stand_in)
    return {name: value for name, value in values.items() if name.startswith("FLASH_")}


def settings_of(objects: list[Object]) -> Settings:
    with mock.patch.dict(os.environ, environment(objects)):
        return Settings()


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)(ms|s|m|h)", text)
    assert found is not None, f"{text} is not a duration"
    return int(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]


def the_service_starts_with_these_settings(objects: list[Object]) -> None:
    assert environment(objects).keys() <= {f"FLASH_{name.upper()}" for name in Settings.model_fields}
    settings_of(objects)


def probes_ask_for_routes_of_the_service(objects: list[Object]) -> None:
    """/readyz may fail and recover; /livez fails only if a restart helps."""
    container, port = main_container(objects), settings_of(objects).port
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    for probe, route in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        asked = container[probe]["httpGet"]
        assert asked["path"] == route, probe
        assert ports.get(asked["port"], asked["port"]) == port, probe
        assert route in ROUTES


def every_port_is_the_one_that_the_service_listens_on(objects: list[Object]) -> None:
    port = settings_of(objects).port
    (declared,) = main_container(objects)["ports"]
    assert declared["containerPort"] == port
    allowed = (declared["name"], port)
    assert all(each["targetPort"] in allowed for each in one(objects, "Service")["spec"]["ports"]), "Service"
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert all(each["port"] in allowed for each in rule["ports"]), policy["metadata"]["name"]
    for pool in of_kind(objects, "InferencePool"):
        assert [each["number"] for each in pool["spec"]["targetPorts"]] == [port], "InferencePool"


def prometheus_scrapes_the_service(objects: list[Object]) -> None:
    (declared,) = main_container(objects)["ports"]
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for monitor in of_kind(objects, "PodMonitor"):
        assert labels[monitor["spec"]["jobLabel"]] == "flashserve", "alerts select the job flashserve"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["port"] == declared["name"]
            assert endpoint["path"] in ROUTES
            assert seconds(endpoint["interval"]) <= RATE_WINDOW, "flash_tokens_per_second would miss tokens"


def a_model_may_take_its_time_to_load(objects: list[Object]) -> None:
    probe = main_container(objects)["startupProbe"]
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    assert settings_of(objects).load_timeout < patience, "the kubelet restarts a pod that still loads"
    assert patience < one(objects, "Deployment")["spec"]["progressDeadlineSeconds"]


def no_answer_is_cut_short(objects: list[Object]) -> None:
    settings = settings_of(objects)
    sleep = main_container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep >= 5, "proxies need a few seconds to learn that a pod goes"
    assert settings.drain_timeout >= settings.request_timeout
    needed = sleep + settings.drain_timeout + CLOSE_TIMEOUT + STOP_GRACE
    for deployment in of_kind(objects, "Deployment"):  # the picker, too: streams run through it
        assert pod_spec(deployment)["terminationGracePeriodSeconds"] > needed, deployment["metadata"]["name"]
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert seconds(rule["timeouts"]["request"]) > settings.request_timeout, "the gateway gives up first"


def scaling_asks_for_metrics_of_the_service(objects: list[Object]) -> None:
    namespace = one(objects, "Deployment")["metadata"]["namespace"]
    for query in queries(objects).values():
        assert set(re.findall(r"\bflash_\w+", query)) <= METRICS.keys(), query
        assert set(re.findall(r'namespace="([^"]*)"', query)) == {namespace}, query
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= METRICS.keys()


def scaling_aims_at_what_a_pod_can_run(objects: list[Object]) -> None:
    scalers = of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler")
    assert len(scalers) <= 1, "two scalers fight over one Deployment"
    for spec in (scaler["spec"] for scaler in scalers):
        assert "replicas" not in one(objects, "Deployment")["spec"], "an apply would reset what the scaler set"
        assert spec.get("minReplicas", spec.get("minReplicaCount")) > 1, "the disruption budget takes one"
        aims = {
            **{each["metadata"]["query"]: each["metadata"]["threshold"] for each in spec.get("triggers", [])},
            **{
                each["pods"]["metric"]["name"]: each["pods"]["target"]["averageValue"]
                for each in spec.get("metrics", [])
            },
        }
        running = [float(aim) for name, aim in aims.items() if "flash_requests_running" in name]
        assert running
        assert all(0 < aim < settings_of(objects).max_num_seqs for aim in running)


def the_picker_reads_metrics_of_the_only_worker(objects: list[Object]) -> None:
    if specs := picker_specs(objects):
        assert specs.keys() == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"}, "its protocol wants three"
        for spec in specs.values():
            found = re.fullmatch(r'(\w+)\{(\w+)="0"\}', spec)
            assert found is not None, spec
            assert found[2] in METRICS[found[1]], spec
        assert settings_of(objects).workers == 1


def gateway_routes_lead_to_routes_of_the_service(objects: list[Object]) -> None:
    pools = {(pool["metadata"]["name"], None) for pool in of_kind(objects, "InferencePool")}
    services = {
        (service["metadata"]["name"], port["port"])
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
    }
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert {match["path"]["value"] for match in rule["matches"]} <= ROUTES
            for backend in rule["backendRefs"]:
                there = pools if backend.get("kind") == "InferencePool" else services
                assert (backend["name"], backend.get("port")) in there
    for pool in of_kind(objects, "InferencePool"):
        picker = pool["spec"]["endpointPickerRef"]
        assert (picker["name"], picker["port"]["number"]) in services


def the_image_is_of_this_version_and_runs_as_its_user(objects: list[Object]) -> None:
    spec = pod_spec(one(objects, "Deployment"))
    suffix = "-cuda" if "nvidia.com/gpu" in main_container(objects)["resources"]["limits"] else ""
    for container in containers(spec):
        assert container["image"].endswith(f"flashserve:{model.__version__}{suffix}"), container["image"]
    context = spec["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == last("cuda" if suffix else "cpu", "USER")


def selectors_find_pods(objects: list[Object]) -> None:
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(objects, "Deployment")]
    selectors = [each["spec"]["selector"] for each in of_kind(objects, "Service")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(objects, "NetworkPolicy")]
    kinds = ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool")
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, *kinds)]
    for selector in selectors:
        assert any(selector.items() <= pod.items() for pod in pods), selector


def pods_are_confined_and_keys_are_secret(objects: list[Object]) -> None:
    """What the Pod Security level `restricted` asks for, a read-only root on top, and no key in a ConfigMap."""
    for spec in map(pod_spec, of_kind(objects, "Deployment")):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod_spec(one(objects, "Deployment"))["automountServiceAccountToken"] is False
    variables = {each["name"]: each.get("valueFrom", {}) for each in main_container(objects)["env"]}
    assert not variables["FLASH_API_KEY"]["secretKeyRef"].get("optional"), "without the Secret it would be open to all"
    assert "secretKeyRef" in variables["FLASH_ADMIN_KEY"]
    for config in of_kind(objects, "ConfigMap"):
        assert not [name for name in config["data"] if re.search("KEY|TOKEN", name)]


NAMESPACE_NAME = "kubernetes.io/metadata.name"  # a label that every namespace has
PRIVATE = ("10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "127.0.0.1", "fd00::1", "fe80::1")


def no_pod_reaches_a_private_address(objects: list[Object]) -> None:
    """Media are fetched from URLs that clients choose."""
    base = one(objects, "NetworkPolicy")["spec"]
    assert base["policyTypes"] == ["Ingress", "Egress"]
    assert base["egress"] == []
    for policy in of_kind(objects, "NetworkPolicy"):
        for block in (peer.get("ipBlock") for rule in policy["spec"].get("egress", []) for peer in rule["to"]):
            networks = [] if block is None else [ipaddress.ip_network(cut) for cut in block.get("except", [])]
            for address in map(ipaddress.ip_address, PRIVATE):
                if block is not None and address in ipaddress.ip_network(block["cidr"]):
                    assert any(address in network for network in networks), address


def traces_reach_the_collector(objects: list[Object]) -> None:
    """The base lets nothing out, not even a question for the collector's address."""
    if (endpoint := settings_of(objects).otlp_endpoint) is None:
        return
    url = urlsplit(endpoint)
    service, _, namespace = str(url.hostname).partition(".")
    assert service
    allowed = {
        (peer.get("namespaceSelector", {}).get("matchLabels", {}).get(NAMESPACE_NAME), port["port"])
        for policy in of_kind(objects, "NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        for port in rule["ports"]
    }
    assert {(namespace, url.port), ("kube-system", 53)} <= allowed
    variables = {each["name"]: each for each in main_container(objects)["env"]}
    known = re.findall(r"\$\((\w+)\)", variables["OTEL_RESOURCE_ATTRIBUTES"]["value"])
    fields = [variables[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in known]
    assert fields == ["metadata.name", "metadata.namespace"]
    assert list(variables).index("OTEL_RESOURCE_ATTRIBUTES") > max(map(list(variables).index, known)), "not expanded"


CHECKS: tuple[Callable[[list[Object]], None], ...] = (
    the_service_starts_with_these_settings,
    probes_ask_for_routes_of_the_service,
    every_port_is_the_one_that_the_service_listens_on,
    prometheus_scrapes_the_service,
    a_model_may_take_its_time_to_load,
    no_answer_is_cut_short,
    scaling_asks_for_metrics_of_the_service,
    scaling_aims_at_what_a_pod_can_run,
    the_picker_reads_metrics_of_the_only_worker,
    gateway_routes_lead_to_routes_of_the_service,
    the_image_is_of_this_version_and_runs_as_its_user,
    selectors_find_pods,
    pods_are_confined_and_keys_are_secret,
    no_pod_reaches_a_private_address,
    traces_reach_the_collector,
)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_manifests_agree(check: Callable[[list[Object]], None], combination: tuple[str, ...]) -> None:
    check(render(*combination))


MAIN = "spec/template/spec/containers/0"
VERSION = model.__version__

# A check, and a change of one manifest that it must find: the object, the path of the changed field, its new value.
FAULTS: list[tuple[Callable[[list[Object]], None], str, str, Any]] = [
    (the_service_starts_with_these_settings, "ConfigMap", "data/FLASH_MAX_SEQS", "8"),
    (the_service_starts_with_these_settings, "ConfigMap", "data/FLASH_DEVICE", "gpu"),
    (probes_ask_for_routes_of_the_service, "Deployment", f"{MAIN}/livenessProbe/httpGet/path", "/readyz"),
    (probes_ask_for_routes_of_the_service, "Deployment", f"{MAIN}/startupProbe/httpGet/port", "web"),
    (every_port_is_the_one_that_the_service_listens_on, "ConfigMap", "data/FLASH_PORT", "9000"),
    (every_port_is_the_one_that_the_service_listens_on, "Service", "spec/ports/0/targetPort", 9000),
    (every_port_is_the_one_that_the_service_listens_on, "InferencePool", "spec/targetPorts/0/number", 8080),
    (prometheus_scrapes_the_service, "PodMonitor", "spec/podMetricsEndpoints/0/path", "/stats"),
    (prometheus_scrapes_the_service, "PodMonitor", "spec/podMetricsEndpoints/0/interval", "60s"),
    (a_model_may_take_its_time_to_load, "Deployment", f"{MAIN}/startupProbe/failureThreshold", 60),
    (a_model_may_take_its_time_to_load, "Deployment", "spec/progressDeadlineSeconds", 600),
    (no_answer_is_cut_short, "ConfigMap", "data/FLASH_DRAIN_TIMEOUT", "30"),
    (no_answer_is_cut_short, "Deployment", "spec/template/spec/terminationGracePeriodSeconds", 300),
    (no_answer_is_cut_short, "HTTPRoute", "spec/rules/0/timeouts/request", "60s"),
    (scaling_asks_for_metrics_of_the_service, "ScaledObject", "spec/triggers/0/metadata/query", "sum(flash_queue)"),
    (scaling_aims_at_what_a_pod_can_run, "ConfigMap", "data/FLASH_MAX_NUM_SEQS", "8"),
    (scaling_aims_at_what_a_pod_can_run, "Deployment", "spec/replicas", 2),
    (the_picker_reads_metrics_of_the_only_worker, "ConfigMap", "data/FLASH_WORKERS", "2"),
    (gateway_routes_lead_to_routes_of_the_service, "HTTPRoute", "spec/rules/0/matches/0/path/value", "/v2/chat"),
    (gateway_routes_lead_to_routes_of_the_service, "InferencePool", "spec/endpointPickerRef/port/number", 9003),
    (the_image_is_of_this_version_and_runs_as_its_user, "Deployment", f"{MAIN}/image", "flashserve:0.0.9-cuda"),
    (the_image_is_of_this_version_and_runs_as_its_user, "Deployment", f"{MAIN}/image", f"flashserve:{VERSION}"),
    (selectors_find_pods, "Service", "spec/selector", {"app": "flashserve"}),
    (pods_are_confined_and_keys_are_secret, "Deployment", f"{MAIN}/securityContext/readOnlyRootFilesystem", False),
    (pods_are_confined_and_keys_are_secret, "ConfigMap", "data/FLASH_ADMIN_KEY", "x"),
    (no_pod_reaches_a_private_address, "NetworkPolicy", "spec/egress", [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]),
    (traces_reach_the_collector, "ConfigMap", "data/FLASH_OTLP_ENDPOINT", "http://collector.observability:4317"),
    (traces_reach_the_collector, "ConfigMap", "data/FLASH_OTLP_ENDPOINT", "http://collector.tracing:4318"),
    (traces_reach_the_collector, "Deployment", f"{MAIN}/env", []),
]  # fmt: skip


@pytest.mark.parametrize(("check", "kind", "path", "value"), FAULTS)
def test_a_fault_is_found(check: Callable[[list[Object]], None], kind: str, path: str, value: Any) -> None:
    objects = render("gpu", *(component for component in COMPONENTS if component != "autoscaling-hpa"))
    check(objects)
    change(one(objects, kind), path, value)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check(objects)


def test_every_check_is_shown_a_fault() -> None:
    assert {check for check, *_ in FAULTS} == set(CHECKS)
