"""Files to send: images and videos of many sizes, drawn from a seed, so that every run sends the same ones."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

CODECS = {"mp4": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}
MIME = {"mp4": "video/mp4", "webm": "video/webm", "avi": "video/x-msvideo"}
EXACT = {"WEBP": {"lossless": True}}  # PNG, BMP and, up to 256 colours, GIF are so by nature


@dataclass(frozen=True, eq=False)
class File:
    kind: Literal["image", "video"]
    mime: str
    data: bytes

    def cut(self, share: float) -> File:
        """What is left where an upload or a disk ended early."""
        return File(self.kind, self.mime, self.data[: int(len(self.data) * share)])


def pixels(seed: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a plain ground with a few plain rectangles on it; few colours, and no two alike."""
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
    """An image that no compression makes small."""
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG", compress_level=0)
    return File("image", "image/png", file.getvalue())


def video(
    seed: int, width: int = 64, height: int = 48, format: str = "mp4", *, num_frames: int = 24, rate: int = 12
) -> File:
    """The picture of that seed, moving to the right."""
    codec, pixel_format = CODECS[format]
    picture = pixels(seed, width, height)
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for index in range(num_frames):
            moved = np.ascontiguousarray(np.roll(picture, index * width // num_frames, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return File("video", MIME[format], file.getvalue())
