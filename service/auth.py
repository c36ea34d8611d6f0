"""Check keys. The decorators wrap every /v1 and /admin handler, so that access never depends on comparing paths."""

from __future__ import annotations

import hmac
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

from service.deps import Handler, service_of
from service.errors import NotFound, Unauthorized
from service.origin import check_origin


def require_api_key(handler: Handler) -> Handler:
    """Require an API key where keys are set; without keys, refuse web pages of other origins.

    Sets `request.state.key` to the key, for its own limits, or to None.
    """

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        request.state.key = _key_of(request)
        if request.state.key is None:
            check_origin(request, service_of(request).settings.allowed_origins)
        return await handler(request)

    return guarded


def require_admin_key(handler: Handler) -> Handler:
    """Require the admin key; without one set, nobody may use the handler. API keys do not count."""

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        key = service_of(request).settings.admin_key
        if key is None or not key.get_secret_value():
            raise NotFound(
                f"{request.url.path} is disabled: start the service with --admin-key KEY (FLASH_ADMIN_KEY) to use it",
                code="admin_off",
            )
        token = _bearer(request)
        if not token:
            raise _no_key("the admin key")
        if not hmac.compare_digest(token.encode(), key.get_secret_value().encode()):
            raise Unauthorized("this is not the admin key")
        return await handler(request)

    return guarded


def may_see_details(request: Request) -> bool:
    """Return whether a request has a key, or needs none."""
    try:
        _key_of(request)
    except Unauthorized:
        return False
    return True


def _key_of(request: Request) -> str | None:
    """Return the API key of a request, or None where no keys are set. Raises Unauthorized."""
    keys = service_of(request).settings.api_key
    if not keys:
        return None
    # Anthropic's clients send the key in a header of its own, or in both.
    tokens = [token for token in (request.headers.get("x-api-key", "").strip(), _bearer(request)) if token]
    if not tokens:
        raise _no_key("an API key")
    # Compare with every key, each in constant time, so that the duration says nothing about the keys.
    secrets = [key.get_secret_value() for key in keys]
    matching = [
        secret for secret in secrets for token in tokens if hmac.compare_digest(token.encode(), secret.encode())
    ]
    if not matching:
        raise Unauthorized("the API key is not valid")
    return matching[0]


def _bearer(request: Request) -> str:
    """Return the bearer token, "" without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _no_key(required: str) -> Unauthorized:
    return Unauthorized(f"{required} is required: send 'Authorization: Bearer KEY'", code="missing_api_key")
