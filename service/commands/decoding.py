"""Decodes a user's own files, for `flashserve train` and `flashserve bench`, like those that come over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from model.request import Geometry, Medium
from service.errors import ServiceError
from service.media import Kind, MediaDecoder, MediaLimits

if TYPE_CHECKING:
    from model.train.manifest import Decode


@contextmanager
def decode_files(
    limits: MediaLimits, geometry: Geometry, num_frames: int | None = None, fps: float | None = None
) -> Iterator[Decode]:
    """Start a decoding child for as long as this lasts; yields what turns a file into a medium, or raises Unusable."""
    from model.train.data import Unusable

    decoder = MediaDecoder(limits, geometry, workers=1)
    with asyncio.Runner() as runner:
        runner.run(decoder.start())

        def decode(path: Path, kind: Kind | None) -> Medium:
            try:
                return runner.run(decoder.decode(path.read_bytes(), kind=kind, num_frames=num_frames, fps=fps))
            except (ServiceError, OSError) as error:
                raise Unusable(str(error)) from error

        try:
            yield decode
        finally:
            runner.run(decoder.close())
