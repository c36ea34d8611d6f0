"""Who may ask: a dependency of every /v1 route, so that no comparison of paths decides."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from service.deps import service_of
from service.errors import Unauthorized


async def require_key(request: Request) -> None:
    """Leaves in `request.state.key` which key it was, for its own limit; None where there are no keys."""
    request.state.key = None
    keys = service_of(request).settings.api_key
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("an API key is needed: send 'Authorization: Bearer KEY'", code="missing_api_key")
    # Every key is compared, in constant time: how long it takes says nothing about which one is near.
    secrets = [key.get_secret_value() for key in keys]
    matching = [secret for secret in secrets if hmac.compare_digest(given.strip().encode(), secret.encode())]
    if not matching:
        raise Unauthorized("the API key is not known here")
    request.state.key = matching[0]
