"""Check the Origin and Host headers of requests, against web pages that abuse a service without API keys.

A browser sends simple requests (a form, a text) to any address that a web page names, without asking (CSRF). So any
page that somebody visits could use a service on their machine or network. Browsers send the page's origin; a client
without one is no browser, and is allowed. A page whose own name resolves to this machine (DNS rebinding) could even
read the responses, but its requests have that name as Host.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, ServiceError
from service.settings import Settings

LOCAL_DOMAINS = (".localhost", ".local", ".internal")  # reserved: nobody can register a name in them


def check_origin(request: Request, allowed: tuple[str, ...]) -> None:
    """Raise Forbidden for a POST from a web page of another origin. allowed: origins that may; "*" is any."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if request.method in ("GET", "HEAD") or site in ("same-origin", "none"):
        return
    if origin is None:
        foreign = site == "cross-site"
    else:
        name = _hostname(origin.partition("://")[2])
        foreign = not _is_loopback(name) and (site == "cross-site" or name != _hostname(_host_of(request)))
    if foreign and "*" not in allowed and origin not in allowed:
        raise Forbidden(
            f"web pages of {(origin or 'other sites')[:128]} may not use this service; allow them with "
            "--allowed-origins (FLASH_ALLOWED_ORIGINS), or set an API key",
            code="origin_not_allowed",
        )


class AllowedHosts:
    """Middleware that refuses requests unless their Host is a name that no stranger can own, or an allowed one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed: tuple[str, ...],
        refuse: Callable[[Request, ServiceError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._allowed = tuple(name.lower() for name in allowed)
        self._refuse = refuse
        self._own_name = socket.gethostname().lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            request = Request(scope, receive)
            if not self._is_allowed(name := _hostname(_host_of(request))):
                error = Forbidden(
                    f"this service does not answer as {name[:128]}; allow it with --allowed-hosts "
                    "(FLASH_ALLOWED_HOSTS), or set an API key",
                    code="host_not_allowed",
                )
                app = await self._refuse(request, error)
        await app(scope, receive, send)

    def _is_allowed(self, name: str) -> bool:
        known = "." not in name or name == self._own_name or name.endswith(LOCAL_DOMAINS) or _is_address(name)
        return known or any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed)


def checks_hosts(settings: Settings) -> bool:
    """Return whether to check Host: where names are listed, or on a loopback address without API keys."""
    return bool(settings.allowed_hosts) or (_is_loopback(settings.host) and not settings.api_key)


def _host_of(request: Request) -> str:
    return request.headers.get("host", "")


def _hostname(authority: str) -> str:
    """Return the host of `example.com:8000` or `[::1]:8000`; for a malformed one, a name that nobody has."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").removesuffix(".")
    except ValueError:
        return "malformed.invalid"


def _is_loopback(name: str) -> bool:
    return (
        name == "localhost"
        or name.endswith(".localhost")
        or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return ":" in name  # an IPv6 address with a zone
    return True
