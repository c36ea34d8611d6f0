"""What a route needs and does not make itself: the service, from the application's state, and its requests' ids."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, cast

from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from service.state import Service

Handler = Callable[[Request], Awaitable[Response]]

REQUEST_ID = "X-Request-Id"


def service_of(request: Request) -> Service:
    return cast("Service", request.app.state.service)


def identified(prefix: str) -> Callable[[Handler], Handler]:
    """Gives each request an id, `request.state.id`, that its answer carries; what `service.app` refuses does so too."""

    def decorated(handler: Handler) -> Handler:
        @wraps(handler)
        async def with_id(request: Request) -> Response:
            request.state.id = prefix + secrets.token_hex(12)
            response = await handler(request)
            response.headers[REQUEST_ID] = request.state.id
            return response

        return with_id

    return decorated
