"""Decode one video file to its sampled frames. Runs in a decoding child; knows nothing of processes or HTTP.

Sampling:

- `num_frames=n`: n frames spread evenly from the first to the last, both included (n = 1: the first). A clip with fewer
  frames repeats the nearest ones, so that there are always n.
- `fps=f`: the frames on screen at the times 0, 1/f, 2/f, ... within the clip, each at most once; a rate above the
  clip's own gives every frame. More than `max_frames` become `max_frames` spread evenly, so that the end of the clip is
  never cut off.
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
from service.media.container import check_complete
from service.media.image import WHITE
from service.media.limits import MediaLimits
from service.media.resize import check_size, resize_to_geometry
from service.media.sniff import Format
from service.media.wire import Job


def decode_video(data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry) -> tuple[np.ndarray, float | None]:
    """Decode to (frames, height, width, 3) uint8 RGB, and the mean seconds between frames (None for a single one).

    Raises Refusal, and any exception of PyAV and Pillow on broken files.
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
        return resize_to_geometry(upright(picture), geometry, "video", count)

    check_complete(data, job.format, limits)
    deadline = Deadline(job.cpu_seconds)
    clip = Animation(data, limits, deadline) if job.format == "WEBP" else Clip(data, job.format, limits, deadline)
    if all(clip.size):
        check(*clip.size)
    timeline, frames = clip.take(choose, convert)
    indices = choose(timeline)
    span = float(timeline.starts[indices[-1]] - timeline.starts[indices[0]])
    return np.stack([frames[index] for index in indices]), span / (count - 1) if span > 0 else None


def upright(picture: VideoFrame | Image.Image) -> Image.Image:
    """Convert a frame to RGB as players show it: transparency on white, rotated and mirrored as the file says."""
    if isinstance(picture, Image.Image):
        return on_white(picture.convert("RGBA")) if picture.has_transparency_data else picture.convert("RGB")
    transparent = any(component.is_alpha for component in picture.format.components) or picture.format.name == "pal8"
    pixels = picture.to_ndarray(format="rgba" if transparent else "rgb24", threads=1)
    side_data: Mapping[str, Any] = picture.side_data
    if (matrix := side_data.get("DISPLAYMATRIX")) is not None:
        pixels = apply_display_matrix(pixels, np.frombuffer(matrix, dtype=np.int32))
    image = Image.fromarray(pixels)
    return on_white(image) if transparent else image


def on_white(rgba: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", rgba.size, WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def apply_display_matrix(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate and mirror pixels (height, width, channels) by multiples of 90 degrees; ignore other angles.

    matrix: (9,) a b u c d v x y w, which maps (x, y) to (a x + c y, b x + d y).
    """
    a, b, _, c, d = (float(number) for number in matrix[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):  # x is mapped to y
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    axes = tuple(axis for axis, scale in ((1, a), (0, d)) if scale < 0)
    return np.ascontiguousarray(np.flip(pixels, axes))


def spread(total: int, count: int) -> np.ndarray:
    """Return `count` indices spread evenly from 0 to `total - 1`, rounded to the nearest (halves up)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    steps, last = count - 1, total - 1
    return (2 * np.arange(count, dtype=np.int64) * last + steps) // (2 * steps)  # integers: no rounding surprises


def at_rate(starts: np.ndarray, seconds: float, fps: float, max_frames: int) -> np.ndarray:
    """Return the indices of the frames on screen at the times k / fps, at most `max_frames`.

    starts: (frames,) seconds since the first, ascending; seconds: the end of the last.
    """
    tolerance = 1e-3  # seconds; Matroska rounds times to milliseconds
    edges = np.append(starts, max(seconds, 2 * tolerance)) - tolerance  # frame i is on screen from i to i + 1
    samples = np.ceil(edges.clip(0.0) * min(fps, 1e9))  # sample times before each edge; the bound keeps them finite
    indices = np.flatnonzero(np.diff(samples))
    return indices if len(indices) <= max_frames else spread(len(starts), max_frames)


def warm_up(geometry: Geometry) -> None:
    """Decode a tiny animation of every kind in every way, so that all lazy imports happen now."""
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
