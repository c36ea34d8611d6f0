"""From what a client sent to what an engine reads: media are fetched and decoded, everything keeps its order.

Knows nothing of how media are decoded, nor of engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Literal

from model.request import Medium, Message
from service.errors import BadRequest, NoCapacity, ServiceError
from service.media import fetch
from service.schemas.generate import GenerateRequest
from service.schemas.openai import ChatMessage, ChatRequest, ImagePart, TextPart, VideoPart
from service.schemas.sampling import SamplingFields, check_num_frames
from service.state import Service
from service.uploads import Upload


@dataclass(frozen=True)
class Prompt:
    messages: tuple[Message, ...]
    num_media: int
    seconds: float  # spent on media


async def from_chat(service: Service, ask: ChatRequest, upload: Upload) -> Prompt:
    """Fetch and decode the media of a chat. client: whose they are, for their turn among those of others."""
    started = time.monotonic()
    _check_frames(service, ask)
    loads: list[Awaitable[Medium]] = []
    places: list[tuple[int, int]] = []
    contents: list[list[str | Medium]] = []
    for index, message in enumerate(ask.messages):
        contents.append([])
        for number, part in enumerate(message.parts()):
            if isinstance(part, TextPart):
                contents[index].append(part.text)
            else:
                contents[index].append("")  # until the medium is there
                places.append((index, number))
                loads.append(_from_url(service, ask, upload, part, f"messages[{index}].content[{number}]"))
    media = await _all(loads)
    for (index, number), medium in zip(places, media, strict=True):
        contents[index][number] = medium
    check_sampling_used(ask, media)
    messages = (Message(_role(m), tuple(parts)) for m, parts in zip(ask.messages, contents, strict=True))
    return Prompt(tuple(messages), len(media), time.monotonic() - started)


async def from_form(service: Service, ask: GenerateRequest, files: Sequence[bytes], client: str) -> Prompt:
    started = time.monotonic()
    _check_frames(service, ask)
    media = await _all([_from_file(service, ask, client, file) for file in files])
    check_sampling_used(ask, media)
    text = (ask.prompt,) if ask.prompt else ()
    return Prompt((Message("user", (*media, *text)),), len(media), time.monotonic() - started)


def _check_frames(service: Service, ask: SamplingFields) -> None:
    """Before anything is fetched or decoded; BadRequest."""
    if (info := service.pool.info) is not None:
        check_num_frames(ask, service.settings, info)


def check_sampling_used(ask: SamplingFields, media: Sequence[Medium]) -> None:
    """Whether there is a video to take frames of, where it is said which; BadRequest."""
    for name in ("num_frames", "fps"):
        if getattr(ask, name) is not None and all(medium.kind != "video" for medium in media):
            raise BadRequest(f"{name} is for videos, and there is none", param=name)


async def _from_url(
    service: Service, ask: ChatRequest, upload: Upload, part: ImagePart | VideoPart, param: str
) -> Medium:
    kind: Literal["image", "video"] = "image" if isinstance(part, ImagePart) else "video"
    started = time.monotonic()
    try:
        domains = service.settings.allowed_media_domains
        data = await fetch.resolve(part.url, limits=service.media_limits, allowed_domains=domains, count=upload.spend)
        return await _decode(service, ask, upload.client, data, kind, started)
    except ServiceError as error:
        error.param = error.param or param
        raise


async def _from_file(service: Service, ask: GenerateRequest, client: str, file: bytes) -> Medium:
    started = time.monotonic()
    try:
        return await _decode(service, ask, client, file, None, started)
    except ServiceError as error:
        error.param = error.param or "media"
        raise


async def _decode(
    service: Service,
    ask: SamplingFields,
    client: str,
    data: bytes,
    kind: Literal["image", "video"] | None,
    started: float,
) -> Medium:
    if service.decoder is None:
        raise NoCapacity("media cannot be decoded at the moment")
    medium = await service.decoder.decode(data, kind=kind, num_frames=ask.num_frames, fps=ask.fps, client=client)
    service.metrics.media_done(medium.kind, time.monotonic() - started)
    return medium


async def _all(loads: Sequence[Awaitable[Medium]]) -> list[Medium]:
    """All at once; the first that fails stops the others."""
    if len(loads) == 1:  # as most requests have: two tasks less
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
