"""A list of pictures to a video's sampled frames. Runs in a decoding child; knows nothing of processes or HTTP.

Which frames are taken: all, in their order, but no more than `max_frames`, spread evenly. With `num_frames`, as of any
video; with `fps` as of any video too, where the list tells its rate, else a refusal. Each is decoded as a picture is;
those of another size are brought to that of the first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from model.request import Geometry
from service.media import frame_list
from service.media.geometry import check_size, to_geometry
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import KIND_OF, sniff
from service.media.video import at_rate, spread
from service.media.wire import Job


def decode_frame_list(
    data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry
) -> tuple[np.ndarray, float | None]:
    """Return (frames, height, width, 3) uint8 RGB, and the seconds from one of them to the next where they are known.

    Raises Refusal, of a frame with its number from 1 on.
    """
    files, rate = frame_list.split(data)
    if len(files) > limits.max_source_frames:
        raise Refusal("too_many_source_frames", frames=len(files), max_source_frames=limits.max_source_frames)
    if rate is not None and len(files) / rate > limits.max_video_seconds:
        raise Refusal("too_long", seconds=int(len(files) / rate), max_video_seconds=int(limits.max_video_seconds))

    indices = _sampled(len(files), rate, job, limits)
    as_sent = replace(geometry, exact=None, shortest_edge=None, crop=None, image=None, video=None)
    alike = replace(limits, max_pixels=limits.max_video_pixels)
    frames: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    last_index = -1
    for index in indices:
        if index != last_index:
            try:
                picture = _decoded(bytes(files[index]), alike, as_sent)
                if size is None:
                    size = picture.size
                    check_size(*size, max_pixels=alike.max_pixels, limits=limits, geometry=geometry, kind="video")
            except Refusal as refusal:
                refusal.numbers["frame"] = int(index) + 1
                raise
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            frame = to_geometry(picture, geometry, "video", len(indices))
        frames.append(frame)
        last_index = index
    spanned = 0.0 if rate is None else float(indices[-1] - indices[0]) / rate
    return np.stack(frames), spanned / (len(frames) - 1) if spanned > 0 else None


def _sampled(num_frames: int, rate: float | None, job: Job, limits: MediaLimits) -> np.ndarray:
    """Indices of the frames that are taken, ascending."""
    if job.fps is not None:
        if rate is None:
            raise Refusal("no_frame_times")
        return at_rate(np.arange(num_frames) / rate, num_frames / rate, job.fps, limits.max_frames)
    return spread(num_frames, job.num_frames or min(num_frames, limits.max_frames))


def _decoded(file: bytes, limits: MediaLimits, geometry: Geometry) -> Image.Image:
    """Decode one picture at its own size."""
    format = sniff(file)
    if format is None or KIND_OF[format] != "image":
        raise Refusal("not_an_image")
    try:
        return Image.fromarray(decode_image(file, format, limits=limits, geometry=geometry)[0])
    except (Refusal, MemoryError):
        raise
    except Exception:  # whatever Pillow raises on files that are broken
        raise Refusal("image_not_decodable") from None
