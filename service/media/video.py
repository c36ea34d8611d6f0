"""One video file to its sampled frames. Runs in a decoding child; knows nothing of processes or HTTP.

Which frames are taken:

- `num_frames=n`: n frames spread evenly from the first to the last, both included (n = 1: the first). A clip with fewer
  frames repeats the nearest ones, so that the count asked for is the count used.
- `fps=f`: the frame on screen at each of the times 0, 1/f, 2/f, ... that lie within the clip, each at most once: asking
  for more than the clip has gives every frame. More than `max_frames` become `max_frames` spread evenly, so that the
  end of the clip is never cut off.
"""

from __future__ import annotations

import contextlib
import io

import decord
import numpy as np
from PIL import Image

from model.request import Geometry
from service.media.container import mirrored_axis, video_size
from service.media.geometry import check_size, to_geometry
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.wire import Job


def decode_video(data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry) -> tuple[np.ndarray, float | None]:
    """Returns (frames, height, width, 3) uint8 RGB, and the seconds from one of them to the next, on average; None
    where the clip has only one.

    Raises Refusal, and whatever decord raises on files that are broken.
    """

    def check(width: int, height: int) -> None:
        check_size(width, height, max_pixels=limits.max_video_pixels, limits=limits, geometry=geometry, kind="video")

    if (size := video_size(data, job.format)) is not None:
        check(*size)
    axis = mirrored_axis(data, job.format)  # decord turns frames as the container says, but does not mirror them
    # Reads the packets' headers, decodes nothing yet.
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    if len(reader) > limits.max_source_frames:
        raise Refusal("too_many_source_frames", frames=len(reader), max_source_frames=limits.max_source_frames)
    times = np.asarray(reader.get_frame_timestamp(list(range(len(reader)))), dtype=np.float64)
    starts, seconds = times[:, 0] - times[0, 0], float(times[-1, 1] - times[0, 0])
    if seconds > limits.max_video_seconds:
        raise Refusal("too_long", seconds=int(seconds), max_video_seconds=int(limits.max_video_seconds))

    if job.num_frames is not None:
        indices = spread(len(reader), job.num_frames)
    elif job.fps is not None:
        indices = at_rate(starts, seconds, job.fps, limits.max_frames)
    else:
        raise ValueError("neither num_frames nor fps")

    frames: list[np.ndarray] = []
    last_index = -1
    for index in indices:  # ascending: every packet is decoded at most once, and one full-size frame is held at a time
        if index != last_index:
            pixels = rgb(reader[int(index)].asnumpy())
            check(pixels.shape[1], pixels.shape[0])
            if axis is not None:
                pixels = np.flip(pixels, axis)
            frame = to_geometry(Image.fromarray(pixels), geometry, "video", len(indices))
        frames.append(frame)
        last_index = index
    spanned = float(starts[indices[-1]] - starts[indices[0]])
    return np.stack(frames), spanned / (len(frames) - 1) if spanned > 0 else None


def rgb(pixels: np.ndarray) -> np.ndarray:
    """A frame of decord's to (height, width, 3).

    FFmpeg pads rows to a multiple of 64 pixels, and decord takes a padded row for one with more channels wherever
    that divides evenly, at widths of 8, 12, 16, 24, 32, 48, 96 and 144. The picture is in the first 3 * width bytes.
    """
    height, width, num_channels = pixels.shape
    if num_channels < 3:
        raise ValueError("not RGB")
    return pixels.reshape(height, width * num_channels)[:, : 3 * width].reshape(height, width, 3)


def spread(total: int, count: int) -> np.ndarray:
    """`count` indices from 0 to `total - 1`, evenly spread, rounded to the nearest (halves up)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    steps, last = count - 1, total - 1
    return (2 * np.arange(count, dtype=np.int64) * last + steps) // (2 * steps)  # integers: no rounding surprises


def at_rate(starts: np.ndarray, seconds: float, fps: float, max_frames: int) -> np.ndarray:
    """Indices of the frames on screen at the times k / fps. starts: (frames,) seconds since the first, ascending;
    seconds: the end of the last."""
    tolerance = 1e-3  # seconds; decord keeps times in float32
    edges = np.append(starts, max(seconds, 2 * tolerance)) - tolerance  # frame i is on screen from i to i + 1
    samples = np.ceil(edges.clip(0.0) * min(fps, 1e9))  # before each edge; finite, whatever is asked for
    indices = np.flatnonzero(np.diff(samples))
    return indices if len(indices) <= max_frames else spread(len(starts), max_frames)


def warm_up(geometry: Geometry) -> None:
    """Decode a tiny animation in every way, so that all late imports of decord and numpy are done."""
    decord.logging.set_level(decord.logging.QUIET)
    file = io.BytesIO()
    pictures = [Image.new("RGB", (16, 16), (level, level, level)) for level in (0, 255)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    for num_frames, fps in ((2, None), (None, 1.0)):
        job = Job("video", "GIF", num_frames, fps)
        decode_video(file.getvalue(), job, limits=MediaLimits(), geometry=geometry)


def fail_once() -> None:
    """What decord imports only when a file is broken. It also prints, whatever it was told."""
    with contextlib.suppress(Exception):
        decord.VideoReader(io.BytesIO(b""), ctx=decord.cpu(0), num_threads=1)
