"""How a route gets at the service: from the application's state, by one function."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from starlette.requests import Request

if TYPE_CHECKING:
    from service.state import Service


def service_of(request: Request) -> Service:
    return cast("Service", request.app.state.service)
