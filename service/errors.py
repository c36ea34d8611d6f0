"""Everything that can be said to a client about a request that was not served.

    ServiceError
    ├── BadRequest            400  the request is wrong; `param` says where
    ├── Unauthorized          401  no key, or not one of ours
    ├── Forbidden             403  a web page, or a name, that may not use this service
    ├── UnknownModel          404  a model that is not served here
    ├── NotFound              404  a route that does not exist
    ├── MethodNotAllowed      405  a route that exists, asked the wrong way
    ├── TooSlow               408  the body did not come fast enough
    ├── TooLarge              413  over one of the limits in bytes
    ├── UnsupportedMedia      415  not a media type that we read, nor a body's
    ├── ClientLimit           429  one key's own limit, or one address's
    ├── EngineFailure         500  this one request failed inside; others go on
    ├── NoCapacity            503  full, loading, draining or without a worker; carries Retry-After
    └── TimedOut              504  longer than the request timeout

This module knows OpenAI's envelope and the status codes, and nothing about requests, media or workers.
"""

from __future__ import annotations

from typing import ClassVar, TypedDict


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    error: ErrorBody


class ServiceError(Exception):
    """`message` is shown to the client as it stands: never put paths, addresses or library errors into it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def envelope(self) -> ErrorEnvelope:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {}


class BadRequest(ServiceError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class Unauthorized(ServiceError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    status = 403
    type = "permission_error"


class UnknownModel(ServiceError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class NotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class TooSlow(ServiceError):
    status = 408
    type = "invalid_request_error"
    default_code = "body_timeout"


class TooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    default_code = "too_large"


class UnsupportedMedia(ServiceError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media"


class ClientLimit(ServiceError):
    status = 429
    type = "rate_limit_error"
    default_code = "key_limit"


class EngineFailure(ServiceError):
    default_code = "engine_failure"


class NoCapacity(ServiceError):
    status = 503
    type = "service_unavailable"
    default_code = "no_capacity"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 1.0
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, round(self.retry_after)))}


class TimedOut(ServiceError):
    status = 504
    type = "server_error"
    default_code = "timeout"
