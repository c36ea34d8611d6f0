"""The ASGI application: routes, middleware, the mapping of errors to HTTP, and the start and stop of the service."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import model
from service.deps import name_ignored, service_of
from service.errors import BadRequest, EngineFailure, MethodNotAllowed, NotFound, ServiceError, TimedOut
from service.openapi.document import document
from service.origin import AllowedHosts, checks_hosts
from service.routes import (
    admin,
    completions,
    documentation,
    generate,
    messages,
    models,
    openai,
    ops,
    playground,
    responses,
    tokenize,
)
from service.schemas import anthropic
from service.settings import Settings
from service.state import Service
from service.stream import ClosingResponse
from service.trace_context import REQUEST_ID, read_request_id
from service.unknown_fields import HEADER as IGNORED

log = logging.getLogger("flashserve")

MODULES = (generate, openai, completions, responses, messages, tokenize, models, ops, admin, playground, documentation)
SHORT_BODY = 64 * 1024  # bytes that may follow a refusal on a connection that stays open


def create_app(settings: Settings, on_fatal: Callable[[str], None]) -> FastAPI:
    """Create the application. on_fatal: called with the reason when the service can never become ready."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.started = time.time()
        app.state.service = service = Service(settings, on_fatal)
        service.start()
        try:
            yield
        finally:
            await service.stop()

    # Plain routes: handlers read their bodies themselves, so FastAPI has nothing to inject, and the document that it
    # would generate knows nothing of them.
    modules = [each for each in MODULES if settings.docs or each is not documentation]
    routes: list[BaseRoute] = [route for each in modules for route in each.ROUTES]
    app = FastAPI(title="FlashServe", version=model.__version__, lifespan=lifespan, openapi_url=None, routes=routes)
    app.state.openapi = document((operation for each in modules for operation in each.OPERATIONS), settings)
    app.router.redirect_slashes = False  # it would redirect to any host that the request names
    error_response = _map_errors(app)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, IGNORED, "Retry-After"),
        )
    if checks_hosts(settings):
        app.add_middleware(AllowedHosts, allowed=settings.allowed_hosts, refuse=error_response)
    return app


def _map_errors(app: FastAPI) -> Callable[[Request, ServiceError], Awaitable[Response]]:
    """Register the exception handlers; return the function through which every error response passes."""

    @app.exception_handler(ServiceError)
    async def error_response(request: Request, error: ServiceError) -> Response:
        """Send an error in the envelope of the route's API and count it."""
        if not isinstance(error, EngineFailure | TimedOut):  # those had been accepted, and count as answered
            service_of(request).metrics.rejected(error.code or error.type)
        headers = error.headers() | {"Content-Type": "application/json"}
        kind = ClosingResponse if _body_still_arrives(request) else Response
        request_id = getattr(request.state, "request_id", None) or read_request_id(request.headers)
        envelope: Any = error.envelope()
        if request_id is not None:
            headers[REQUEST_ID] = request_id
        if request.url.path.startswith(messages.PATH):
            envelope = anthropic.error_envelope(error, request_id)
            headers[messages.REQUEST_ID] = request_id or ""
        response = kind(msgspec.json.encode(envelope), error.status, headers)
        name_ignored(request, response)
        if error.code == "draining":  # the client should retry at another server
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        """Map Starlette's own errors: unknown routes and wrong methods."""
        path = request.url.path[:128]
        mapped: ServiceError = BadRequest("the request is not valid")
        if error.status_code == 404:
            bare = path.rstrip("/")
            exists = bare != path and any(isinstance(r, Route) and r.path_regex.match(bare) for r in app.routes)
            mapped = NotFound(f"there is nothing at {path}" + (f"; use {bare} without the slash" if exists else ""))
        if error.status_code == 405:
            mapped = MethodNotAllowed(f"{path} does not support {request.method}")
        response = await error_response(request, mapped)
        response.headers.update(error.headers or {})  # `Allow`, with the supported methods
        return response

    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def bug(request: Request, _: Exception) -> Response:
        """Hide the details of a bug from the client; Starlette logs it with its traceback."""
        return await error_response(request, EngineFailure("internal error", code="internal_error"))

    return error_response


def _body_still_arrives(request: Request) -> bool:
    """Return whether more of the body is still to come than is worth waiting for."""
    complete = getattr(request.state, "body_complete", None)
    if complete is not None:  # it was read, to its end or not
        return not complete
    length = request.headers.get("content-length", "0")
    return "transfer-encoding" in request.headers or not length.isdecimal() or int(length) > SHORT_BODY
