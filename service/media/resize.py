"""Resize and crop a decoded picture to the target's geometry, with the same pixels as transformers' PIL processors.

Same steps and rounding as theirs. Knows nothing of files.
"""

from __future__ import annotations

from math import ceil

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

    The aspect ratio is limited as well: with a fixed shortest edge, an 8x16384 strip would grow two-hundredfold.
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
        return
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
