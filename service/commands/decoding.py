"""Decodes a user's own files, for `flashserve train` and `flashserve bench`, like those that come over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from model.request import Geometry, Medium, RequestError, VideoMetadata
from service.errors import BadRequest, ServiceError
from service.media import Kind, MediaDecoder, MediaLimits
from service.media.question import SampleFrames

if TYPE_CHECKING:
    from model.train.manifest import Decode


# Of an engine or a target in this process: see `model.targets.base.Target.sample_frames`.
Sample = Callable[[VideoMetadata, int | None, float | None], Sequence[int] | None]


def answer_at_once(sample: Sample) -> SampleFrames:
    """Return `sample` as the media decoder calls it."""

    async def answer(source: VideoMetadata, num_frames: int | None, fps: float | None) -> Sequence[int] | None:
        try:
            return sample(source, num_frames, fps)
        except RequestError as error:
            raise BadRequest(error.message, code="not_sampled") from None

    return answer


@contextmanager
def decode_files(
    limits: MediaLimits,
    geometry: Geometry,
    num_frames: int | None = None,
    fps: float | None = None,
    *,
    sample: Sample | None = None,
) -> Iterator[Decode]:
    """Start a decoding child for as long as this lasts; yields what turns a file into a medium, or raises Unusable."""
    from model.train.data import Unusable

    sample_frames = None if sample is None else answer_at_once(sample)
    decoder = MediaDecoder(limits, geometry, workers=1, sample_frames=sample_frames)
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
