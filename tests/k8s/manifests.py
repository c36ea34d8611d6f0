"""What kustomize makes of k8s/: rendered objects, and small ways to find things in them."""

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
    """The one of this kind and name; generated ones have a hash behind it."""
    pattern = re.compile(rf"{name}(-[2-9bcdfghkmt]{{10}})?")
    (only,) = [each for each in of_kind(objects, kind) if pattern.fullmatch(each["metadata"]["name"])]
    return only


def pod_spec(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def containers(spec: Object) -> Iterator[Object]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]
