"""Helpers of routes: the service from the application's state, and request ids."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from service import unknown_fields
from service.state import Service
from service.trace_context import REQUEST_ID, read_request_id, read_trace_context

Handler = Callable[[Request], Awaitable[Response]]


def service_of(request: Request) -> Service:
    return cast("Service", request.app.state.service)


def name_ignored(request: Request, response: Response) -> None:
    """Name the fields of a request that were ignored, if any, in a header of its response."""
    if ignored := getattr(request.state, "ignored", None):
        response.headers[unknown_fields.HEADER] = unknown_fields.header(ignored)


def with_request_id(prefix: str, *, header: str = REQUEST_ID) -> Callable[[Handler], Handler]:
    """Give each request an id, and send it back in a header; `service.app` does so in errors. header: another name that
    the API's clients look for.

    Sets `request.state.id`, which is unique and the `id` of the answer; `request.state.request_id`, the client's
    `X-Request-Id` or else the same; and `request.state.trace`, the client's TraceContext or None.
    """

    def decorated(handler: Handler) -> Handler:
        @wraps(handler)
        async def with_id(request: Request) -> Response:
            state = request.state
            state.id = prefix + secrets.token_hex(12)
            state.request_id = read_request_id(request.headers) or state.id
            state.trace = read_trace_context(request.headers)
            response = await handler(request)
            response.headers[REQUEST_ID] = response.headers[header] = state.request_id
            name_ignored(request, response)
            return response

        return with_id

    return decorated
