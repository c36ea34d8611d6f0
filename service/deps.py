"""Helpers of routes: the service from the application's state, and request ids."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from service.state import Service

Handler = Callable[[Request], Awaitable[Response]]

REQUEST_ID = "X-Request-Id"


def service_of(request: Request) -> Service:
    return cast("Service", request.app.state.service)


def with_request_id(prefix: str) -> Callable[[Handler], Handler]:
    """Give each request an id, `request.state.id`, and send it back in a header; `service.app` does so in errors."""

    def decorated(handler: Handler) -> Handler:
        @wraps(handler)
        async def with_id(request: Request) -> Response:
            request.state.id = prefix + secrets.token_hex(12)
            response = await handler(request)
            response.headers[REQUEST_ID] = request.state.id
            return response

        return with_id

    return decorated
