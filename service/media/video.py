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
from collections.abc import Mapping
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from model.request import Geometry
from service.media.animation import Animation
from service.media.clip import Clip, Deadline, Timeline
from service.media.container import check_whole
from service.media.geometry import check_size, to_geometry
from service.media.image import WHITE
from service.media.limits import MediaLimits
from service.media.sniff import Format
from service.media.wire import Job


def decode_video(data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry) -> tuple[np.ndarray, float | None]:
    """Returns (frames, height, width, 3) uint8 RGB, and the seconds from one of them to the next, on average; None
    where the clip has only one.

    Raises Refusal, and whatever PyAV and Pillow raise on files that are broken.
    """
    count = 0

    def check(width: int, height: int) -> None:
        check_size(width, height, max_pixels=limits.max_video_pixels, limits=limits, geometry=geometry, kind="video")

    def choose(timeline: Timeline) -> list[int]:
        nonlocal count
        if job.num_frames is not None:
            indices = spread(len(timeline.starts), job.num_frames)
        elif job.fps is not None:
            indices = at_rate(timeline.starts, timeline.end, job.fps, limits.max_frames)
        else:
            raise ValueError("neither num_frames nor fps")
        count = len(indices)
        return [int(index) for index in indices]

    def convert(picture: VideoFrame | Image.Image) -> np.ndarray:
        check(picture.width, picture.height)
        return to_geometry(upright(picture), geometry, "video", count)

    check_whole(data, job.format, limits)
    deadline = Deadline(job.cpu_seconds)
    clip = Animation(data, limits, deadline) if job.format == "WEBP" else Clip(data, job.format, limits, deadline)
    if all(clip.size):
        check(*clip.size)
    timeline, taken = clip.take(choose, convert)
    indices = choose(timeline)
    spanned = float(timeline.starts[indices[-1]] - timeline.starts[indices[0]])
    return np.stack([taken[index] for index in indices]), spanned / (count - 1) if spanned > 0 else None


def upright(picture: VideoFrame | Image.Image) -> Image.Image:
    """RGB as it is shown: transparency on white, turned and mirrored as the file says."""
    if isinstance(picture, Image.Image):
        return on_white(picture.convert("RGBA")) if picture.has_transparency_data else picture.convert("RGB")
    transparent = any(component.is_alpha for component in picture.format.components) or picture.format.name == "pal8"
    pixels = picture.to_ndarray(format="rgba" if transparent else "rgb24", threads=1)
    side_data: Mapping[str, Any] = picture.side_data
    if (matrix := side_data.get("DISPLAYMATRIX")) is not None:
        pixels = turned(pixels, np.frombuffer(matrix, dtype=np.int32))
    image = Image.fromarray(pixels)
    return on_white(image) if transparent else image


def on_white(rgba: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", rgba.size, WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def turned(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """pixels: (height, width, channels). matrix: (9,) a b u c d v x y w, which shows (x, y) at (a x + c y, b x + d y).

    Turns by other angles than right ones are left out.
    """
    a, b, _, c, d = (float(number) for number in matrix[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):  # x is shown along y
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    axes = tuple(axis for axis, scale in ((1, a), (0, d)) if scale < 0)
    return np.ascontiguousarray(np.flip(pixels, axes))


def spread(total: int, count: int) -> np.ndarray:
    """`count` indices from 0 to `total - 1`, evenly spread, rounded to the nearest (halves up)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    steps, last = count - 1, total - 1
    return (2 * np.arange(count, dtype=np.int64) * last + steps) // (2 * steps)  # integers: no rounding surprises


def at_rate(starts: np.ndarray, seconds: float, fps: float, max_frames: int) -> np.ndarray:
    """Indices of the frames on screen at the times k / fps. starts: (frames,) seconds since the first, ascending;
    seconds: the end of the last."""
    tolerance = 1e-3  # seconds; Matroska rounds times to milliseconds
    edges = np.append(starts, max(seconds, 2 * tolerance)) - tolerance  # frame i is on screen from i to i + 1
    samples = np.ceil(edges.clip(0.0) * min(fps, 1e9))  # before each edge; finite, whatever is asked for
    indices = np.flatnonzero(np.diff(samples))
    return indices if len(indices) <= max_frames else spread(len(starts), max_frames)


def warm_up(geometry: Geometry) -> None:
    """Decode a tiny animation of every kind in every way, so that all late imports are done."""
    av.logging.set_level(None)  # FFmpeg would print
    pictures = [Image.new("RGBA", (16, 16), (level, level, level, 255)) for level in (0, 255)]
    formats: tuple[Format, ...] = ("GIF", "PNG", "WEBP")
    for format in formats:
        file = io.BytesIO()
        pictures[0].save(file, format, save_all=True, append_images=pictures[1:], duration=100)
        for num_frames, fps in ((2, None), (None, 1.0)):
            job = Job("video", format, num_frames, fps)
            decode_video(file.getvalue(), job, limits=MediaLimits(), geometry=geometry)
    with contextlib.suppress(Exception):
        decode_video(b"", Job("video", "MP4", 1), limits=MediaLimits(), geometry=geometry)
