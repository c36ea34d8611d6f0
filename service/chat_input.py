"""Build the messages of a request: fetch and decode their media, keeping the order of texts and media.

Knows nothing of how media are decoded, nor of engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from model.request import Geometry, Medium, Message
from service.errors import NoCapacity, ServiceError
from service.media import Kind, MediaDecoder, MediaLimits, fetch
from service.schemas import media_options
from service.schemas.media_options import MediaOptions
from service.schemas.openai import ChatMediaOptions, ChatMessage, ChatRequest, ImagePart, TextPart, VideoPart
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
    count_decoded: Callable[[int], None]  # called with the bytes of each medium

    async def from_url(self, url: str, kind: Kind, options: MediaOptions, upload: Upload) -> Medium:
        """Load a medium from a data: or http(s) URL; its fetched bytes count as part of the upload."""
        started = time.monotonic()
        data = await fetch.resolve(
            url, limits=self.limits, allowed_domains=self.allowed_domains, count=upload.count_bytes
        )
        return await self._decode(data, kind, options, upload.client, started)

    async def from_file(self, data: bytes, options: MediaOptions, client: str) -> Medium:
        """Load an uploaded file; its bytes say whether it is an image or a video."""
        return await self._decode(data, None, options, client, time.monotonic())

    def check_used(self, options: MediaOptions, media: Sequence[Medium]) -> None:
        """Raise BadRequest for an option of a request that none of its media is for."""
        geometry = Geometry() if self.decoder is None else self.decoder.geometry
        media_options.check_used(options, geometry, [medium.kind for medium in media])

    async def _decode(
        self, data: bytes, kind: Kind | None, options: MediaOptions, client: str, started: float
    ) -> Medium:
        """Decode a file and report how long the medium took since `started`."""
        if self.decoder is None:
            raise NoCapacity("media cannot be decoded at the moment")
        medium = await decode_with_options(self.decoder, data, kind, options, client)
        self.on_loaded(medium.kind, time.monotonic() - started)
        self.count_decoded(medium.frames.nbytes)
        return medium


async def decode_with_options(
    decoder: MediaDecoder, data: bytes, kind: Kind | None, options: MediaOptions, client: str = ""
) -> Medium:
    """Decode a file to a medium that carries the client's options for the model's processor.

    Raises what `MediaDecoder.decode` raises, and BadRequest for options that would make too much of this medium.
    """
    geometry, limits = decoder.geometry, decoder.limits
    medium = await decoder.decode(data, kind=kind, num_frames=options.num_frames, fps=options.fps, client=client)
    own = options.known_to(geometry, medium.kind)
    if own:
        num_frames, height, width, _ = medium.frames.shape
        most = limits.max_pixels if medium.kind == "image" else limits.max_clip_pixels
        media_options.check_pixels(replace(options, values=dict(own)), geometry, (num_frames, height, width), most)
        medium = replace(medium, options=own)
    return medium


async def from_chat(request: ChatRequest, options: ChatMediaOptions, upload: Upload, loader: MediaLoader) -> ChatInput:
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
                own, param = options.parts[len(loads)], f"messages[{index}].content[{number}]"
                loads.append(_load_part(loader, part, own, upload, param))
    media = await _gather(loads)
    for (index, number), medium in zip(positions, media, strict=True):
        contents[index][number] = medium
    loader.check_used(options.request, media)
    messages = (Message(_role(m), tuple(parts)) for m, parts in zip(request.messages, contents, strict=True))
    return ChatInput(tuple(messages), len(media), time.monotonic() - started)


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
    loader: MediaLoader, part: ImagePart | VideoPart, options: MediaOptions, upload: Upload, param: str
) -> Medium:
    with _naming(param):
        return await loader.from_url(part.url, part.kind, options, upload)


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


def _role(message: ChatMessage) -> Literal["system", "user", "assistant"]:
    if message.role in ("system", "developer"):
        return "system"
    return "assistant" if message.role == "assistant" else "user"
