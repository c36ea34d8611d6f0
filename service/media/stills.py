"""Decode a list of pictures to a video's sampled frames. Runs in a decoding child; knows nothing of processes or HTTP.

By default all frames are used, or `max_frames` of them spread evenly. `num_frames` and `fps` work as for any video;
`fps` needs a list that says its frame rate. Frames of another size are resized to that of the first.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from model.request import Geometry, VideoMetadata
from service.media import frame_list
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal, errors_as_refusals
from service.media.resize import FrameSize
from service.media.sampling import at_rate, most_frames, spread
from service.media.sniff import KIND_OF, sniff
from service.media.video import Frames
from service.media.wire import Job

UNRESIZED = Geometry(max_ratio=sys.maxsize)


def decode_frame_list(data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry) -> Frames:
    """Decode to the sampled frames, all of one size, with their times where the rate is known.

    Raises Refusal; where one frame is at fault, with its number from 1.
    """
    files, rate = frame_list.split(data)
    if len(files) > limits.max_source_frames:
        raise Refusal("too_many_source_frames", frames=len(files), max_source_frames=limits.max_source_frames)
    if rate is not None and len(files) / rate > limits.max_video_seconds:
        raise Refusal("too_long", seconds=int(len(files) / rate), max_video_seconds=int(limits.max_video_seconds))

    indices = _sample(len(files), rate, job, limits).tolist()
    frame_limits = replace(limits, max_pixels=limits.max_video_pixels)
    sizes, size = FrameSize(limits, geometry), (0, 0)
    frames: list[np.ndarray] = []
    last_index = -1
    for index in indices:
        if index != last_index:
            try:
                picture = _decode_frame(bytes(files[index]), frame_limits)
                if not frames:
                    size = picture.size
                    sizes.check(*size)
            except Refusal as refusal:
                refusal.numbers["frame"] = index + 1
                raise
            frame = sizes.resize(picture, len(indices))
        frames.append(frame)
        last_index = index
    source = VideoMetadata(len(files), rate, rate and len(files) / rate, *size)
    if rate is None:
        return Frames(frames, None, None, source)
    span = (indices[-1] - indices[0]) / rate
    times = tuple(index / rate for index in indices)
    return Frames(frames, span / (len(frames) - 1) if span > 0 else None, times, source)


def _sample(num_frames: int, rate: float | None, job: Job, limits: MediaLimits) -> np.ndarray:
    """Return the indices of the frames to decode, ascending."""
    if job.fps is not None:
        if rate is None:
            raise Refusal("no_frame_times")
        return at_rate(np.arange(num_frames) / rate, num_frames / rate, job.fps, most_frames(job, limits))
    return spread(num_frames, job.num_frames or min(num_frames, limits.max_frames))


def _decode_frame(file: bytes, limits: MediaLimits) -> Image.Image:
    """Decode one picture at its own size."""
    format = sniff(file)
    if format is None or KIND_OF[format] != "image":
        raise Refusal("not_an_image")
    with errors_as_refusals("image"):
        return Image.fromarray(decode_image(file, format, limits=limits, geometry=UNRESIZED)[0])
