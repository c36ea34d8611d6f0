"""Load the media of requests: fetch them as the settings allow, and decode them with the client's options.

Knows nothing of messages, nor of engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.request import Geometry, Medium
from service.errors import BadRequest, NoCapacity
from service.media import Kind, MediaCache, MediaDecoder, MediaLimits, fetch
from service.media.media_cache import Owner
from service.schemas import media_options
from service.schemas.media_options import MediaOptions
from service.uploads import Upload


@dataclass(frozen=True)
class Source:
    """Where the file of a medium comes from: its URL; without one, it was sent before under the same `uuid`.

    salt: separates the uuids of users who share one key.
    """

    url: str | None
    uuid: str | None = None
    salt: str = ""


@dataclass(frozen=True)
class MediaLoader:
    """Fetches and decodes media as the service's settings allow."""

    decoder: MediaDecoder | None  # None before the target's geometry is known
    limits: MediaLimits
    allowed_domains: tuple[str, ...]
    allowed_folders: tuple[Path, ...]
    cache: MediaCache
    on_cache_query: Callable[[bool], None]  # called with whether a uuid was found
    on_loaded: Callable[[str, float], None]  # called with the kind of each medium and the seconds that it took
    count_decoded: Callable[[int], None]  # called with the bytes of each medium

    async def load(self, source: Source, kind: Kind, options: MediaOptions, upload: Upload) -> Medium:
        """Load a medium, and remember its file where it has a `uuid`.

        Bytes that do not come with the body count as part of the upload too.
        """
        started = time.monotonic()
        owner = (upload.client, source.salt)
        if source.url is None:
            data = self._remembered(owner, source.uuid or "", kind, upload)
        else:
            data = await fetch.resolve(
                source.url,
                limits=self.limits,
                allowed_domains=self.allowed_domains,
                allowed_folders=self.allowed_folders,
                count=upload.count_bytes,
            )
        medium = await self._decode(data, kind, options, upload.client, started)
        if source.uuid and source.url is not None:
            self.cache.put(owner, source.uuid, data)
        return medium

    async def from_file(self, data: bytes, options: MediaOptions, client: str) -> Medium:
        """Load an uploaded file; its bytes say whether it is an image or a video."""
        return await self._decode(data, None, options, client, time.monotonic())

    def check_used(self, options: MediaOptions, media: Sequence[Medium]) -> None:
        """Raise BadRequest for an option of a request that none of its media is for."""
        geometry = Geometry() if self.decoder is None else self.decoder.geometry
        media_options.check_used(options, geometry, [medium.kind for medium in media])

    def _remembered(self, owner: Owner, uuid: str, kind: Kind, upload: Upload) -> bytes:
        """Return the file that the client named so. Raises BadRequest."""
        data = self.cache.get(owner, uuid)
        self.on_cache_query(data is not None)
        if data is None:
            raise BadRequest(
                f"no {kind} is remembered under the uuid {uuid!r}, or not any more: send it again with its URL",
                code="media_not_cached",
            )
        upload.count_bytes(len(data))  # it stays in memory until it is decoded, even if the cache forgets it
        return data

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
