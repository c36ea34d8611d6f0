"""The form of POST /v1/generate: text fields and media files."""

from __future__ import annotations

from typing import Any

import msgspec

from service import unknown_fields
from service.body import Form
from service.errors import BadRequest, TooLarge
from service.schemas import sampling, structured
from service.schemas.sampling import SamplingFields
from service.settings import Settings
from service.validation import as_bad_request

# Fields that are JSON text.
JSON_FIELDS = ("logit_bias", "stop_token_ids", "mm_processor_kwargs", "media_io_kwargs", *structured.JSON_FIELDS)


class GenerateRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str = ""


def read(form: Form, settings: Settings) -> tuple[GenerateRequest, list[bytes]]:
    """Return the fields and the media of a form. An empty field, as browsers send it, counts as missing.

    Adds the names of fields that are ignored to `form.ignored`.
    """
    fields: dict[str, Any] = {}
    for name, value in form.fields:
        if name == "media":
            raise _misplaced(name, "text")
        if not value:
            continue
        if name == "stop":
            fields["stop"] = [*fields.get("stop", ()), value]
        elif name in fields:
            raise BadRequest(f"{name[:64]} was sent twice", param=name[:64])
        else:
            fields[name] = value
    for name, _ in form.files:
        if name != "media":
            raise _misplaced(name, "a file")
    try:
        for name in JSON_FIELDS:
            if text := fields.get(name):
                fields[name] = _parsed(name, str(text))
        if not settings.strict:
            unknown_fields.drop(fields, GenerateRequest, form.ignored)
        request = msgspec.convert(fields, GenerateRequest, strict=False)
    except msgspec.ValidationError as error:
        raise as_bad_request(error) from None
    media = [data for _, data in form.files]
    _check(request, media, settings)
    return request, media


def _parsed(name: str, value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest(f"{name} is not JSON text", param=name) from None


def _misplaced(name: str, kind: str) -> BadRequest:
    return BadRequest(f"{name[:64]} was sent as {kind}; only media are files", param=name[:64])


def _check(request: GenerateRequest, media: list[bytes], settings: Settings) -> None:
    sampling.check_model(request.model, settings)
    if (request.n or 1) != 1:
        raise BadRequest("n is for /v1/chat/completions; here it is always 1", param="n")
    if not request.prompt and not media:
        raise BadRequest("there is neither a prompt nor a medium", param="prompt")
    sampling.check_prompt_chars(len(request.prompt), settings, param="prompt")
    if len(media) > settings.max_media:
        raise BadRequest(f"at most {settings.max_media} media are allowed", param="media", code="too_many_media")
    for medium in media:
        if len(medium) > settings.max_media_bytes:
            raise TooLarge(
                f"a medium has {len(medium)} bytes; at most {settings.max_media_bytes} are allowed",
                param="media",
                code="too_many_bytes",
            )
