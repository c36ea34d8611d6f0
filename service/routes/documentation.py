"""GET /openapi.json and /docs: the OpenAPI document and a page of it. `--docs false` switches both off.

They tell nothing of this service but its limits, so they need no key. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.openapi.operation import HTML, Operation
from service.openapi.page import page
from service.routes.playground import HEADERS
from service.stream import json_response


async def openapi(request: Request) -> Response:
    return json_response(request.app.state.openapi, {"Cache-Control": "no-cache"})


async def docs(request: Request) -> Response:
    return Response(page(request.app.state.openapi), media_type=HTML[0], headers=HEADERS)


def _operation(path: str, summary: str, answer: object) -> Operation:
    return Operation("get", path, summary, {200: answer}, "Pages", key=None, refusals=(403,), request_id=None)


ROUTES = [Route("/openapi.json", openapi), Route("/docs", docs)]
OPERATIONS = [
    _operation("/openapi.json", "This document", dict[str, Any]),
    _operation("/docs", "A page of this document", HTML),
]
