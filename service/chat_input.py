"""Build the messages of a request: fetch and decode their media, keeping the order of texts and media.

Knows nothing of how media are decoded, nor of engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from model.request import Medium, Message, TemplateOptions
from service.errors import ServiceError
from service.media import Kind
from service.media_loader import MediaLoader, Source
from service.schemas import openai
from service.schemas.media_options import MediaOptions
from service.schemas.openai import ChatMediaOptions, ChatMessage, ChatRequest, TextPart
from service.uploads import Upload

ROLES: dict[str, Literal["system", "user", "assistant", "tool"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class ChatInput:
    messages: tuple[Message, ...]
    num_media: int
    seconds: float  # spent on fetching and decoding
    prompts: tuple[str | tuple[int, ...], ...] = ()  # raw prompts in place of the messages
    template: TemplateOptions = TemplateOptions()


async def from_chat(
    request: ChatRequest,
    options: ChatMediaOptions,
    upload: Upload,
    loader: MediaLoader,
    template: TemplateOptions | None = None,
) -> ChatInput:
    """Load all media of a chat completion at once. An error's `param` names the content part at fault."""
    started = time.monotonic()
    loads: list[Awaitable[Medium]] = []
    positions: list[tuple[int, int]] = []  # of each medium: message, part
    contents: list[list[str | Medium]] = []
    urls: dict[str, str] = {}  # by uuid, of the parts so far
    for index, message in enumerate(request.messages):
        contents.append([])
        for number, part in enumerate(message.parts()):
            if isinstance(part, TextPart):
                contents[index].append(part.text)
            else:
                contents[index].append("")  # replaced by the medium
                positions.append((index, number))
                own, param = options.parts[len(loads)], f"messages[{index}].content[{number}]"
                uuid, url = part.uuid or None, part.url
                if uuid is not None and (url := url or urls.get(uuid)) is not None:
                    urls[uuid] = url
                source = Source(url, uuid, request.cache_salt or "")
                loads.append(_load_part(loader, source, part.kind, own, upload, param))
    media = await _gather(loads)
    for (index, number), medium in zip(positions, media, strict=True):
        contents[index][number] = medium
    loader.check_used(options.request, media)
    messages = (
        _message(message, f"messages[{index}]", tuple(contents[index]))
        for index, message in enumerate(request.messages)
    )
    return ChatInput(tuple(messages), len(media), time.monotonic() - started, template=template or TemplateOptions())


async def from_form(
    prompt: str, files: Sequence[bytes], options: MediaOptions, client: str, loader: MediaLoader
) -> ChatInput:
    """Load all files of a form; they come before its prompt in one user message."""
    started = time.monotonic()
    media = await _gather([_load_file(loader, file, options, client) for file in files])
    loader.check_used(options, media)
    text = (prompt,) if prompt else ()
    return ChatInput((Message("user", (*media, *text)),), len(media), time.monotonic() - started)


async def _load_part(
    loader: MediaLoader, source: Source, kind: Kind, options: MediaOptions, upload: Upload, param: str
) -> Medium:
    with _naming(param):
        return await loader.load(source, kind, options, upload)


async def _load_file(loader: MediaLoader, file: bytes, options: MediaOptions, client: str) -> Medium:
    with _naming("media"):
        return await loader.from_file(file, options, client)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Give an error that names no parameter this one."""
    try:
        yield
    except ServiceError as error:
        error.param = error.param or param
        raise


async def _gather(loads: Sequence[Awaitable[Medium]]) -> list[Medium]:
    """Await all at once; the first that fails cancels the others."""
    if len(loads) == 1:  # most requests: no need for a task
        return [await loads[0]]
    tasks = [asyncio.ensure_future(load) for load in loads]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _message(message: ChatMessage, path: str, content: tuple[str | Medium, ...]) -> Message:
    return Message(
        ROLES[message.role],
        content,
        tool_calls=openai.calls(message, path),
        reasoning=openai.reasoning(message),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )
