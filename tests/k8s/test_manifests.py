"""k8s/ renders, its objects are valid, and its README says what is there."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import (
    COMBINATIONS,
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    change,
    kustomize,
    needs_kubectl,
    of_kind,
    one,
    pod_spec,
    render,
)
from tests.k8s.schemas import violations
from tests.k8s.test_agreement import METRICS, traces_reach_the_collector

pytestmark = needs_kubectl


MAIN = "spec/template/spec/containers/0"


@pytest.mark.parametrize("combination", COMBINATIONS, ids="+".join)
def test_every_object_fits_the_schema_of_its_kind(combination: tuple[str, ...]) -> None:
    objects = render(*combination)
    assert len(objects) >= 7
    assert [violation for each in objects for violation in violations(each)] == []


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
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in METRICS}
    assert set(re.findall(r"flash_\w+", readme)) <= families


def test_the_readme_says_how_traces_go_to_another_collector(tmp_path: Path) -> None:
    block = re.search(r"### Traces.*?```\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    assert block is not None
    paths = {"resources": [K8S / "overlays/cpu"], "components": [K8S / "components/traces"]}
    relative = {key: [os.path.relpath(path, tmp_path) for path in found] for key, found in paths.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(relative) + block[1])
    objects = list(yaml.safe_load_all(kustomize(tmp_path)))
    assert one(objects, "ConfigMap")["data"]["FLASH_OTLP_ENDPOINT"] == "http://otel.tracing:4318"
    traces_reach_the_collector(objects)


# -- the schemas find faults


@pytest.mark.parametrize(
    ("kind", "path", "value", "violation"),
    [
        ("Deployment", f"{MAIN}/readinessProbe/httpGett", {}, "httpGett: no such field"),
        ("Deployment", f"{MAIN}/ports/0/containerPort", "8000", "containerPort"),
        ("Deployment", "spec/template/spec/securityContext/runAsNonRoot", "yes", "runAsNonRoot"),
        ("PodDisruptionBudget", "spec/maxAvailable", 1, "maxAvailable: no such field"),
        ("ScaledObject", "spec/minReplicas", 1, "minReplicas: no such field"),
        ("PodMonitor", "spec/endpoints", [], "endpoints: no such field"),
        ("Namespace", "kind", "Namespce", "no schema"),
    ],
)
def test_a_violated_schema_is_noticed(kind: str, path: str, value: Any, violation: str) -> None:
    objects = render("example")
    change(one(objects, kind) if kind != "Namespace" else of_kind(objects, kind)[0], path, value)
    assert violation in "\n".join(each for thing in objects for each in violations(thing))
