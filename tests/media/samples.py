"""Media made on the spot by Pillow and PyAV, small and seeded; nothing binary is kept in the repository."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from model.request import Geometry

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
VIDEO_FORMATS = ("mp4", "webm", "avi")
CODECS = {"mp4": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}

SQUARE = Geometry(exact=None, shortest_edge=32, crop=(32, 32), resample=3, default_num_frames=4)


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Noise with some structure, so that filters and rounding show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    fine = rng.integers(0, 64, (height, width, 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((4, 4, 1), dtype=np.uint8))[:height, :width] // 2 + fine
    return Image.fromarray(pixels.astype(np.uint8))


def image_bytes(format: str, size: tuple[int, int] = (40, 30), *, seed: int = 0) -> bytes:
    return encoded(picture(*size, seed=seed), format)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def video_bytes(
    format: str,
    size: tuple[int, int] = (48, 32),
    *,
    num_frames: int = 12,
    rate: int = 10,
    times: Sequence[int] | None = None,
    noise: bool = False,
) -> bytes:
    """Frame i is a plain grey of level 20 * i (modulo 240), or seeded noise; it is shown after i / rate seconds, or
    after times[i] milliseconds."""
    codec, pixel_format = CODECS[format]
    if size[0] % 2 or size[1] % 2:
        pixel_format = {"yuv420p": "yuv444p", "yuvj420p": "yuvj444p"}[pixel_format]
    width, height = size
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate if times is None else 1000)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for index in range(num_frames if times is None else len(times)):
            pixels = np.full((height, width, 3), level(index), dtype=np.uint8)
            if noise:
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def shown_by(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 whose pixel at (x, y) is to be shown at (a x + c y, b x + d y), from -1 to 1."""
    at = data.index(b"tkhd") + 4 + 40
    unit = 1 << 16
    return data[:at] + struct.pack(">5i", a * unit, b * unit, 0, c * unit, d * unit) + data[at + 20 :]


def endless_gif(num_frames: int, side: int = 1000) -> bytes:
    """A few hundred bytes a frame to send, milliseconds of work a frame to decode; 10 frames a second."""
    data = encoded(Image.new("P", (side, side), 1), "GIF")
    first = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)  # after the header and the colour table
    delay = b"\x21\xf9\x04\x00\x0a\x00\x00\x00"  # a tenth of a second
    return data[:first] + (delay + data[first:-1]) * num_frames + data[-1:]


def level(index: int) -> int:
    return 20 * index % 240


def levels(frames: np.ndarray) -> list[int]:
    """Which frames of `video_bytes` these are, told by their grey: (frames, height, width, 3) to indices below 12."""
    return [round(float(frame.mean()) / 20) for frame in frames]


def audio_only_mp4() -> bytes:
    """A sound container of the same type as a video: a video without frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        for start in range(0, 4096, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flip_bits(data: bytes, num_bits: int, rng: random.Random, *, start: int = 0) -> bytes:
    mutated = bytearray(data)
    for _ in range(num_bits):
        mutated[rng.randrange(start, len(mutated))] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files go bad, or are made bad."""
    way = rng.randrange(6)
    if way == 0:
        return data[: rng.randrange(len(data))]
    if way == 1:
        return flip_bits(data, rng.randrange(1, 40), rng)
    if way == 2:
        return flip_bits(data, rng.randrange(1, 8), rng, start=min(12, len(data) - 1))  # the magic survives
    start, length = rng.randrange(len(data)), rng.randrange(1, 64)
    if way == 3:
        return data[:start] + rng.randbytes(length) + data[start + length :]
    if way == 4:
        return data[:start] + data[start + length :]
    return data[:start] + b"\xff" * 4 + data[start + 4 :]  # huge sizes and counts
