"""Objects against the schemas of their kinds.

Kubernetes' own, KEDA's and the Prometheus Operator's are generated from their OpenAPI documents and custom resource
definitions (the cloudcoil packages). The two of the gateway APIs are in no package: what we use of them is written down
here by hand, after their published references, and nothing else is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.kubernetes.apps.v1 import Deployment
from cloudcoil.models.kubernetes.autoscaling.v2 import HorizontalPodAutoscaler
from cloudcoil.models.kubernetes.core import v1 as core
from cloudcoil.models.kubernetes.networking.v1 import NetworkPolicy
from cloudcoil.models.kubernetes.policy.v1 import PodDisruptionBudget
from cloudcoil.models.kubernetes.rbac.v1 import Role, RoleBinding
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class ByHand(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(ByHand):
    name: Name
    namespace: Name


class PoolPort(ByHand):
    number: Port


class PoolSelector(ByHand):
    matchLabels: dict[str, str] = Field(min_length=1)


class EndpointPickerRef(ByHand):
    name: Name
    port: PoolPort
    group: str = ""
    kind: str = "Service"
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"


class PoolSpec(ByHand):
    selector: PoolSelector
    targetPorts: list[PoolPort] = Field(min_length=1, max_length=8)
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpointPickerRef: EndpointPickerRef


class InferencePool(ByHand):
    apiVersion: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: PoolSpec


class ParentRef(ByHand):
    name: Name
    namespace: Name | None = None
    sectionName: Name | None = None


class PathMatch(ByHand):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str = Field(pattern="^/", max_length=1024)


class RouteMatch(ByHand):
    path: PathMatch


class BackendRef(ByHand):
    name: Name
    group: str = ""
    kind: str = "Service"
    port: Port | None = None
    weight: int = 1


class RouteTimeouts(ByHand):
    request: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class RouteRule(ByHand):
    matches: list[RouteMatch] = Field(max_length=64)
    backendRefs: list[BackendRef] = Field(min_length=1, max_length=16)
    timeouts: RouteTimeouts | None = None


class RouteSpec(ByHand):
    parentRefs: list[ParentRef] = Field(min_length=1, max_length=32)
    rules: list[RouteRule] = Field(min_length=1, max_length=16)


class HTTPRoute(ByHand):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: RouteSpec


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
    ("inference.networking.k8s.io/v1", "InferencePool"): InferencePool,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTPRoute,
}


def violations(thing: dict[str, Any]) -> Iterator[str]:
    """What the API server would refuse or, worse, silently drop."""
    name = f"{thing['kind']}/{thing['metadata']['name']}"
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


def _dropped(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Fields that a schema does not know are those that did not come out of it again."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}{key}"
            else:
                yield from _dropped(value, kept[key], f"{path}{key}.")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from _dropped(value, other, f"{path}{index}.")
