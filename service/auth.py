"""Who may ask: wrapped around every /v1 and /admin handler, so that no comparison of paths decides."""

from __future__ import annotations

import hmac
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

from service.deps import Handler, service_of
from service.errors import NotFound, Unauthorized
from service.origin import check_origin


def keyed(handler: Handler) -> Handler:
    """Only for who has a key, where keys are set, and else for no page of another site, which could not have sent one.
    `request.state.key` says which key it is, for its own limit; or None."""

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        request.state.key = _key_of(request)
        if request.state.key is None:
            check_origin(request, service_of(request).settings.allowed_origins)
        return await handler(request)

    return guarded


def admin(handler: Handler) -> Handler:
    """Only for who has the admin key; where none is set, for nobody. Keys of the API are of no use here."""

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        key = service_of(request).settings.admin_key
        if key is None or not key.get_secret_value():
            raise NotFound(
                f"{request.url.path} is off: start the service with --admin-key KEY (FLASH_ADMIN_KEY) to use it",
                code="admin_off",
            )
        given = _given(request, "the admin key")
        if not hmac.compare_digest(given, key.get_secret_value().encode()):
            raise Unauthorized("this is not the admin key")
        return await handler(request)

    return guarded


def may_see_details(request: Request) -> bool:
    """Whether it has a key, or none is needed."""
    try:
        _key_of(request)
    except Unauthorized:
        return False
    return True


def _key_of(request: Request) -> str | None:
    keys = service_of(request).settings.api_key
    if not keys:
        return None
    given = _given(request, "an API key")
    # Every key is compared, in constant time: how long it takes says nothing about which one is near.
    secrets = [key.get_secret_value() for key in keys]
    matching = [secret for secret in secrets if hmac.compare_digest(given, secret.encode())]
    if not matching:
        raise Unauthorized("the API key is not known here")
    return matching[0]


def _given(request: Request, wanted: str) -> bytes:
    """The bearer token that came along."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized(f"{wanted} is needed: send 'Authorization: Bearer KEY'", code="missing_api_key")
    return given.strip().encode()
