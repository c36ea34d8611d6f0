"""The application: routes, the one place where errors become HTTP, and the service's life around it all."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import model
from service.deps import REQUEST_ID, service_of
from service.errors import BadRequest, EngineFailure, MethodNotAllowed, NotFound, ServiceError, TimedOut
from service.origin import AllowedHosts, checks_hosts
from service.routes import admin, generate, openai, ops, playground
from service.settings import Settings
from service.state import Service
from service.stream import LastResponse

log = logging.getLogger("flashserve")

SHORT_BODY = 64 * 1024  # bytes; so many may follow a refusal on a connection that stays open


def create_app(settings: Settings, on_fatal: Callable[[str], None]) -> FastAPI:
    """`on_fatal`: told why the service can never become ready, once that is known."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.started = time.time()
        app.state.service = service = Service(settings, on_fatal)
        service.start()
        try:
            yield
        finally:
            await service.stop()

    # Plain routes, and no generated documentation: handlers read their bodies themselves, so FastAPI has nothing to
    # inject or to describe, and its page would load scripts from elsewhere.
    routes: list[BaseRoute] = [*generate.ROUTES, *openai.ROUTES, *ops.ROUTES, *admin.ROUTES, *playground.ROUTES]
    app = FastAPI(title="FlashServe", version=model.__version__, lifespan=life, openapi_url=None, routes=routes)
    app.router.redirect_slashes = False  # it would redirect to whatever host the request names
    refused = _map_errors(app)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "Retry-After"),
        )
    if checks_hosts(settings):
        app.add_middleware(AllowedHosts, allowed=settings.allowed_hosts, refuse=refused)
    return app


def _map_errors(app: FastAPI) -> Callable[[Request, ServiceError], Awaitable[Response]]:
    """Every error a client can see passes through `refused`, which this returns."""

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        if not isinstance(error, EngineFailure | TimedOut):  # those had been taken, and are counted as such
            service_of(request).metrics.rejected(error.code or error.type)
        headers = error.headers() | {"Content-Type": "application/json"}
        kind = LastResponse if _is_still_sent(request) else Response
        response = kind(msgspec.json.encode(error.envelope()), error.status, headers)
        if (request_id := getattr(request.state, "id", None)) is not None:
            response.headers[REQUEST_ID] = request_id
        if error.code == "draining":  # a server that ends is not where it should ask again
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:128]
        told: ServiceError = BadRequest("the request is not valid")
        if error.status_code == 404:
            bare = path.rstrip("/")
            ends = (
                any(isinstance(route, Route) and route.path_regex.match(bare) for route in app.routes) and bare != path
            )
            told = NotFound(f"there is nothing at {path}{f'; there is at {bare}, with no slash at its end' * ends}")
        if error.status_code == 405:
            told = MethodNotAllowed(f"{path} does not take {request.method}")
        response = await refused(request, told)
        response.headers.update(error.headers or {})  # which methods it does take
        return response

    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def bug(request: Request, _: Exception) -> Response:
        """Ours; Starlette logs it with its traceback. The client learns nothing about it."""
        return await refused(request, EngineFailure("internal error", code="internal_error"))

    return refused


def _is_still_sent(request: Request) -> bool:
    """Whether more of the body is on its way than is worth waiting for."""
    complete = getattr(request.state, "body_complete", None)
    if complete is not None:  # it was read, to its end or not
        return not complete
    length = request.headers.get("content-length", "0")
    return "transfer-encoding" in request.headers or not length.isdecimal() or int(length) > SHORT_BODY
