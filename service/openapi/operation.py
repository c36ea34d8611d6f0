"""Describes one route for the OpenAPI document. Every module of routes lists its own in OPERATIONS, beside ROUTES."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from service.errors import ErrorEnvelope
from service.trace_context import REQUEST_ID

HTML, TEXT = ("text/html",), ("text/plain",)
# What a route that reads a body and decodes an answer may be refused with.
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
LOOKUP_REFUSALS = (401, 403)


@dataclass(frozen=True)
class Files:
    """A field of a form that takes files."""

    name: str
    description: str


@dataclass(frozen=True)
class Operation:
    """One method of one route.

    answers: by status, the type of a JSON body, or the media types of others; body: the type that checks the JSON
    body or form; events: the types of a stream's events, which the same status may bring instead; named: whether an
    event has a name beside its data; key: which key it needs where keys are set; refusals: statuses of errors; example:
    of a body.
    """

    method: Literal["get", "post"]
    path: str
    summary: str
    answers: Mapping[int, Any]
    tag: str
    description: str = ""
    body: type[msgspec.Struct] | None = None
    form: Files | None = None
    events: tuple[Any, ...] = ()
    named_events: bool = False
    closing_event: str | None = "[DONE]"
    key: Literal["api", "admin"] | None = "api"
    refusals: tuple[int, ...] = REFUSALS
    error: Any = ErrorEnvelope
    request_id: str | None = REQUEST_ID
    parameters: Mapping[str, str] = field(default_factory=dict)  # in the path: descriptions by name
    example: Mapping[str, Any] | None = None
    not_supported: Collection[str] = ()  # fields that are refused by name unless they ask for nothing
    without_effect: Collection[str] = ()  # fields that are accepted
    bounded: bool = True  # larger values than the settings allow are refused; otherwise lowered, or of no matter

    @property
    def types(self) -> list[Any]:
        """The types that it names."""
        answers = [answer for answer in self.answers.values() if not isinstance(answer, tuple)]
        return [*([self.body] if self.body else []), *answers, *self.events, self.error]
