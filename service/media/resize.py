"""Resize and crop a decoded picture to the target's geometry, with the same pixels as transformers' PIL processors.

Same steps and rounding as theirs. Where the target takes pictures of any size, they keep their own; only the frames of
a video are scaled down where all of them together have too many pixels. Knows nothing of files.
"""

from __future__ import annotations

from math import ceil, sqrt

import numpy as np
from PIL import Image

from model.request import Geometry
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import Kind


def check_size(
    width: int, height: int, *, max_pixels: int, limits: MediaLimits, geometry: Geometry, kind: Kind = "image"
) -> None:
    """Raise Refusal for a picture whose size is not allowed; to be called before its pixels are decoded.

    The aspect ratio is limited as well: with a fixed shortest edge, here or in the target's processor, an 8x16384 strip
    would grow two-hundredfold.
    """
    if min(width, height) < limits.min_side:
        raise Refusal("too_small", width=width, height=height, min_side=limits.min_side)
    if width * height > max_pixels or max(width, height) > limits.max_side:
        raise Refusal("too_many_pixels", width=width, height=height, max_pixels=max_pixels, max_side=limits.max_side)
    if geometry.exact is not None:
        return
    if (area := geometry.area(kind)) is not None:
        max_ratio = area.MAX_RATIO
    elif geometry.shortest_edge is not None:
        max_ratio = max(1, limits.max_pixels // geometry.shortest_edge**2)
    else:
        max_ratio = geometry.max_ratio
    if max(width, height) > max_ratio * min(width, height):
        raise Refusal("too_narrow", width=width, height=height, max_ratio=max_ratio)


def resized(width: int, height: int, geometry: Geometry, kind: Kind = "image", num_frames: int = 1) -> tuple[int, int]:
    """Return (width, height) after the resize step, of an image or of one of `num_frames` frames of a video."""
    if geometry.exact is not None:
        return geometry.exact[1], geometry.exact[0]
    if (area := geometry.area(kind)) is not None:
        new_height, new_width = area.fitted(height, width, num_frames)
        return new_width, new_height
    if geometry.shortest_edge is None:
        return width, height
    short, long = min(width, height), max(width, height)
    new_long = int(geometry.shortest_edge * long / short)  # truncated as transformers does, not rounded
    return (geometry.shortest_edge, new_long) if width <= height else (new_long, geometry.shortest_edge)


def resize_to_geometry(image: Image.Image, geometry: Geometry, kind: Kind = "image", num_frames: int = 1) -> np.ndarray:
    """Resize and crop an RGB image, or one of `num_frames` frames of a video; return (height, width, 3) uint8."""
    size = resized(*image.size, geometry, kind, num_frames)
    if geometry.exact is not None or geometry.shortest_edge is not None or size != image.size:
        image = image.resize(size, resample=Image.Resampling(geometry.resample))
    pixels = np.asarray(image)
    return pixels if geometry.crop is None else _centre_crop(pixels, *geometry.crop)


class FrameSize:
    """Resizes the frames of one video to one size: what the geometry makes of the first frame that is converted."""

    def __init__(self, limits: MediaLimits, geometry: Geometry) -> None:
        self._limits, self._geometry = limits, geometry
        self._first: tuple[int, int] | None = None  # (width, height) of the first frame

    def check(self, width: int, height: int) -> None:
        """Raise Refusal for a frame whose size is not allowed; to be called before its pixels are decoded."""
        limits = self._limits
        check_size(
            width, height, max_pixels=limits.max_video_pixels, limits=limits, geometry=self._geometry, kind="video"
        )

    def resize(self, frame: Image.Image, num_frames: int) -> np.ndarray:
        """Resize an RGB frame, one of `num_frames`; return (height, width, 3) uint8.

        Where only the file bounds the size, all frames together have at most `max_clip_pixels`.
        """
        self._first = self._first or frame.size
        if frame.size != self._first:
            frame = frame.resize(self._first, Image.Resampling.BICUBIC)
        if self._geometry.depends_on_file:
            size = resized(*frame.size, self._geometry, "video", num_frames)
            if (fitted := within(*size, self._limits.max_clip_pixels // num_frames)) != size:
                return np.asarray(frame.resize(fitted, Image.Resampling(self._geometry.resample)))
        return resize_to_geometry(frame, self._geometry, "video", num_frames)

    def conform(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Return all frames at one size. They differ where the clip turned out, while it was decoded, to have more or
        fewer wanted frames than its packets announced."""
        size = min((frame.shape[:2] for frame in frames), key=lambda shape: shape[0] * shape[1])
        return [
            frame
            if frame.shape[:2] == size
            else np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling(self._geometry.resample)))
            for frame in frames
        ]


def within(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) scaled down to at most `max_pixels`, as little as needed; the aspect ratio stays about the
    same."""
    if width * height <= max_pixels:
        return width, height
    scale = sqrt(max_pixels / (width * height))
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    # A side of one pixel may have been rounded up.
    return min(new_width, max(1, max_pixels // new_height)), min(new_height, max(1, max_pixels // new_width))


def _centre_crop(pixels: np.ndarray, crop_height: int, crop_width: int) -> np.ndarray:
    """Crop pixels (height, width, 3) at their centre; pad with black where they are smaller than the crop."""
    height, width = pixels.shape[:2]
    top, left = (height - crop_height) // 2, (width - crop_width) // 2  # may be negative
    if top < 0 or left < 0:
        # Rounded up here and down above, as transformers does; otherwise odd differences shift by one pixel.
        padded_height, padded_width = max(crop_height, height), max(crop_width, width)
        top_pad, left_pad = ceil((padded_height - height) / 2), ceil((padded_width - width) / 2)
        padded = np.zeros((padded_height, padded_width, 3), dtype=pixels.dtype)
        padded[top_pad : top_pad + height, left_pad : left_pad + width] = pixels
        pixels, top, left = padded, max(0, top + top_pad), max(0, left + left_pad)
    return pixels[top : top + crop_height, left : left + crop_width]
