"""What manifests must agree on: with the code, with each other, and with what we promise.

Each check takes rendered objects and yields complaints. What the code says comes in as `Code`, so that a test can
change either side and see the checks complain.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

import model
from service.app import create_app
from service.metrics import RATE_WINDOW, Metrics
from service.pool.supervisor import STOP_GRACE
from service.server import CLOSE_TIMEOUT
from service.settings import Settings
from tests.k8s.manifests import ROOT, Object, containers, of_kind, one, pod_spec

Complaints = Iterator[str]


def _metrics() -> dict[str, frozenset[str]]:
    """Every sample that a server with one worker shows from its start, with its labels."""
    metrics = Metrics("any")
    metrics.worker_up(0, False)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: frozenset(sample.labels) for family in families for sample in family.samples}


@dataclass(frozen=True)
class Code:
    """What manifests rely on."""

    routes: frozenset[str] = field(
        default_factory=lambda: frozenset(route.path for route in create_app(Settings(), print).routes)  # type: ignore[attr-defined]
    )
    settings: frozenset[str] = field(
        default_factory=lambda: frozenset(f"FLASH_{name.upper()}" for name in Settings.model_fields)
    )
    metrics: dict[str, frozenset[str]] = field(default_factory=_metrics)
    last_words: float = CLOSE_TIMEOUT
    stop_grace: float = STOP_GRACE
    rate_window: float = RATE_WINDOW
    version: str = model.__version__


def main_container(objects: list[Object]) -> Object:
    (container,) = pod_spec(one(objects, "Deployment"))["containers"]
    return dict(container)


def environment(objects: list[Object]) -> dict[str, str]:
    """FLASH_* of the service's container that have a value here; those from Secrets and fields stand for themselves."""
    values: dict[str, str] = {}
    container = main_container(objects)
    for source in container.get("envFrom", []):
        (found,) = [
            each for each in of_kind(objects, "ConfigMap") if each["metadata"]["name"] == source["configMapRef"]["name"]
        ]
        values |= found["data"]
    for variable in container.get("env", []):
        stand_in = "1" if "resourceFieldRef" in variable.get("valueFrom", {}) else "secret"
        values[variable["name"]] = variable.get("value", stand_in)
    return {name: value for name, value in values.items() if name.startswith("FLASH_")}


def settings_of(objects: list[Object]) -> Settings:
    with mock.patch.dict(os.environ, environment(objects)):
        return Settings()


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


def queries(objects: list[Object]) -> Iterator[tuple[str, str]]:
    """Every PromQL expression for scaling, with where it stands."""
    for scaled in of_kind(objects, "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield f"trigger {trigger['name']}", trigger["metadata"]["query"]


def picker_specs(objects: list[Object]) -> dict[str, str]:
    """The picker's names for what it reads, and the series it reads."""
    for config in of_kind(objects, "ConfigMap"):
        for text in config["data"].values():
            if "EndpointPickerConfig" in text:
                plugins = {plugin["type"]: plugin for plugin in yaml.safe_load(text)["plugins"]}
                parameters = plugins["core-metrics-extractor"]["parameters"]
                (engine,) = [
                    each for each in parameters["engineConfigs"] if each["name"] == parameters["defaultEngine"]
                ]
                return {key: value for key, value in engine.items() if key.endswith("Spec") and value}
    return {}


# -- with the code


def settings_are_known_and_valid(objects: list[Object], code: Code) -> Complaints:
    for name in environment(objects):
        if name not in code.settings:
            yield f"{name} is no setting"
    try:
        settings_of(objects)
    except ValidationError as error:
        yield f"the service would not start: {error}"


def probes_ask_what_the_service_answers(objects: list[Object], code: Code) -> Complaints:
    container = main_container(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    # Ready may fail and recover; alive fails only where a restart is the cure.
    asks = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for probe, route in asks.items():
        path, port = container[probe]["httpGet"]["path"], container[probe]["httpGet"]["port"]
        if path not in code.routes:
            yield f"{probe}: the service has no route {path}"
        if path != route:
            yield f"{probe}: asks {path}, should ask {route}"
        if ports.get(port, port) != settings_of(objects).port:
            yield f"{probe}: nothing listens on port {port}"


def one_port(objects: list[Object], code: Code) -> Complaints:
    """What the service listens on, the container declares, and everybody else points to."""
    port = settings_of(objects).port
    (declared,) = main_container(objects)["ports"]
    if declared["containerPort"] != port:
        yield f"the container's port is {declared['containerPort']}, FLASH_PORT is {port}"
    for each in one(objects, "Service")["spec"]["ports"]:
        if each["targetPort"] not in (declared["name"], port):
            yield f"Service: targetPort {each['targetPort']} is no port of the container"
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            if any(each["port"] not in (declared["name"], port) for each in rule["ports"]):
                yield f"NetworkPolicy {policy['metadata']['name']}: opens another port than the container's"
    for monitor in of_kind(objects, "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] != declared["name"]:
                yield f"PodMonitor: port {endpoint['port']} is no port of the container"
            if endpoint["path"] not in code.routes:
                yield f"PodMonitor: the service has no route {endpoint['path']}"
            if seconds(endpoint["interval"]) > code.rate_window:
                yield f"PodMonitor: {endpoint['interval']} between scrapes leave out tokens of flash_tokens_per_second"
    for pool in of_kind(objects, "InferencePool"):
        if [each["number"] for each in pool["spec"]["targetPorts"]] != [port]:
            yield f"InferencePool: targetPorts are not [{port}]"


def loading_is_waited_for(objects: list[Object], _: Code) -> Complaints:
    probe, settings = main_container(objects)["startupProbe"], settings_of(objects)
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    if patience <= settings.load_timeout:
        yield f"startupProbe: gives up after {patience} s, before FLASH_LOAD_TIMEOUT ({settings.load_timeout} s)"
    deadline = one(objects, "Deployment")["spec"]["progressDeadlineSeconds"]
    if deadline <= patience:
        yield f"progressDeadlineSeconds ({deadline}) is over before the startup probe gives up ({patience} s)"


def no_answer_is_cut_short(objects: list[Object], code: Code) -> Complaints:
    settings, spec = settings_of(objects), pod_spec(one(objects, "Deployment"))
    sleep = main_container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    if sleep < 5:
        yield f"preStop: {sleep} s are too few for proxies to learn that a pod goes"
    if settings.drain_timeout < settings.request_timeout:
        yield f"FLASH_DRAIN_TIMEOUT ({settings.drain_timeout} s) is below FLASH_REQUEST_TIMEOUT"
    needed = sleep + settings.drain_timeout + code.last_words + code.stop_grace
    for deployment in of_kind(objects, "Deployment"):  # the picker, too: streams run through it
        grace = pod_spec(deployment)["terminationGracePeriodSeconds"]
        if grace <= needed:
            name = deployment["metadata"]["name"]
            yield f"{name}: terminationGracePeriodSeconds ({grace}) must be above {needed}: preStop, drain and the end"
    if spec["terminationGracePeriodSeconds"] > needed + 60:
        yield "terminationGracePeriodSeconds: more than a minute above what is needed hides a changed drain"
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            if seconds(rule["timeouts"]["request"]) <= settings.request_timeout:
                yield "HTTPRoute: the gateway gives up before FLASH_REQUEST_TIMEOUT"


def metrics_are_ours(objects: list[Object], code: Code) -> Complaints:
    for where, query in queries(objects):
        for name in re.findall(r"\bflash_\w+", query):
            if name not in code.metrics:
                yield f"{where}: the service has no metric {name}"
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if (name := metric["pods"]["metric"]["name"]) not in code.metrics:
                yield f"HPA: the service has no metric {name}"
    specs = picker_specs(objects)
    if specs and specs.keys() != {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"}:
        yield "the picker's mapping lacks one of the three metrics that the model server protocol asks for"
    for key, spec in specs.items():
        if (series := re.fullmatch(r'(\w+)\{(\w+)="0"\}', spec)) is None:
            yield f"{key}: {spec} is not a metric of worker 0"
            continue
        name, label = series.groups()
        if name not in code.metrics:
            yield f"{key}: the service has no metric {name}"
        elif label not in code.metrics[name]:
            yield f"{key}: {name} has no label {label}"
    if specs and settings_of(objects).workers != 1:
        yield "the picker reads worker 0 only: FLASH_WORKERS must be 1"


def routes_lead_somewhere(objects: list[Object], code: Code) -> Complaints:
    pools = {pool["metadata"]["name"] for pool in of_kind(objects, "InferencePool")}
    services = {
        (service["metadata"]["name"], port["port"])
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
    }
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for match in rule["matches"]:
                if (path := match["path"]["value"]) not in code.routes:
                    yield f"HTTPRoute: the service has no route {path}"
            for backend in rule["backendRefs"]:
                there = (
                    backend["name"] in pools
                    if backend.get("kind") == "InferencePool"
                    else (backend["name"], backend.get("port")) in services
                )
                if not there:
                    yield f"HTTPRoute: there is no backend {backend['name']}"
    for pool in of_kind(objects, "InferencePool"):
        picker = pool["spec"]["endpointPickerRef"]
        if (picker["name"], picker["port"]["number"]) not in services:
            yield f"InferencePool: there is no picker {picker['name']} at {picker['port']['number']}"


def the_image_is_this_version(objects: list[Object], code: Code) -> Complaints:
    for container in containers(pod_spec(one(objects, "Deployment"))):
        repository, _, tag = container["image"].rpartition(":")
        if not repository.endswith("flashserve") or tag.partition("-")[0] != code.version:
            yield f"image {container['image']} is not of version {code.version}"
    if "nvidia.com/gpu" in main_container(objects)["resources"]["limits"] and not tag.endswith("-cuda"):
        yield f"image {container['image']} cannot use the GPU that the pod asks for"


def the_user_is_the_images(objects: list[Object], _: Code) -> Complaints:
    dockerfile = ROOT / "docker" / "Dockerfile"
    if dockerfile.exists():
        user = re.findall(r"^USER (\d+):(\d+)$", dockerfile.read_text(), re.MULTILINE)[-1]
        context = pod_spec(one(objects, "Deployment"))["securityContext"]
        if user != (str(context["runAsUser"]), str(context["runAsGroup"])):
            yield f"runAsUser and runAsGroup are not the image's {':'.join(user)}"


# -- with each other


def selectors_find_the_pods(objects: list[Object], _: Code) -> Complaints:
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(objects, "Deployment")]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= pod.items() for pod in labels)

    for each in of_kind(objects, "Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
        if not finds(each["spec"]["selector"]["matchLabels"]):
            yield f"{each['kind']}/{each['metadata']['name']} selects no pod"
    for each in of_kind(objects, "PodMonitor"):
        # The name by which alerts know the service.
        if (
            one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].get(each["spec"]["jobLabel"])
            != "flashserve"
        ):
            yield f"PodMonitor: the label {each['spec']['jobLabel']} does not make the job flashserve"
    for each in of_kind(objects, "Service"):
        if not finds(each["spec"]["selector"]):
            yield f"Service/{each['metadata']['name']} selects no pod"
    for each in of_kind(objects, "NetworkPolicy"):
        if not finds(each["spec"]["podSelector"]["matchLabels"]):
            yield f"NetworkPolicy/{each['metadata']['name']} selects no pod"


def one_namespace(objects: list[Object], _: Code) -> Complaints:
    (name,) = [each["metadata"]["name"] for each in of_kind(objects, "Namespace")]
    for each in objects:
        if each["kind"] != "Namespace" and each["metadata"].get("namespace") != name:
            yield f"{each['kind']}/{each['metadata']['name']} is not in the namespace {name}"
    for where, query in queries(objects):
        if set(re.findall(r'namespace="([^"]*)"', query)) != {name}:
            yield f"{where}: does not ask for the namespace {name}, and for no other"
    for binding in of_kind(objects, "RoleBinding"):
        if any(subject["namespace"] != name for subject in binding["subjects"]):
            yield f"RoleBinding/{binding['metadata']['name']}: grants to another namespace"


def what_is_named_is_there(objects: list[Object], _: Code) -> Complaints:
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for deployment in of_kind(objects, "Deployment"):
        spec, name = pod_spec(deployment), deployment["metadata"]["name"]
        wanted = {("ServiceAccount", spec["serviceAccountName"])}
        volumes = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for container in containers(spec):
            wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
            if lost := {mount["name"] for mount in container["volumeMounts"]} - volumes:
                yield f"{name}: mounts {lost}, which are no volumes"
        if wanted - there:
            yield f"{name}: names {wanted - there}, which are not there"
        if any(c["name"] == "prefetch" for c in containers(spec)) and not any(
            policy["spec"].get("egress") for policy in of_kind(objects, "NetworkPolicy")
        ):
            yield "prefetch: no NetworkPolicy lets it reach a hub (components/public-egress)"


def scaling_fits(objects: list[Object], _: Code) -> Complaints:
    settings = settings_of(objects)
    scalers = of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler")
    if len(scalers) > 1:
        yield "two scalers fight over one Deployment"
    if scalers and "replicas" in one(objects, "Deployment")["spec"]:
        yield "replicas: an apply would reset what the scaler set"
    for scaler in scalers:
        spec = scaler["spec"]
        if spec["scaleTargetRef"]["name"] != one(objects, "Deployment")["metadata"]["name"]:
            yield f"{scaler['kind']}: scales {spec['scaleTargetRef']['name']}, which is not the service"
        if spec.get("minReplicas", spec.get("minReplicaCount")) < 1:
            yield f"{scaler['kind']}: at zero replicas nothing is measured that could bring them back"
        busy = [
            float(trigger["metadata"]["threshold"])
            for trigger in spec.get("triggers", [])
            if "flash_requests_running" in trigger["metadata"]["query"]
        ] + [
            float(metric["pods"]["target"]["averageValue"])
            for metric in spec.get("metrics", [])
            if metric["pods"]["metric"]["name"] == "flash_requests_running"
        ]
        if not busy or any(not 0 < aim < settings.max_num_seqs for aim in busy):
            yield f"{scaler['kind']}: aims at {busy} running requests, of FLASH_MAX_NUM_SEQS ({settings.max_num_seqs})"


def an_eviction_leaves_somebody(objects: list[Object], _: Code) -> Complaints:
    scalers = of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler")
    least = min(
        [one(objects, "Deployment")["spec"].get("replicas", math.inf)]
        + [each["spec"].get("minReplicas", each["spec"].get("minReplicaCount")) for each in scalers]
    )
    if one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] >= least:
        yield f"PodDisruptionBudget: allows all of {least} pods to go at once"
    update = one(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    if update["maxUnavailable"] >= least:
        yield f"rollingUpdate: allows all of {least} pods to go at once"


# -- with what we promise


def pods_may_do_little(objects: list[Object], _: Code) -> Complaints:
    """The `restricted` level of the Pod Security Standards, and a read-only root on top."""
    for deployment in of_kind(objects, "Deployment"):
        spec, name = pod_spec(deployment), deployment["metadata"]["name"]
        context = spec["securityContext"]
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        if {"hostNetwork", "hostPID", "hostIPC"} & spec.keys() or any("hostPath" in each for each in spec["volumes"]):
            yield f"{name}: shares something of the node's"
        for container in containers(spec):
            own: dict[str, Any] = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{name}/{container['name']}: may gain privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}/{container['name']}: keeps capabilities"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}/{container['name']}: its root is writable"
    for thing in (one(objects, "ServiceAccount"), pod_spec(one(objects, "Deployment"))):
        if thing.get("automountServiceAccountToken") is not False:
            yield "the service has a token for the API server"


def pods_are_guaranteed_what_they_use(objects: list[Object], _: Code) -> Complaints:
    for container in containers(pod_spec(one(objects, "Deployment"))):
        resources = container["resources"]
        if resources["requests"] != resources["limits"]:
            yield f"{container['name']}: requests differ from limits"
        if not resources["limits"]["cpu"].isdecimal():
            yield f"{container['name']}: a part of a CPU cannot be pinned, nor counted in FLASH_THREADS"
    (shm,) = [each for each in pod_spec(one(objects, "Deployment"))["volumes"] if each["name"] == "shm"]
    if shm["emptyDir"].get("medium") != "Memory":
        yield "/dev/shm is not in memory"


def keys_are_secret(objects: list[Object], _: Code) -> Complaints:
    variables = {each["name"]: each for each in main_container(objects)["env"]}
    for name in ("FLASH_API_KEY", "FLASH_ADMIN_KEY"):
        if "secretKeyRef" not in variables.get(name, {}).get("valueFrom", {}):
            yield f"{name} does not come from a Secret"
    if variables["FLASH_API_KEY"]["valueFrom"].get("secretKeyRef", {}).get("optional"):
        yield "FLASH_API_KEY is optional: without the Secret the service would be open to all"
    for config in of_kind(objects, "ConfigMap"):
        if keys := [name for name in config["data"] if re.search("KEY|TOKEN", name)]:
            yield f"{keys} are in a ConfigMap"


def nothing_private_is_reached(objects: list[Object], _: Code) -> Complaints:
    private = [
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "127.0.0.1",
        "fd00::1",
        "fe80::1",
    ]
    base = one(objects, "NetworkPolicy")["spec"]
    if base["policyTypes"] != ["Ingress", "Egress"] or base["egress"]:
        yield "NetworkPolicy: the base lets something out"
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                block = peer.get("ipBlock", {"cidr": "0.0.0.0/32"})
                for address in map(ipaddress.ip_address, private):
                    inside = address in ipaddress.ip_network(block["cidr"])
                    if inside and not any(address in ipaddress.ip_network(cut) for cut in block.get("except", [])):
                        yield f"NetworkPolicy {policy['metadata']['name']}: {address} can be reached"


CHECKS: tuple[Callable[[list[Object], Code], Complaints], ...] = (
    settings_are_known_and_valid,
    probes_ask_what_the_service_answers,
    one_port,
    loading_is_waited_for,
    no_answer_is_cut_short,
    metrics_are_ours,
    routes_lead_somewhere,
    the_image_is_this_version,
    the_user_is_the_images,
    selectors_find_the_pods,
    one_namespace,
    what_is_named_is_there,
    scaling_fits,
    an_eviction_leaves_somebody,
    pods_may_do_little,
    pods_are_guaranteed_what_they_use,
    keys_are_secret,
    nothing_private_is_reached,
)


def complaints(objects: list[Object], code: Code) -> list[str]:
    first, *others = CHECKS
    # What all others reckon with is the settings.
    return list(first(objects, code)) or [complaint for check in others for complaint in check(objects, code)]
