"""Health, metrics and version: open to all, and quick whatever else is going on.

/livez    503 only where a restart is the cure: every worker was given up
/readyz   503 while loading, draining or without a live worker
/health   the same as /readyz, with details for people; where keys are set, for who has one
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import model
from model.config import TRAINED
from service.auth import may_see_details
from service.deps import service_of
from service.stream import json_response

if TYPE_CHECKING:
    from service.state import Service


async def livez(request: Request) -> Response:
    beyond_hope = service_of(request).beyond_hope
    return _status({"status": "dead" if beyond_hope else "alive"}, healthy=not beyond_hope)


async def readyz(request: Request) -> Response:
    closed = service_of(request).closed_because()
    return _status({"status": "ready" if closed is None else closed.code}, healthy=closed is None)


async def health(request: Request) -> Response:
    if not may_see_details(request):
        return await readyz(request)
    service = service_of(request)
    closed, info = service.closed_because(), service.pool.info
    workers = [
        {
            "worker": worker.index,
            "state": worker.state,
            "pid": worker.pid,
            "restarts": worker.restarts,
            "requests": service.pool.num_at(worker),
        }
        for worker in service.pool.workers
    ]
    # Not the path it was loaded from: nobody outside need know this machine's folders.
    engine = {name: value for name, value in asdict(info).items() if name != "model"} if info else None
    details = {
        "status": "ready" if closed is None else closed.code,
        "model": service.settings.model_name,
        "requests": service.admission.in_use,
        "uploads": len(service.uploads),
        "workers": workers,
        "engine": engine,
        "draft": _draft(service) if info and info.drafter in TRAINED else None,
    }
    return _status(details, healthy=closed is None)


def _draft(service: Service) -> dict[str, Any]:
    """Which one is served, by its folder's name alone; `changes`: how many have taken another's place."""
    served = service.pool.drafts.served
    since = datetime.fromtimestamp(served.since, UTC).isoformat(timespec="milliseconds") if served.since else None
    name = Path(served.folder).name if served.folder else service.settings.model_name
    return {"name": name, "since": since, "changes": served.changes}


async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version(_: Request) -> Response:
    return json_response({"name": "flashserve", "version": model.__version__, "python": platform.python_version()})


def _status(details: dict[str, Any], *, healthy: bool) -> Response:
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
