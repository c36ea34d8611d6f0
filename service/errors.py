"""The errors that a client can get, with their HTTP status and OpenAI's error envelope.

    ServiceError
    ├── BadRequest            400  the request is invalid; `param` names the field
    ├── Unauthorized          401  no valid key
    ├── Forbidden             403  an origin or host name that is not allowed
    ├── UnknownModel          404  a model that is not served here
    ├── NotFound              404  a route that does not exist
    ├── MethodNotAllowed      405  a method that the route does not support
    ├── TooSlow               408  the body arrives too slowly
    ├── TooLarge              413  over a limit in bytes
    ├── UnsupportedMedia      415  an unsupported media type or content type
    ├── ClientLimit           429  over the limit of one API key or one address
    ├── EngineFailure         500  this request failed; others continue
    ├── NoCapacity            503  full, loading, draining or without a worker; has Retry-After
    └── TimedOut              504  over the request timeout

Knows nothing of requests, media or workers.
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
    """`message` is sent to the client: it must contain no paths, addresses or libraries' messages."""

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
    """The server cannot take the request now; `retry_after` is in seconds."""

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
