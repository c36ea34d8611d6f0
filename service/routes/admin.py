"""POST /admin/draft: another draft for the service that runs. For who has the admin key, where one is set."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.auth import admin
from service.body import read_json
from service.deps import service_of
from service.schemas.admin import DraftChange
from service.stream import json_response


@admin
async def draft(request: Request) -> Response:
    service = service_of(request)
    with service.uploads.open(request, None) as upload:
        wanted = await read_json(upload, DraftChange, service.settings)
    begun = time.monotonic()
    workers = await service.change_draft(wanted.draft)
    info = service.pool.info
    return json_response(
        {
            "drafter": info.drafter if info else None,
            "draft": wanted.draft,
            "workers": workers,
            "seconds": round(time.monotonic() - begun, 3),
        }
    )


ROUTES = [Route("/admin/draft", draft, methods=["POST"])]
