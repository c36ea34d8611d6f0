"""Convert a picture with an embedded ICC profile to sRGB, in which models were trained."""

from __future__ import annotations

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

GREY, RGB, CMYK = "GRAY", "RGB ", "CMYK"  # colour spaces as profiles name them
_MODES = {GREY: "L", RGB: "RGB", CMYK: "CMYK"}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an L, RGB or CMYK image to sRGB by its profile; may change `image`.

    Ignores a profile that is broken or belongs to another colour space; a grey picture may have an RGB profile.
    """
    space, transform = _transform(profile) if profile else ("", None)
    if transform is None or (space != RGB and _MODES[space] != image.mode) or (space == RGB and image.mode == CMYK):
        return _rgb(image)
    if space == RGB:
        image = _rgb(image)
        ImageCms.applyTransform(image, transform, inPlace=True)
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # noqa: S101 - None only in place
    return converted


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=4)  # a camera writes the same profile into each picture
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the profile's colour space and its transform to sRGB; None where that is impossible or not needed."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space not in _MODES:
            return space, None
        transform = ImageCms.buildTransform(source, _srgb(), _MODES[space], "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "", None
    return space, None if space == RGB and _is_identity(transform) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform changes no colour by more than rounding, as with most profiles named sRGB."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)  # 16 of each colour
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= ROUNDING)


ROUNDING = 2  # of 255: how much sRGB profiles of different vendors differ
