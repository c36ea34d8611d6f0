"""Validate objects against the schemas of their kinds.

The schemas of Kubernetes, KEDA and the Prometheus Operator are pydantic models generated from their OpenAPI documents
and custom resource definitions (the cloudcoil packages). No package has those of the gateway APIs: InferencePool and
HTTPRoute are checked against the service only (test_agreement.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.kubernetes.apps.v1 import Deployment
from cloudcoil.models.kubernetes.autoscaling.v2 import HorizontalPodAutoscaler
from cloudcoil.models.kubernetes.core import v1 as core
from cloudcoil.models.kubernetes.networking.v1 import NetworkPolicy
from cloudcoil.models.kubernetes.policy.v1 import PodDisruptionBudget
from cloudcoil.models.kubernetes.rbac.v1 import Role, RoleBinding
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from pydantic import BaseModel, ValidationError

SCHEMAS: dict[tuple[str, str], type[BaseModel]] = {
    **{
        ("v1", schema.__name__): schema
        for schema in (core.ConfigMap, core.Namespace, core.PersistentVolumeClaim, core.Service, core.ServiceAccount)
    },
    ("apps/v1", "Deployment"): Deployment,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): HorizontalPodAutoscaler,
    ("networking.k8s.io/v1", "NetworkPolicy"): NetworkPolicy,
    ("policy/v1", "PodDisruptionBudget"): PodDisruptionBudget,
    ("rbac.authorization.k8s.io/v1", "Role"): Role,
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): RoleBinding,
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
}
WITHOUT_SCHEMA = {("inference.networking.k8s.io/v1", "InferencePool"), ("gateway.networking.k8s.io/v1", "HTTPRoute")}


def violations(thing: dict[str, Any]) -> Iterator[str]:
    """Yield what the API server would refuse or silently drop."""
    name = f"{thing['kind']}/{thing['metadata']['name']}"
    if (thing["apiVersion"], thing["kind"]) in WITHOUT_SCHEMA:
        return
    schema = SCHEMAS.get((thing["apiVersion"], thing["kind"]))
    if schema is None:
        yield f"{name}: there is no schema for {thing['apiVersion']} {thing['kind']}"
        return
    try:
        known = schema.model_validate_json(json.dumps(thing), strict=True)
    except ValidationError as error:
        for problem in error.errors():
            yield f"{name}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        return
    kept = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
    yield from (f"{name}: {path}: no such field" for path in _dropped(thing, kept))


def _dropped(sent: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield the fields that the schema's model did not keep: it does not know them."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        for key, value in sent.items():
            if key not in kept:
                yield f"{path}{key}"
            else:
                yield from _dropped(value, kept[key], f"{path}{key}.")
    elif isinstance(sent, list) and isinstance(kept, list):
        for index, (value, other) in enumerate(zip(sent, kept, strict=True)):
            yield from _dropped(value, other, f"{path}{index}.")
