"""Load the media of requests: fetch them as the settings allow, and decode them with the client's options.

Knows nothing of messages, nor of engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from model.request import Geometry, Medium
from service.errors import NoCapacity
from service.media import Kind, MediaDecoder, MediaLimits, fetch
from service.schemas import media_options
from service.schemas.media_options import MediaOptions
from service.uploads import Upload


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
