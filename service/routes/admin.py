"""POST /admin/draft: change the draft of the running service. Requires the admin key."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.auth import require_admin_key
from service.body import read_json
from service.deps import service_of
from service.openapi.operation import Operation
from service.schemas.admin import DraftChange
from service.schemas.answers import DraftChanged
from service.stream import json_response


@require_admin_key
async def draft(request: Request) -> Response:
    service = service_of(request)
    with service.uploads.open(request, None) as upload:
        change = await read_json(upload, DraftChange, service.settings)
    started = time.monotonic()
    workers = await service.change_draft(change.draft)
    info = service.pool.info
    answer: DraftChanged = {
        "drafter": info.drafter if info else None,
        "draft": change.draft,
        "workers": workers,
        "seconds": round(time.monotonic() - started, 3),
    }
    return json_response(answer)


ROUTES = [Route("/admin/draft", draft, methods=["POST"])]
OPERATIONS = [
    Operation(
        "post",
        "/admin/draft",
        "Change the draft of this instance",
        {200: DraftChanged},
        "Operations",
        "Needs the key of --admin-key; off (404) without one.",
        body=DraftChange,
        key="admin",
        request_id=None,
        example={"draft": "/models/draft"},
    )
]
