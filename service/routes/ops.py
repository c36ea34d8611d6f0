"""Health, metrics and version. They need no key, and answer quickly under any load.

/livez    503 only where a restart helps: every worker has failed for good
/readyz   503 while loading, draining or without a live worker
/health   /readyz with details; where API keys are set, they require one
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import model
from model.config import TRAINED
from service.auth import may_see_details
from service.deps import service_of
from service.errors import NoCapacity
from service.openapi.operation import TEXT, Operation
from service.schemas.answers import DraftHealth, Health, Status, Version, WorkerHealth
from service.state import Service
from service.stream import json_response


async def livez(request: Request) -> Response:
    unrecoverable = service_of(request).unrecoverable
    return _status({"status": "dead" if unrecoverable else "alive"}, healthy=not unrecoverable)


async def readyz(request: Request) -> Response:
    reason = service_of(request).unavailable_reason()
    return _status({"status": _state(reason)}, healthy=reason is None)


async def health(request: Request) -> Response:
    if not may_see_details(request):
        return await readyz(request)
    service = service_of(request)
    reason, info = service.unavailable_reason(), service.pool.info
    workers: list[WorkerHealth] = [
        {
            "worker": worker.index,
            "state": worker.state,
            "pid": worker.pid,
            "restarts": worker.restarts,
            "requests": service.pool.num_running_on(worker),
        }
        for worker in service.pool.workers
    ]
    # Leaves out `model`, the path it was loaded from: clients need not know this machine's folders.
    engine = {name: value for name, value in asdict(info).items() if name != "model"} if info else None
    details: Health = {
        "status": _state(reason),
        "model": service.settings.model_name,
        "requests": service.admission.in_use,
        "uploads": len(service.uploads),
        "workers": workers,
        "engine": engine,
        "draft": _draft(service) if info and info.drafter in TRAINED else None,
    }
    return _status(details, healthy=reason is None)


def _draft(service: Service) -> DraftHealth:
    """Describe the served draft, by its folder's name alone; `changes` counts those that were replaced before it."""
    served = service.pool.drafts.served
    since = datetime.fromtimestamp(served.since, UTC).isoformat(timespec="milliseconds") if served.since else None
    name = Path(served.folder).name if served.folder else service.settings.model_name
    return {"name": name, "since": since, "changes": served.changes}


async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version(_: Request) -> Response:
    answer: Version = {
        "name": "flashserve",
        "version": model.__version__,
        "python": platform.python_version(),
    }
    return json_response(answer)


def _state(reason: NoCapacity | None) -> str:
    return "ready" if reason is None else reason.code or reason.type


def _status(details: Status | Health, *, healthy: bool) -> Response:
    response = json_response(details, {"Cache-Control": "no-store"})
    response.status_code = 200 if healthy else 503
    return response


ROUTES = [
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/version", version),
]


def _operation(path: str, summary: str, answers: dict[int, Any]) -> Operation:
    return Operation("get", path, summary, answers, "Operations", key=None, refusals=(403,), request_id=None)


OPERATIONS = [
    _operation("/livez", "503 only where a restart is the cure", {200: Status, 503: Status}),
    _operation("/readyz", "503 while loading, draining or without a live worker", {200: Status, 503: Status}),
    _operation(
        "/health", "Readiness with details; where keys are set, for those who have one", {200: Health, 503: Health}
    ),
    _operation("/metrics", "Prometheus metrics", {200: TEXT}),
    _operation("/version", "Name and version", {200: Version}),
]
