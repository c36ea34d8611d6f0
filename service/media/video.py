"""Decode one video file to its sampled frames. Runs in a decoding child; knows nothing of processes or HTTP."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from PIL import Image

from model.request import Geometry, VideoMetadata
from service.media.animation import Animation
from service.media.clip import Clip, Deadline
from service.media.container import check_complete
from service.media.image import flatten, turned
from service.media.limits import MediaLimits
from service.media.metadata import Picture, exif_orientation, split_video_metadata
from service.media.resize import FrameSize
from service.media.sampling import Choose, Sampler, Timeline
from service.media.sniff import Format
from service.media.wire import Job


def _unnamed_type(cls: type[Type], value: int) -> Type:
    """Return a type of side data that PyAV does not know, such as EXIF; by itself it would refuse to read any."""
    member: Any = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return cast("Type", member)


Type._missing_ = classmethod(_unnamed_type)  # type: ignore[assignment, method-assign]


@dataclass(frozen=True)
class Frames:
    """The sampled frames of a video, each (height, width, 3) uint8 RGB, and what is known of them: see Medium."""

    pixels: list[np.ndarray]
    seconds_per_frame: float | None
    frame_times: tuple[float, ...] | None
    source: VideoMetadata


def decode_video(
    data: bytes, job: Job, *, limits: MediaLimits, geometry: Geometry, choose: Choose | None = None
) -> Frames:
    """Decode a video to its sampled frames, all of one size. choose: asks the target which; None: it does not choose.

    Raises Refusal, and any exception of PyAV and Pillow on broken files.
    """
    check_complete(data, job.format, limits)
    deadline = Deadline(job.cpu_seconds)
    player = Animation if job.format in ("WEBP", "AVIF") else Clip
    file = split_video_metadata(data, job.format, limits)
    clip = player(file.data, job.format, limits, deadline)
    sampler, sizes = Sampler(job, limits, geometry, choose), FrameSize(limits, geometry)
    if all(clip.size):
        sizes.check(*clip.size)

    def sample(timeline: Timeline) -> list[int]:
        return sampler.sample(timeline, clip.rate, clip.size)

    def convert(picture: VideoFrame | Image.Image) -> np.ndarray:
        sizes.check(picture.width, picture.height)
        return sizes.resize(upright(picture, file, limits), len(sampler.indices))

    timeline, frames = clip.take(sample, convert)
    pixels = sizes.conform([frames[index] for index in sample(timeline)])
    return Frames(pixels, sampler.seconds_per_frame, sampler.times, sampler.source)


def upright(picture: VideoFrame | Image.Image, file: Picture, limits: MediaLimits) -> Image.Image:
    """Convert a frame to sRGB as players show it: transparency on white, rotated and mirrored as the file says."""
    if isinstance(picture, Image.Image):
        picture = picture.copy()  # the conversion may be in place
        rgb = flatten(picture, picture.info.get("icc_profile", b""), limits)
        return turned(rgb, exif_orientation(picture.info.get("exif", b"")))
    transparent = any(component.is_alpha for component in picture.format.components) or picture.format.name == "pal8"
    pixels = picture.to_ndarray(format="rgba" if transparent else "rgb24", threads=1)
    side_data: Mapping[str, Any] = picture.side_data
    if (matrix := side_data.get("DISPLAYMATRIX")) is not None:
        pixels = apply_display_matrix(pixels, np.frombuffer(matrix, dtype=np.int32))
    profile = file.profile or bytes(side_data.get("ICC_PROFILE", b""))
    return turned(flatten(Image.fromarray(pixels), profile, limits), file.orientation)


def apply_display_matrix(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate and mirror pixels (height, width, channels) by multiples of 90 degrees; ignore other angles.

    matrix: (9,) a b u c d v x y w, which maps (x, y) to (a x + c y, b x + d y).
    """
    a, b, _, c, d = (float(number) for number in matrix[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):  # x is mapped to y
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    axes = tuple(axis for axis, scale in ((1, a), (0, d)) if scale < 0)
    return np.ascontiguousarray(np.flip(pixels, axes))


def warm_up(geometry: Geometry) -> None:
    """Decode a tiny animation of every kind in every way, so that all lazy imports happen now."""
    av.logging.set_level(None)  # FFmpeg would print
    pictures = [Image.new("RGBA", (16, 16), (level, level, level, 255)) for level in (0, 255)]
    formats: tuple[Format, ...] = ("GIF", "PNG", "WEBP", "AVIF")
    for format in formats:
        file = io.BytesIO()
        pictures[0].save(file, format, save_all=True, append_images=pictures[1:], duration=100)
        for job in (Job("video", format, num_frames=2), Job("video", format, fps=1.0)):
            decode_video(file.getvalue(), job, limits=MediaLimits(), geometry=geometry)
    with contextlib.suppress(Exception):
        decode_video(b"", Job("video", "MP4", 1), limits=MediaLimits(), geometry=geometry)
