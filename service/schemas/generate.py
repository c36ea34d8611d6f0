"""The native route's form: its fields as text, its files as media."""

from __future__ import annotations

import msgspec
from starlette.datastructures import FormData, UploadFile

from service.errors import BadRequest, TooLarge
from service.schemas import sampling
from service.schemas.invalid import as_bad_request
from service.schemas.sampling import NOT_BUILT, SamplingFields
from service.settings import Settings


class GenerateRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str


def read(form: FormData, settings: Settings) -> tuple[GenerateRequest, list[UploadFile]]:
    """The fields and the media of a form. A field left empty, as browsers send it, is a field left out."""
    media: list[UploadFile] = []
    fields: dict[str, str | list[str]] = {}
    for name, value in form.multi_items():
        _check_text(name, value)
        if isinstance(value, UploadFile) != (name == "media"):
            kind = "a file" if isinstance(value, UploadFile) else "text"
            raise BadRequest(f"{name[:64]} was sent as {kind}; only media are files", param=name[:64])
        if isinstance(value, UploadFile):
            media.append(value)
        elif name == "stop" and value:
            fields["stop"] = [*fields.get("stop", ()), value]
        elif name in fields:
            raise BadRequest(f"{name[:64]} was sent twice", param=name[:64])
        elif value or name == "prompt":
            fields[name] = value
    try:
        ask = msgspec.convert(fields, GenerateRequest, strict=False)
    except msgspec.ValidationError as error:
        raise as_bad_request(error) from None
    _check(ask, media, settings)
    return ask, media


def _check_text(name: str, value: str | UploadFile) -> None:
    """A form may name an encoding in which halves of characters can be written; nothing beyond could take them."""
    try:
        (name + (value if isinstance(value, str) else "")).encode()
    except UnicodeEncodeError:
        raise BadRequest("a field is not valid Unicode text", code="invalid_text") from None


def _check(ask: GenerateRequest, media: list[UploadFile], settings: Settings) -> None:
    sampling.check_model(ask.model, settings)
    sampling.refuse_not_built(ask, NOT_BUILT)
    sampling.check_video_sampling(ask, settings)
    if (ask.n or 1) != 1:
        raise BadRequest("n is for /v1/chat/completions; here it is always 1", param="n")
    if not ask.prompt and not media:
        raise BadRequest("there is neither a prompt nor a medium", param="prompt")
    sampling.check_prompt_chars(len(ask.prompt), settings, param="prompt")
    if len(media) > settings.max_media:
        raise BadRequest(f"at most {settings.max_media} media are allowed", param="media", code="too_many_media")
    for medium in media:
        if (medium.size or 0) > settings.max_media_bytes:
            raise TooLarge(
                f"a medium has {medium.size} bytes; at most {settings.max_media_bytes} are allowed",
                param="media",
                code="too_many_bytes",
            )
