"""One image file to one frame. Runs in a decoding child; knows nothing of processes or HTTP."""

from __future__ import annotations

import io
from importlib import import_module

import numpy as np
from PIL import Image, ImageOps

from model.request import Geometry
from service.media.container import webp_size
from service.media.geometry import check_size, to_geometry
from service.media.limits import MediaLimits
from service.media.sniff import Format

WHITE = (255, 255, 255)


def decode_image(data: bytes, format: Format, *, limits: MediaLimits, geometry: Geometry) -> np.ndarray:
    """Returns (1, height, width, 3) uint8 RGB: upright (EXIF), first frame, transparency laid on white.

    Raises Refusal, and whatever Pillow raises on files that are broken.
    """

    def check(width: int, height: int) -> None:
        check_size(width, height, max_pixels=limits.max_pixels, limits=limits, geometry=geometry)

    if format == "WEBP" and (size := webp_size(data)) is not None:
        check(*size)  # Pillow allocates WebP's whole canvas in open() already
    with Image.open(io.BytesIO(data), formats=[format]) as image:  # reads the header only
        check(*image.size)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_geometry(to_rgb(image), geometry)[None]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, 16-bit grey scaled (Pillow alone would clip it to white)."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, WHITE)
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def warm_up(geometry: Geometry) -> None:
    """Decode one tiny picture of every format, so that all of Pillow's late imports are done.

    A child can open no file once it is ready; the plugins listed are those that only some files ask for.
    """
    for plugin in ("ImageColor", "ImagePalette", "MpoImagePlugin", "TiffImagePlugin"):
        import_module(f"PIL.{plugin}")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    formats: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    for format in formats:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, format, exif=exif.tobytes())
        decode_image(file.getvalue(), format, limits=MediaLimits(), geometry=geometry)
