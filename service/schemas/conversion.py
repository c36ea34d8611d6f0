"""Turn requests of other APIs into chat completions, and name their own fields in errors about those."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from service.errors import BadRequest, ServiceError
from service.schemas.media_options import ImageFields, MediaFields
from service.schemas.openai import ChatRequest
from service.schemas.sampling import SamplingFields
from service.validation import as_bad_request

# The path of a field. A single word is none: it may be plain English.
PATH = re.compile(r"(?<![\w.])(?:[^\W_]+_\w*|\w+(?:\.\w+|\[\d+\]))(?:\.\w+|\[\d+\])*")


class FieldNames:
    """Maps fields of a chat completion to those of the request that it was made from.

    `messages[2].content[0]` may be the `input[1].content[0]` of a response, and `max_completion_tokens` its
    `max_output_tokens`. What follows a name stays: `messages[2].content[0].image_url` becomes
    `input[1].content[0].image_url`.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self._names = dict(names)

    def add(self, name: str, own: str) -> None:
        self._names[name] = own

    def own(self, param: str) -> str:
        """Return a field's name in the request, by the longest name in the chat completion that it begins with."""
        for end in range(len(param), 0, -1):
            if (own := self._names.get(param[:end])) is not None and param[end : end + 1] in ("", ".", "["):
                return own + param[end:]
        return param

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Let errors name the fields of the request."""
        try:
            yield
        except ServiceError as error:
            self.rename(error)
            raise

    def rename(self, error: ServiceError) -> None:
        """Name the fields of the request in an error. Words such as "messages" may be plain English in its text."""
        error.message = PATH.sub(lambda found: self.own(found[0]), error.message)
        error.param = error.param and self.own(error.param)


def sampling_fields(request: SamplingFields) -> dict[str, Any]:
    """Return the fields that a request has in common with a chat completion, without those at their default."""
    fields = {name: getattr(request, name) for name in SamplingFields.__struct_fields__}
    return {name: value for name, value in fields.items() if value is not None}


def medium_part(kind: Literal["image", "video"], url: dict[str, Any] | None, part: ImageFields) -> dict[str, Any]:
    """Return the part of a chat completion for a medium, with the options and the `uuid` that its own part has.

    url: as `image_url` has it; None for a medium that was sent before.
    """
    names = (MediaFields if isinstance(part, MediaFields) else ImageFields).__struct_fields__
    fields = {name: getattr(part, name) for name in (*names, "uuid")}
    fields = {"type": f"{kind}_url", f"{kind}_url": url} | fields
    return {name: value for name, value in fields.items() if value is not None}


def chat_request(fields: dict[str, Any], names: FieldNames) -> ChatRequest:
    """Build a chat completion. Raises BadRequest, with the request's own names."""
    try:
        return msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as error:
        bad = as_bad_request(error)
        names.rename(bad)
        raise bad from None


def missing(param: str) -> BadRequest:
    return BadRequest(f"{param} is missing", param=param, code="missing_field")
