"""Build the messages of a request: fetch and decode their media, keeping the order of texts and media.

Knows nothing of how media are decoded, nor of engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from model.request import Medium, Message
from service.errors import BadRequest, NoCapacity, ServiceError
from service.media import Kind, MediaDecoder, MediaLimits, fetch
from service.schemas.generate import GenerateRequest
from service.schemas.openai import ChatMessage, ChatRequest, ImagePart, TextPart, VideoPart
from service.schemas.sampling import SamplingFields
from service.uploads import Upload


@dataclass(frozen=True)
class ChatInput:
    messages: tuple[Message, ...]
    num_media: int
    seconds: float  # spent on fetching and decoding


@dataclass(frozen=True)
class MediaLoader:
    """Fetches and decodes media as the service's settings allow."""

    decoder: MediaDecoder | None  # None before the target's geometry is known
    limits: MediaLimits
    allowed_domains: tuple[str, ...]
    on_loaded: Callable[[str, float], None]  # called with the kind of each medium and the seconds that it took

    async def from_url(self, url: str, kind: Kind, fields: SamplingFields, upload: Upload) -> Medium:
        """Load a medium from a data: or http(s) URL; its fetched bytes count as part of the upload."""
        started = time.monotonic()
        data = await fetch.resolve(
            url, limits=self.limits, allowed_domains=self.allowed_domains, count=upload.count_bytes
        )
        return await self._decode(data, kind, fields, upload.client, started)

    async def from_file(self, data: bytes, fields: SamplingFields, client: str) -> Medium:
        """Load an uploaded file; its bytes say whether it is an image or a video."""
        return await self._decode(data, None, fields, client, time.monotonic())

    async def _decode(
        self, data: bytes, kind: Kind | None, fields: SamplingFields, client: str, started: float
    ) -> Medium:
        """Decode a file and report how long the medium took since `started`."""
        if self.decoder is None:
            raise NoCapacity("media cannot be decoded at the moment")
        medium = await self.decoder.decode(data, kind=kind, num_frames=fields.num_frames, fps=fields.fps, client=client)
        self.on_loaded(medium.kind, time.monotonic() - started)
        return medium


async def from_chat(request: ChatRequest, upload: Upload, loader: MediaLoader) -> ChatInput:
    """Load all media of a chat completion at once. An error's `param` names the content part at fault."""
    started = time.monotonic()
    loads: list[Awaitable[Medium]] = []
    positions: list[tuple[int, int]] = []  # of each medium: message, part
    contents: list[list[str | Medium]] = []
    for index, message in enumerate(request.messages):
        contents.append([])
        for number, part in enumerate(message.parts()):
            if isinstance(part, TextPart):
                contents[index].append(part.text)
            else:
                contents[index].append("")  # replaced by the medium
                positions.append((index, number))
                loads.append(_load_part(loader, part, request, upload, f"messages[{index}].content[{number}]"))
    media = await _gather(loads)
    for (index, number), medium in zip(positions, media, strict=True):
        contents[index][number] = medium
    check_sampling_used(request, media)
    messages = (Message(_role(m), tuple(parts)) for m, parts in zip(request.messages, contents, strict=True))
    return ChatInput(tuple(messages), len(media), time.monotonic() - started)


async def from_form(request: GenerateRequest, files: Sequence[bytes], client: str, loader: MediaLoader) -> ChatInput:
    """Load all files of a form; they come before its prompt in one user message."""
    started = time.monotonic()
    media = await _gather([_load_file(loader, file, request, client) for file in files])
    check_sampling_used(request, media)
    text = (request.prompt,) if request.prompt else ()
    return ChatInput((Message("user", (*media, *text)),), len(media), time.monotonic() - started)


def check_sampling_used(fields: SamplingFields, media: Sequence[Medium]) -> None:
    """Raise BadRequest for num_frames or fps without a video."""
    for name in ("num_frames", "fps"):
        if getattr(fields, name) is not None and all(medium.kind != "video" for medium in media):
            raise BadRequest(f"{name} is for videos, and there is none", param=name)


async def _load_part(
    loader: MediaLoader, part: ImagePart | VideoPart, request: ChatRequest, upload: Upload, param: str
) -> Medium:
    with _naming(param):
        return await loader.from_url(part.url, "image" if isinstance(part, ImagePart) else "video", request, upload)


async def _load_file(loader: MediaLoader, file: bytes, request: GenerateRequest, client: str) -> Medium:
    with _naming("media"):
        return await loader.from_file(file, request, client)


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


def _role(message: ChatMessage) -> Literal["system", "user", "assistant"]:
    if message.role in ("system", "developer"):
        return "system"
    return "assistant" if message.role == "assistant" else "user"
