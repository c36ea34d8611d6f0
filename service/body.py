"""Reading a body under limits: bytes are counted while they arrive, and the time they take.

Knows nothing of what the body says, but for parsing JSON off the event loop when it is long.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from service.errors import BadRequest, TooLarge
from service.schemas.invalid import as_bad_request
from service.settings import Settings

PARSED_ON_THE_LOOP = 64 * 1024  # bytes; longer ones take milliseconds

Schema = TypeVar("Schema", bound=msgspec.Struct)

# One thread: a parser holds the interpreter from start to end, and several in turn would starve the event loop.
_parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")


def limited(request: Request, settings: Settings) -> Request:
    """The same request, which raises TooLarge as soon as its body is known to be too long."""
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return Request(request.scope, receive)


async def read_json(request: Request, schema: type[Schema], settings: Settings) -> Schema:
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in limited(request, settings).stream():
                body += chunk
    except TimeoutError:
        raise _too_slow() from None
    decoder = msgspec.json.Decoder(schema)
    try:
        if len(body) <= PARSED_ON_THE_LOOP:
            return decoder.decode(body)
        return await asyncio.get_running_loop().run_in_executor(_parser, decoder.decode, body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise as_bad_request(error) from None


async def read_form(request: Request, settings: Settings, *, max_files: int, max_fields: int) -> FormData:
    """Files are spooled to disk when large. The caller closes the form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise BadRequest("send multipart/form-data", param="content-type", code="invalid_content_type")
    # Four bytes hold any character; one part more than allowed is left to the checks that name the limit.
    part_bytes = 4 * settings.max_prompt_chars + 4
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await limited(request, settings).form(
                max_files=max_files + 1, max_fields=max_fields, max_part_size=part_bytes
            )
    except TimeoutError:
        raise _too_slow() from None
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}", code="invalid_form") from None


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes", code="body_too_large")


def _too_slow() -> BadRequest:
    return BadRequest("the body did not arrive in time", code="body_timeout")
