"""What becomes of a sound image file: orientation, transparency, modes, first frames. Decoded in process."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from model.request import Geometry
from service.media.container import webp_size
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import sniff
from tests.media.samples import IMAGE_FORMATS, encoded, picture

AS_IS = Geometry(exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=4)


def decode(data: bytes, format) -> np.ndarray:
    return decode_image(data, format, limits=MediaLimits(), geometry=AS_IS)[0]


@pytest.mark.parametrize("size", [(40, 30), (41, 31), (8, 8), (9, 200)], ids=str)
@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_format_and_odd_sizes(format, size):
    image = picture(*size)
    frames = decode_image(encoded(image, format), format, limits=MediaLimits(), geometry=AS_IS)
    assert frames.shape == (1, size[1], size[0], 3)
    if format in ("PNG", "BMP"):
        np.testing.assert_array_equal(frames[0], np.asarray(image))
    else:
        assert np.abs(frames[0].astype(int) - np.asarray(image)).mean() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright(format, orientation):
    """A phone stores a portrait as a landscape and a note; the note is EXIF's orientation."""
    upright = Image.new("RGB", (16, 24), "white")
    upright.paste((200, 0, 0), (0, 0, 8, 12))  # red top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that stores it so
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    pixels = decode(encoded(stored, format, exif=exif.tobytes(), **options), format)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels[:10, :6].astype(int) - (200, 0, 0)).max() < 12
    assert pixels[14:, :].min() > 240
    assert pixels[:, 10:].min() > 240


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 8, 16))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        pixels = decode(encoded(image, format, **options), format)
        assert pixels[0, 15].tolist() == [255, 255, 255]
        assert pixels[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize(
    ("image", "format", "options", "expected"),
    [
        (Image.new("L", (16, 16), 90), "PNG", {}, [90, 90, 90]),
        (Image.new("1", (16, 16), 1), "PNG", {}, [255, 255, 255]),
        (Image.new("LA", (16, 16), (0, 0)), "PNG", {}, [255, 255, 255]),
        (Image.new("I;16", (16, 16), 0x5A00), "PNG", {}, [90, 90, 90]),
        (Image.new("RGB", (16, 16), (9, 8, 7)), "PNG", {"transparency": (9, 8, 7)}, [255, 255, 255]),
        (Image.new("L", (16, 16), 90), "JPEG", {}, [90, 90, 90]),
        (Image.new("CMYK", (16, 16), (255, 255, 255, 255)), "JPEG", {}, [0, 0, 0]),
        (Image.new("P", (16, 16), 0), "GIF", {"transparency": 0}, [255, 255, 255]),
        (Image.new("L", (16, 16), 90), "BMP", {}, [90, 90, 90]),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb(image, format, options, expected):
    pixels = decode(encoded(image, format, **options), format)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels[8, 8].astype(int) - expected).max() <= 1


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
        assert np.abs(decode(data, format)[0, 0].astype(int) - (255, 0, 0)).max() < 8


def test_size_is_checked_before_any_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in a child
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    file = io.BytesIO(b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHH", 40, 20_000, 20_000, 1, 24))
    file.seek(0, 2)
    file.write(bytes(24))
    with pytest.raises(Refusal, match="too_many_pixels"):
        decode(file.getvalue(), "BMP")


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}], ids=str)
def test_webp_size_is_read_from_its_header(options):
    """Pillow allocates the whole canvas on opening, so the size must be known before that."""
    for size in ((17, 300), (16_000, 1), (8, 8)):
        assert webp_size(encoded(Image.new("RGB", size), "WEBP", **options)) == size
    assert webp_size(b"RIFF\0\0\0\0WEBPVP8X") is None


def rare_files() -> dict[str, bytes]:
    """Sound files for which Pillow reaches for modules and codecs that common ones never need."""
    image, exif = picture(40, 30), Image.Exif()
    exif[0x0112] = 3
    exif[0x010E] = "description"
    exif.get_ifd(0x8825)[1] = "N"
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "caf\xe9")
    text.add_itxt("Comment", "\u65e5\u672c", "ja", "\u65e5", zip=True)
    text.add_text("Long", "x" * 500, zip=True)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>'
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    everything = {"exif": exif.tobytes(), "icc_profile": icc}
    return {
        "MPO as cameras write it": encoded(image, "MPO", save_all=True, append_images=[picture(40, 30, seed=1)]),
        "JPEG with metadata": encoded(image, "JPEG", **everything, xmp=xmp, comment=b"comment", dpi=(72, 72)),
        "progressive JPEG": encoded(image, "JPEG", progressive=True, subsampling=2),
        "CMYK JPEG": encoded(image.convert("CMYK"), "JPEG"),
        "PNG with metadata": encoded(image, "PNG", **everything, pnginfo=text),
        "PNG with a palette": encoded(image.quantize(7), "PNG", bits=4, transparency=bytes(range(7))),
        "grey PNG of 16 bits": encoded(Image.new("I;16", (40, 30), 1000), "PNG"),
        "animated PNG": encoded(image, "PNG", save_all=True, append_images=[picture(40, 30, seed=1)]),
        "WebP with metadata": encoded(image, "WEBP", **everything, xmp=xmp),
        "animated WebP": encoded(image, "WEBP", save_all=True, append_images=[picture(40, 30, seed=1)]),
        "GIF with a comment": encoded(image.quantize(200), "GIF", comment=b"\xff\xfe", interlace=True),
        "BMP with a palette": encoded(image.quantize(16), "BMP"),
        "BMP of one bit": encoded(image.convert("1"), "BMP"),
    }


@pytest.mark.anyio
@pytest.mark.parametrize("name", sorted(rare_files()))
async def test_a_child_needs_no_module_that_it_has_not_yet_imported(decoder, name):
    """It cannot open files, so a late import would fail, and a good picture would be called a broken one."""
    data = rare_files()[name]
    medium = await decoder.decode(data, kind="image", num_frames=None, fps=None)
    format = sniff(data)
    assert format is not None
    expected = decode_image(data, format, limits=decoder.limits, geometry=decoder.geometry)
    np.testing.assert_array_equal(medium.frames, expected)
