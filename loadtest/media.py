"""Make images and videos of many sizes from a seed, so that every run sends the same files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

from model.demo import scenes

CODECS = {"mp4": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}
MIME = {"mp4": "video/mp4", "webm": "video/webm", "avi": "video/x-msvideo"}
SIDE = 192  # of drawn scenes: what the bundled model was trained on
EXACT = {"WEBP": {"lossless": True}}  # PNG, BMP and, up to 256 colours, GIF are so by nature


@dataclass(frozen=True, eq=False)
class File:
    kind: Literal["image", "video"]
    mime: str
    data: bytes

    def cut(self, share: float) -> File:
        """Return the first part of the file, as after an upload that ended early."""
        return File(self.kind, self.mime, self.data[: int(len(self.data) * share)])


def pixels(seed: int, width: int, height: int) -> np.ndarray:
    """Draw a few rectangles on a plain background; another seed draws another picture. (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = rng.integers(0, 256, 3)
    for _ in range(4):
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        picture[top : top + height // 2, left : left + width // 2] = rng.integers(0, 256, 3)
    return picture


def image(seed: int, width: int = 64, height: int = 48, format: str = "PNG") -> File:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(file, format, **EXACT.get(format, {}))
    return File("image", f"image/{format.lower()}", file.getvalue())


def noise(seed: int, width: int, height: int) -> File:
    """Make an image that does not compress."""
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG", compress_level=0)
    return File("image", "image/png", file.getvalue())


def video(
    seed: int, width: int = 64, height: int = 48, format: str = "mp4", *, num_frames: int = 24, rate: int = 12
) -> File:
    """Make a video of the seed's picture moving to the right."""
    picture = pixels(seed, width, height)
    moved = [np.roll(picture, index * width // num_frames, axis=1) for index in range(num_frames)]
    return film(moved, format, rate=rate)


def film(frames: Iterable[np.ndarray], format: str = "mp4", *, rate: int = 12) -> File:
    """Encode frames of (height, width, 3) uint8 as a video file."""
    codec, pixel_format = CODECS[format]
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.height, stream.width, _ = frame.shape
                stream.pix_fmt = pixel_format
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return File("video", MIME[format], file.getvalue())


def scene_image(scene: scenes.Scene, side: int = SIDE) -> File:
    """Draw a scene as the bundled model knows them, as a PNG."""
    file = io.BytesIO()
    Image.fromarray(scenes.render(scene, side)).save(file, "PNG", compress_level=1)
    return File("image", "image/png", file.getvalue())
