"""Read and parse JSON bodies and forms under limits; `uploads` limits their bytes and duration.

The part of a body that is not media has a much lower limit than the whole: a parser makes objects of it, up to fifty
times its size, and holds the GIL meanwhile. So these bytes are counted before parsing. Long bodies are parsed in a
thread. Knows nothing of the contents.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from service import unknown_fields
from service.errors import BadRequest, TooLarge, UnsupportedMedia
from service.media.data_uri import START_IN_JSON
from service.settings import Settings
from service.uploads import Upload
from service.validation import as_bad_request

JSON, FORM = "application/json", "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"  # `curl -d` sends this for any body
PARSED_ON_THE_LOOP = 64 * 1024  # bytes; longer bodies take milliseconds
# The beginning of a medium in a body of Anthropic's, which has base64 in fields of this name.
MEDIA_IN_ANTHROPIC = re.compile(rb'"data"[ \t\r\n]{0,8}:[ \t\r\n]{0,8}"|' + START_IN_JSON.pattern)
WIDE = re.compile(rb"\\u(?!00[0-7])")  # an escaped character that is not ASCII

Schema = TypeVar("Schema", bound=msgspec.Struct)
Parsed = TypeVar("Parsed")

# One thread: a parser holds the GIL from start to end, and several would starve the event loop.
_parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")


async def read_json(
    upload: Upload, schema: type[Schema], settings: Settings, *, media: re.Pattern[bytes] = START_IN_JSON
) -> Schema:
    """Read a JSON body into `schema`. media: matches the beginning of a string that counts as a medium.

    Raises BadRequest, TooLarge, UnsupportedMedia, and what `Upload.read` raises.
    """
    kind, _ = parse_options_header(upload.content_type)
    if kind not in ("", JSON, URLENCODED) and not kind.endswith("+json"):
        raise _wrong_content_type(kind, JSON)
    body = bytearray()
    await upload.read(settings.max_body_bytes, body.extend)
    ignored: list[str] = []

    def decode(body: bytearray) -> Schema:
        if _num_text_bytes(body, settings.max_text_bytes, media) > settings.max_text_bytes:
            raise _too_much_text(settings)
        if settings.strict:
            return msgspec.json.decode(body, type=schema)
        return unknown_fields.decode(body, schema, ignored)

    try:
        return await _parse(decode, body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise as_bad_request(error) from None
    finally:
        upload.note_ignored(ignored)


@dataclass(frozen=True)
class Form:
    """A form's texts and files, as (name, value) in their order."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # names of unknown fields, which whoever reads the form adds


async def read_form(upload: Upload, settings: Settings, *, max_files: int, max_fields: int) -> Form:
    """Read a form. One part more than allowed still passes here, so that later checks can name the limit."""
    kind, options = parse_options_header(upload.content_type)
    try:
        if kind == FORM:
            reader = _FormReader(options.get("boundary", ""), max_files + max_fields + 1, settings)
            with reader.parser:
                await upload.read(settings.max_body_bytes, reader.feed)
            return reader.form
        if kind == URLENCODED:
            body = bytearray()
            await upload.read(settings.max_text_bytes, body.extend)
            return Form(fields=await _parse(lambda text: _pairs(text, max_fields + 1), body))
    except UnicodeDecodeError:
        raise BadRequest("a field is not valid UTF-8", code="invalid_text") from None
    except (MultipartError, ValueError):  # their messages are a library's
        message = f"the form is malformed, or has more than {max_files + max_fields} parts"
        raise BadRequest(message, code="invalid_form") from None
    raise _wrong_content_type(kind, FORM)


class _FormReader:
    """Parses a multipart body piece by piece."""

    def __init__(self, boundary: str, max_parts: int, settings: Settings) -> None:
        self.form = Form()
        self.parser = PushMultipartParser(boundary, max_segment_count=max_parts)
        self._settings = settings
        self._part: MultipartSegment | None = None
        self._content = bytearray()  # of the current part
        self._num_text_bytes = 0

    def feed(self, chunk: bytes) -> None:
        for event in self.parser.parse(chunk) if chunk else ():
            if isinstance(event, MultipartSegment):
                self._part, self._content = event, bytearray()
            elif self._part is None:
                continue
            elif event is not None:
                self._content += event
                self._num_text_bytes += len(event) if self._part.filename is None else 0
                if self._num_text_bytes > self._settings.max_text_bytes:
                    raise _too_much_text(self._settings)
            elif self._part.filename is None:
                self.form.fields.append((self._part.name or "", self._content.decode()))
            else:
                self.form.files.append((self._part.name or "", bytes(self._content)))
                self._content = bytearray()


def _pairs(body: bytearray, max_fields: int) -> list[tuple[str, str]]:
    return parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=max_fields)


def _num_text_bytes(body: bytearray, limit: int, media: re.Pattern[bytes] = START_IN_JSON) -> int:
    """Count the bytes of a JSON body outside of its media; stop counting when they exceed `limit`.

    A medium is one ASCII string, so it becomes one object of its own size. No more text is searched than the limit,
    since the search holds the GIL."""
    number = at = 0
    while number <= limit and (start := media.search(body, at, at + limit - number + 1)):
        begin = start.end()
        end = body.find(b'"', begin)
        rest = body[begin:end]
        if end < 0 or not rest.isascii() or (b"\\u" in rest and WIDE.search(rest)):
            break
        number, at = number + begin - at, end
    return number + len(body) - at


async def _parse(parser: Callable[[bytearray], Parsed], body: bytearray) -> Parsed:
    if len(body) <= PARSED_ON_THE_LOOP:
        return parser(body)
    return await asyncio.get_running_loop().run_in_executor(_parser, parser, body)


def _wrong_content_type(kind: str, expected: str) -> UnsupportedMedia:
    problem = f"not {kind[:64]}" if kind else "there was none"
    message = f"send Content-Type: {expected}; {problem}"
    return UnsupportedMedia(message, param="content-type", code="invalid_content_type")


def _too_much_text(settings: Settings) -> TooLarge:
    message = f"the body has more than {settings.max_text_bytes} bytes besides its media"
    return TooLarge(message, code="too_much_text")
