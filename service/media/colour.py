"""Colours of a picture with an embedded ICC profile, brought to sRGB, in which models were trained."""

from __future__ import annotations

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

GREY, RGB, CMYK = "GRAY", "RGB ", "CMYK"  # colour spaces as profiles name them
_MODES = {GREY: "L", RGB: "RGB", CMYK: "CMYK"}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """image: L, RGB or CMYK. Returns RGB; may change `image`.

    A profile that cannot be read, or that is of another kind of picture, is passed over. A grey picture may have a
    profile of RGB.
    """
    space, transform = _transform(profile) if profile else ("", None)
    if transform is None or (space != RGB and _MODES[space] != image.mode) or (space == RGB and image.mode == CMYK):
        return _rgb(image)
    if space == RGB:
        image = _rgb(image)
        ImageCms.applyTransform(image, transform, inPlace=True)
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # noqa: S101 - it is, unless in place
    return converted


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=4)  # cameras write the same one into each picture
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The profile's colour space, and how to come from it to sRGB: None where nothing can or needs to be done."""
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
    """Whether colours stay what they are, but for rounding: so with the many profiles that are called sRGB."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)  # 16 of each colour
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= ROUNDING)


ROUNDING = 2  # of 255: what sRGB profiles of other makers differ by
