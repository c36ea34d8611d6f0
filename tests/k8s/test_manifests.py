"""k8s/ renders, is valid, and agrees with the code: and where it did not, these tests would say so."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from tests.k8s.agreement import Code, complaints
from tests.k8s.manifests import (
    COMBINATIONS,
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    Object,
    kustomize,
    needs_kubectl,
    of_kind,
    one,
    pod_spec,
    render,
)
from tests.k8s.schemas import violations

pytestmark = needs_kubectl


@pytest.fixture(scope="module")
def code() -> Code:
    return Code()


def label(combination: tuple[str, ...]) -> str:
    return "+".join(combination)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=label)
def test_every_object_fits_the_schema_of_its_kind(combination: tuple[str, ...]) -> None:
    objects = render(*combination)
    assert len(objects) >= 7
    assert [violation for each in objects for violation in violations(each)] == []


@pytest.mark.parametrize("combination", COMBINATIONS, ids=label)
def test_manifests_agree_with_the_code_and_with_each_other(combination: tuple[str, ...], code: Code) -> None:
    assert complaints(render(*combination), code) == []


def test_the_combinations_hold_every_overlay_and_component() -> None:
    assert {"cpu", "gpu"} <= set(OVERLAYS)
    assert {component for _, *components in COMBINATIONS for component in components} == set(COMPONENTS)


def test_every_file_is_part_of_something() -> None:
    """A manifest that no kustomization names is one that nobody applies."""
    for file in K8S.rglob("*.*"):
        if file.name in ("kustomization.yaml", "README.md", "adapter-rules.yaml") or file.suffix in (".py", ".pyc"):
            continue
        kustomization = yaml.safe_load((file.parent / "kustomization.yaml").read_text())
        assert f"'{file.name}'" in repr(kustomization), f"{file.relative_to(K8S)} is in no kustomization"


# -- each overlay is what it says


def test_the_gpu_overlay_takes_a_whole_gpu_on_a_node_that_has_one() -> None:
    spec = pod_spec(one(render("gpu"), "Deployment"))
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [each["key"] for each in spec["tolerations"]] == ["nvidia.com/gpu"]
    assert one(render("gpu"), "ConfigMap")["data"]["FLASH_DEVICE"] == "cuda"
    assert one(render("cpu"), "ConfigMap")["data"]["FLASH_DEVICE"] == "cpu"


def test_an_image_that_an_overlay_sets_is_the_init_containers_too() -> None:
    """They are one image; a component's untagged name would pull another."""
    for combination in (("example",), ("cpu", "model-cache"), ("gpu", "model-cache")):
        spec = pod_spec(one(render(*combination), "Deployment"))
        assert len({each["image"] for each in spec["containers"] + spec["initContainers"]}) == 1


def test_a_changed_setting_changes_the_pods() -> None:
    """Else a rollout would wait for somebody to restart them."""
    names = {one(render(overlay), "ConfigMap")["metadata"]["name"] for overlay in ("cpu", "gpu")}
    assert len(names) == 2
    (source,) = pod_spec(one(render("cpu"), "Deployment"))["containers"][0]["envFrom"]
    assert source["configMapRef"]["name"] in names


def test_the_operator_gets_the_rules_and_the_dashboard_as_they_are() -> None:
    folder, monitoring = K8S / "components/monitoring", ROOT / "docker/monitoring"
    written = runpy.run_path(str(folder / "prometheusrule.py"))["prometheusrule"]()
    assert (folder / "prometheusrule.yaml").read_text() == written, "run k8s/components/monitoring/prometheusrule.py"
    objects = render("cpu", "monitoring")
    groups = [group["name"] for group in one(objects, "PrometheusRule")["spec"]["groups"]]
    files = sorted(monitoring.glob("rules/*.yml"))
    assert groups == [group["name"] for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    dashboard = one(objects, "ConfigMap", "flashserve-dashboard")
    assert dashboard["data"] == {"flashserve.json": (monitoring / "dashboards/flashserve.json").read_text()}
    assert dashboard["metadata"]["labels"] == {"grafana_dashboard": "1"}


def test_the_readme_tells_the_times_that_are_set() -> None:
    readme = (K8S / "README.md").read_text()
    told = {name: int(value) for name, value in re.findall(r"^\| `?(\w+)`?.*? \| (\d+) \|", readme, re.MULTILINE)}
    objects = render("example")
    settings, spec = one(objects, "ConfigMap")["data"], pod_spec(one(objects, "Deployment"))
    (container,) = spec["containers"]
    probe = container["startupProbe"]
    assert told == {
        **{name: int(settings[name]) for name in settings if name.endswith("_TIMEOUT")},
        "preStop": container["lifecycle"]["preStop"]["sleep"]["seconds"],
        "terminationGracePeriodSeconds": spec["terminationGracePeriodSeconds"],
        "HTTPRoute": int(one(objects, "HTTPRoute")["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s")),
        "startupProbe": probe["periodSeconds"] * probe["failureThreshold"],
        "progressDeadlineSeconds": one(objects, "Deployment")["spec"]["progressDeadlineSeconds"],
    }


def test_what_the_readme_names_is_there() -> None:
    readme = (K8S / "README.md").read_text()
    tree = set(re.findall(r"^  (?:overlays/)?([a-z-]+) {2,}", readme, re.MULTILINE))
    tree |= set(re.findall(r"^overlays/([a-z-]+)", readme, re.MULTILINE))
    assert tree == {*OVERLAYS, *COMPONENTS}
    for folder in re.findall(r"k8s/overlays/[a-z]+", readme):
        kustomize(ROOT / folder)
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in Code().metrics}
    assert set(re.findall(r"flash_\w+", readme)) <= families


# -- a change on one side only is noticed


def path_of(thing: Any, path: str) -> tuple[Any, Any]:
    """The parent of what `a/b/0/c` names, and its last key; what is in a list goes by its number or its name."""
    *parents, last = path.split("/")
    for part in parents:
        if isinstance(thing, list):
            thing = thing[int(part)] if part.isdecimal() else next(each for each in thing if each["name"] == part)
        else:
            thing = thing[part]
    return thing, int(last) if isinstance(thing, list) else last


def put(kind: str, path: str, value: Any, name: str = "flashserve") -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        parent, key = path_of(one(objects, kind, name), path)
        if isinstance(parent, dict):
            assert parent.get(key) != value
        parent[key] = value

    return change


def drop(kind: str, path: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        parent, key = path_of(one(objects, kind), path)
        del parent[key]

    return change


def picker(old: str, new: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        data = one(objects, "ConfigMap", "flashserve-picker")["data"]
        assert old in data["picker-config.yaml"]
        data["picker-config.yaml"] = data["picker-config.yaml"].replace(old, new)

    return change


SPEC = "spec/template/spec"
MAIN = f"{SPEC}/containers/0"

CHANGED_MANIFESTS: dict[str, tuple[Callable[[list[Object]], None], str]] = {
    "readiness route": (put("Deployment", f"{MAIN}/readinessProbe/httpGet/path", "/ready"), "no route /ready"),
    "liveness asks readiness": (
        put("Deployment", f"{MAIN}/livenessProbe/httpGet/path", "/readyz"),
        "should ask /livez",
    ),
    "probe port": (put("Deployment", f"{MAIN}/startupProbe/httpGet/port", "web"), "nothing listens on port web"),
    "container port": (put("Deployment", f"{MAIN}/ports/0/containerPort", 8080), "FLASH_PORT is 8000"),
    "port setting": (put("ConfigMap", "data/FLASH_PORT", "9000"), "FLASH_PORT is 9000"),
    "service port": (put("Service", "spec/ports/0/targetPort", 9000), "targetPort 9000"),
    "scraped port": (put("PodMonitor", "spec/podMetricsEndpoints/0/port", "metrics"), "port metrics"),
    "scraped route": (put("PodMonitor", "spec/podMetricsEndpoints/0/path", "/stats"), "no route /stats"),
    "scraped too rarely": (put("PodMonitor", "spec/podMetricsEndpoints/0/interval", "60s"), "between scrapes"),
    "job": (put("PodMonitor", "spec/jobLabel", "app"), "does not make the job flashserve"),
    "pool port": (put("InferencePool", "spec/targetPorts/0/number", 8080), "targetPorts"),
    "gateway route": (put("HTTPRoute", "spec/rules/0/matches/0/path/value", "/v2/chat"), "no route /v2/chat"),
    "gateway timeout": (put("HTTPRoute", "spec/rules/0/timeouts/request", "60s"), "the gateway gives up"),
    "picker's service": (put("InferencePool", "spec/endpointPickerRef/port/number", 9003), "no picker"),
    "grace": (put("Deployment", f"{SPEC}/terminationGracePeriodSeconds", 315), "must be above"),
    "grace of the picker": (
        put("Deployment", f"{SPEC}/terminationGracePeriodSeconds", 30, "flashserve-picker"),
        "flashserve-picker: terminationGracePeriodSeconds",
    ),
    "preStop": (put("Deployment", f"{MAIN}/lifecycle/preStop/sleep/seconds", 60), "must be above"),
    "drain": (put("ConfigMap", "data/FLASH_DRAIN_TIMEOUT", "600"), "must be above"),
    "short drain": (put("ConfigMap", "data/FLASH_DRAIN_TIMEOUT", "30"), "below FLASH_REQUEST_TIMEOUT"),
    "startup": (put("Deployment", f"{MAIN}/startupProbe/failureThreshold", 60), "before FLASH_LOAD_TIMEOUT"),
    "load timeout": (put("ConfigMap", "data/FLASH_LOAD_TIMEOUT", "1800"), "before FLASH_LOAD_TIMEOUT"),
    "rollout deadline": (put("Deployment", "spec/progressDeadlineSeconds", 600), "progressDeadlineSeconds"),
    "unknown setting": (put("ConfigMap", "data/FLASH_MAX_SEQS", "8"), "FLASH_MAX_SEQS is no setting"),
    "bad setting": (put("ConfigMap", "data/FLASH_DEVICE", "gpu"), "would not start"),
    "query's metric": (
        put("ScaledObject", "spec/triggers/0/metadata/query", 'sum(flash_queue_length{namespace="flashserve"})'),
        "no metric flash_queue_length",
    ),
    "query's namespace": (
        put("ScaledObject", "spec/triggers/0/metadata/query", 'sum(flash_requests_waiting{namespace="x"})'),
        "does not ask for the namespace",
    ),
    "picker's metric": (picker("flash_requests_waiting", "flash_waiting"), "no metric flash_waiting"),
    "picker's label": (picker('ratio{worker="0"}', 'ratio{device="0"}'), "no label device"),
    "picker's worker": (picker('waiting{worker="0"}', "waiting"), "is not a metric of worker 0"),
    "picker's third metric": (picker("kvUsageSpec", "kvSpec"), "lacks one of the three"),
    "workers": (put("ConfigMap", "data/FLASH_WORKERS", "2"), "FLASH_WORKERS must be 1"),
    "batch": (put("ConfigMap", "data/FLASH_MAX_NUM_SEQS", "8"), "FLASH_MAX_NUM_SEQS (8)"),
    "replicas": (put("Deployment", "spec/replicas", 2), "replicas"),
    "scaled to zero": (put("ScaledObject", "spec/minReplicaCount", 0), "at zero replicas"),
    "eviction": (put("PodDisruptionBudget", "spec/maxUnavailable", 2), "go at once"),
    "labels": (put("Service", "spec/selector", {"app": "flashserve"}), "selects no pod"),
    "secret": (drop("Deployment", f"{MAIN}/env/FLASH_API_KEY/valueFrom/secretKeyRef"), "does not come from a Secret"),
    "optional key": (
        put("Deployment", f"{MAIN}/env/FLASH_API_KEY/valueFrom/secretKeyRef/optional", True),
        "is optional",
    ),
    "key in the open": (put("ConfigMap", "data/FLASH_ADMIN_KEY", "x"), "in a ConfigMap"),
    "root": (put("Deployment", f"{SPEC}/securityContext/runAsNonRoot", False), "may run as root"),
    "seccomp": (drop("Deployment", f"{SPEC}/securityContext/seccompProfile"), "no seccomp profile"),
    "privileges": (drop("Deployment", f"{MAIN}/securityContext/allowPrivilegeEscalation"), "gain privileges"),
    "capabilities": (drop("Deployment", f"{MAIN}/securityContext/capabilities"), "keeps capabilities"),
    "writable root": (put("Deployment", f"{MAIN}/securityContext/readOnlyRootFilesystem", False), "writable"),
    "token": (put("ServiceAccount", "automountServiceAccountToken", True), "token for the API server"),
    "limits": (put("Deployment", f"{MAIN}/resources/limits/memory", "64Gi"), "requests differ from limits"),
    "image": (put("Deployment", f"{MAIN}/image", "flashserve:0.0.9"), "is not of version"),
    "cpu image on a gpu": (put("Deployment", f"{MAIN}/image", f"flashserve:{Code().version}"), "cannot use the GPU"),
    "volume": (drop("Deployment", f"{SPEC}/volumes/0"), "which are no volumes"),
    "way out": (
        put("NetworkPolicy", "spec/egress/1/to/0/ipBlock/except", [], "flashserve-public-egress"),
        "169.254.169.254 can be reached",
    ),
}


@pytest.mark.parametrize("name", CHANGED_MANIFESTS)
def test_a_changed_manifest_is_noticed(name: str, code: Code) -> None:
    change, complaint = CHANGED_MANIFESTS[name]
    components = [component for component in COMPONENTS if component != "autoscaling-hpa"]
    objects = render("gpu", *components)
    assert complaints(objects, code) == []
    change(objects)
    assert complaint in "\n".join(complaints(objects, code))


def test_a_changed_metric_of_the_hpa_is_noticed(code: Code) -> None:
    objects = render("cpu", "autoscaling-hpa")
    put("HorizontalPodAutoscaler", "spec/metrics/0/pods/metric/name", "flash_queue")(objects)
    assert "no metric flash_queue" in "\n".join(complaints(objects, code))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda code: replace(code, routes=code.routes - {"/readyz"}), "no route /readyz"),
        (lambda code: replace(code, routes=code.routes - {"/metrics"}), "no route /metrics"),
        (lambda code: replace(code, settings=code.settings - {"FLASH_DRAIN_TIMEOUT"}), "FLASH_DRAIN_TIMEOUT is no"),
        (lambda code: replace(code, settings=code.settings - {"FLASH_API_KEY"}), "FLASH_API_KEY is no"),
        (
            lambda code: replace(
                code, metrics={n: v for n, v in code.metrics.items() if n != "flash_requests_waiting"}
            ),
            "no metric flash_requests_waiting",
        ),
        (lambda code: replace(code, last_words=60.0), "must be above"),
        (lambda code: replace(code, version="0.9.0"), "is not of version 0.9.0"),
    ],
)
def test_changed_code_is_noticed(change: Callable[[Code], Code], complaint: str, code: Code) -> None:
    objects = render("example")
    assert complaint in "\n".join(complaints(objects, change(code)))


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (put("Deployment", f"{MAIN}/readinessProbe/httpGett", {}), "httpGett: no such field"),
        (put("Deployment", f"{MAIN}/ports/0/containerPort", "8000"), "containerPort"),
        (put("Deployment", f"{SPEC}/securityContext/runAsNonRoot", "yes"), "runAsNonRoot"),
        (drop("Deployment", "spec/selector"), "selector"),
        (put("PodDisruptionBudget", "spec/maxAvailable", 1), "maxAvailable: no such field"),
        (put("ScaledObject", "spec/minReplicas", 1), "minReplicas: no such field"),
        (drop("ScaledObject", "spec/triggers/0/type"), "type"),
        (put("PodMonitor", "spec/endpoints", []), "endpoints: no such field"),
        (put("InferencePool", "spec/extensionRef", {}), "extensionRef"),
        (put("HTTPRoute", "spec/rules/0/matches/0/path/type", "Prefix"), "type"),
    ],
)
def test_a_violated_schema_is_noticed(change: Callable[[list[Object]], None], violation: str) -> None:
    objects = render("example")
    change(objects)
    assert violation in "\n".join(each for thing in objects for each in violations(thing))


def test_an_unknown_kind_is_noticed() -> None:
    (namespace,) = of_kind(render("cpu"), "Namespace")
    assert "no schema" in next(iter(violations({**namespace, "kind": "Namespce"})))
