"""Decode one picture file to one frame. Runs in a decoding child; knows nothing of processes or HTTP."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import reduce
from importlib import import_module

import numpy as np
import pi_heif
from PIL import AvifImagePlugin, Image, ImageChops, ImageCms

from model.request import Geometry
from service.media.colour import to_srgb
from service.media.container import webp_size
from service.media.limits import MediaLimits
from service.media.metadata import Picture, exif_orientation, split_metadata
from service.media.refusal import Refusal
from service.media.resize import check_size, resize_to_geometry
from service.media.sniff import Format

WHITE = (255, 255, 255)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Appended to a truncated JPEG to see where its data ends: no byte 255, which begins a marker, except restart markers.
NOISE = b"".join(
    np.random.default_rng(index).integers(0, 255, 512, dtype=np.uint8).tobytes() + b"\xff" + bytes([0xD0 + index])
    for index in range(8)
)

Check = Callable[[int, int], None]  # of width and height; raises Refusal


def decode_image(data: bytes, format: Format, *, limits: MediaLimits, geometry: Geometry) -> np.ndarray:
    """Decode to (1, height, width, 3) uint8 RGB: upright (EXIF), sRGB (ICC), first frame, transparency on white.

    Raises Refusal, and any exception of the decoders on broken files.
    """

    def check(width: int, height: int) -> None:
        check_size(width, height, max_pixels=limits.max_pixels, limits=limits, geometry=geometry)

    picture = split_metadata(data, format, limits)
    del data
    if picture.canvas is not None:
        check(*picture.canvas)
    decode = _decode_heic if format == "HEIC" else _decode_by_pillow
    rgb = decode(picture, format, check, limits)
    return resize_to_geometry(rgb, geometry)[None]


def _decode_by_pillow(picture: Picture, format: Format, check: Check, limits: MediaLimits) -> Image.Image:
    """Decode a picture of any format but HEIC; check its size before its pixels are allocated."""
    if format == "WEBP" and (size := webp_size(picture.data)) is not None:
        check(*size)  # Pillow allocates the whole canvas of a WebP in open()
    with Image.open(io.BytesIO(picture.data), formats=[format]) as image:  # reads the header only
        check(*image.size)
        opaque = _opaque(picture, image) if picture.transparent is not None else None
        image.load()
        if format == "JPEG":
            _check_decoded(picture, image, limits)
        profile, orientation = picture.profile, picture.orientation
        if format == "AVIF":  # stores them as properties of the picture, not as metadata
            profile, orientation = image.info.get("icc_profile", b""), exif_orientation(image.info.get("exif", b""))
        return _to_upright_rgb(image, opaque, profile, orientation, picture, limits)


def _decode_heic(picture: Picture, _: Format, check: Check, limits: MediaLimits) -> Image.Image:
    """Decode a HEIC by libheif; check its size before and after rotation."""
    file = pi_heif.open_heif(picture.data)  # reads boxes only
    still = file[file.primary_index]
    check(*still.size)
    pixels = still.data  # upright: libheif rotates while decoding
    check(*still.size)
    image = Image.frombytes(still.mode, still.size, pixels, "raw", still.mode, still.stride)
    return _to_upright_rgb(image, None, still.info.get("icc_profile", b""), 1, picture, limits)


def _to_upright_rgb(
    image: Image.Image,
    opaque: Image.Image | None,
    profile: bytes,
    orientation: int,
    picture: Picture,
    limits: MediaLimits,
) -> Image.Image:
    """Convert decoded pixels of any mode to upright sRGB on white, the whole canvas. opaque: as in `flatten`."""
    rgb = flatten(image, profile, limits, opaque)
    if picture.canvas is not None and picture.canvas != rgb.size:
        x, y = picture.offset
        if x + rgb.width > picture.canvas[0] or y + rgb.height > picture.canvas[1]:
            raise ValueError("a frame reaches beyond its canvas")
        whole = Image.new("RGB", picture.canvas, WHITE)
        whole.paste(rgb, picture.offset)
        rgb = whole
    return turned(rgb, orientation)


def flatten(image: Image.Image, profile: bytes, limits: MediaLimits, opaque: Image.Image | None = None) -> Image.Image:
    """Convert decoded pixels of any mode to sRGB on white. opaque: mode L, 0 where transparent, beside any alpha."""
    colours, alpha = _split_alpha(image)
    rgb = to_srgb(colours, profile if len(profile) <= limits.max_profile_bytes else b"")
    if (opaque := opaque or alpha) is not None and opaque.getextrema() != (255, 255):
        rgb.paste(WHITE, mask=ImageChops.invert(opaque))
    return rgb


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a picture upright. orientation: EXIF's."""
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return colours as L, RGB or CMYK, and alpha as L, or None where all is opaque."""
    if image.mode.startswith("I;16"):  # Pillow's conversion would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)), None
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB"), None  # clipboards write an alpha of 0, which browsers ignore
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _opaque(picture: Picture, image: Image.Image) -> Image.Image:
    """Return a mask (L) of a PNG's tRNS colour, compared at full depth: 0 where transparent, else 255.

    image: not yet loaded. Pillow itself compares samples after reducing them to 8 bits.
    """
    colour = picture.transparent or ()
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) != colour[0]).astype(np.uint8) * 255)
    bands = list(image.convert("L").split() if image.mode == "1" else image.copy().split())
    if image.mode == "RGB" and picture.depth == 16:  # read the low bytes too, as if they were the high ones
        with Image.open(io.BytesIO(picture.data), formats=["PNG"]) as lower:
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
            bands += lower.split()
        colour = (*(value >> 8 for value in colour), *(value & 255 for value in colour))
    differs = (
        band.point([255 * (value != level) for level in range(256)]) for band, value in zip(bands, colour, strict=True)
    )
    return reduce(ImageChops.lighter, differs)


def _check_decoded(picture: Picture, image: Image.Image, limits: MediaLimits) -> None:
    """Raise Refusal for a JPEG whose data ends long before its pixels. image: the decoded picture.

    Where the data ends, libjpeg silently fills the rest with grey. So a file without end marker, or with grey in its
    last corner, is decoded again with noise appended: the first pixel that differs shows where the data ends.
    """
    width, height = image.size
    corner = image.crop((max(0, width - 8), max(0, height - 8), width, height))
    if picture.complete and any(low < 127 or high > 128 for low, high in _extrema(corner)):
        return
    with Image.open(io.BytesIO(picture.data[:-2] + NOISE + picture.data[-2:]), formats=["JPEG"]) as other:
        difference = ImageChops.difference(image, other)
    if (box := difference.getbbox()) is None:
        return
    # Chroma upsampling spreads a difference by a pixel; data ends at a coded unit.
    unit_width, unit_height = picture.unit
    top = (box[1] + 1) // unit_height * unit_height
    box = difference.crop((0, top, width, min(height, top + unit_height))).getbbox() or box
    left = (box[0] + 1) // unit_width * unit_width
    if top * width + unit_height * left < limits.min_decoded * width * height:
        raise Refusal("image_truncated", percent=round(100 * limits.min_decoded))


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Return (minimum, maximum) of every band."""
    return [band.getextrema() for band in image.split()]  # type: ignore[misc]  # of 8-bit bands, pairs of integers


def warm_up(geometry: Geometry) -> None:
    """Decode one tiny picture of every format, so that all of Pillow's lazy imports happen now.

    A child can open no file once it is ready. The plugins listed are those that only some files need.
    """
    for plugin in ("ImageColor", "ImagePalette", "MpoImagePlugin", "TiffImagePlugin"):
        import_module(f"PIL.{plugin}")
    # One thread each: a child's address space is limited.
    AvifImagePlugin.DEFAULT_MAX_THREADS = pi_heif.options.DECODE_THREADS = 1
    pi_heif.options.THUMBNAILS = pi_heif.options.DEPTH_IMAGES = pi_heif.options.AUX_IMAGES = False
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    formats: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
    for format in formats:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, format, exif=exif.tobytes(), icc_profile=profile)
        decode_image(file.getvalue(), format, limits=MediaLimits(), geometry=geometry)
