"""Render k8s/ with kustomize, and find things in the rendered objects."""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))

# Every component on every kind of machine; KEDA and HPA exclude each other.
COMBINATIONS = [
    *((overlay,) for overlay in OVERLAYS),
    *(
        (overlay, *(component for component in COMPONENTS if component != without))
        for overlay in ("cpu", "gpu")
        for without in ("autoscaling-hpa", "autoscaling-keda")
    ),
]

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed (it renders k8s/)")

Object = dict[str, Any]


def kustomize(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr  # of fields that kustomize gives up
    return done.stdout


@functools.cache
def _rendered(overlay: str, components: tuple[str, ...]) -> str:
    if not components:
        return kustomize(K8S / "overlays" / overlay)
    with tempfile.TemporaryDirectory() as folder:

        def relative(path: Path) -> str:  # kustomize takes no absolute ones
            return os.path.relpath(path, Path(folder).resolve())

        of_ones_own = {
            "resources": [relative(K8S / "overlays" / overlay)],
            "components": [relative(K8S / "components" / component) for component in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(of_ones_own))
        return kustomize(Path(folder))


def render(overlay: str, *components: str) -> list[Object]:
    """The objects of an overlay with these components, as `kubectl apply -k` would send them; a copy of one's own."""
    return copy.deepcopy(list(yaml.safe_load_all(_rendered(overlay, components))))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def one(objects: list[Object], kind: str, name: str = "flashserve") -> Object:
    """Return the only object of this kind and name; a hash follows the name of a generated one."""
    pattern = re.compile(rf"{name}(-[2-9bcdfghkmt]{{10}})?")
    (only,) = [each for each in of_kind(objects, kind) if pattern.fullmatch(each["metadata"]["name"])]
    return only


def pod_spec(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def containers(spec: Object) -> Iterator[Object]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]


def main_container(objects: list[Object]) -> Object:
    """Return the service's container."""
    (container,) = pod_spec(one(objects, "Deployment"))["containers"]
    return dict(container)


def queries(objects: list[Object]) -> dict[str, str]:
    """Return the PromQL of every KEDA trigger, by the trigger's name."""
    return {
        trigger["name"]: trigger["metadata"]["query"]
        for scaled in of_kind(objects, "ScaledObject")
        for trigger in scaled["spec"]["triggers"]
    }


def picker_specs(objects: list[Object]) -> dict[str, str]:
    """Return the series that the endpoint picker reads, by its own names for them; empty without a gateway."""
    for config in of_kind(objects, "ConfigMap"):
        if text := config["data"].get("picker-config.yaml"):
            plugins = {plugin["type"]: plugin for plugin in yaml.safe_load(text)["plugins"]}
            (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
            return {key: value for key, value in engine.items() if key.endswith("Spec") and value}
    return {}


def change(thing: Any, path: str, value: Any) -> None:
    """Set the field that a path such as `spec/ports/0/name` names."""
    *parents, key = path.split("/")
    for part in parents:
        thing = thing[int(part)] if isinstance(thing, list) else thing[part]
    thing[key] = value
