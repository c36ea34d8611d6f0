"""JPEG, AVIF and HEIC: what each needs beside other formats; files that need rare modules. Decoded in process."""

from __future__ import annotations

import struct

import numpy as np
import pi_heif
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import sniff
from tests.media.parts import (
    RGB,
    chunk,
    cmyk_profile,
    grey_profile,
    heic,
    orientation,
    png,
    segment,
    swapped_profile,
    tiff,
    with_chunks,
    with_segments,
)
from tests.media.samples import IMAGE_FORMATS, encoded, picture
from tests.media.test_image import AS_IS, decode

# --- JPEG ---


def test_cmyk_and_ycck_with_the_marker_of_adobe():
    """Its last byte says how colours are stored; without it, RGB would be taken for YCbCr and YCCK for CMYK."""
    image = Image.new("CMYK", (16, 16), (0, 200, 100, 50))
    data = encoded(image, "JPEG", quality=100)
    expected = np.asarray(image.convert("RGB"))[8, 8].astype(int)
    assert np.abs(decode(data, "JPEG")[8, 8] - expected).max() <= 4
    assert data.count(b"Adobe") == 1
    as_ycck = data.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")
    assert as_ycck != data
    assert np.abs(decode(as_ycck, "JPEG")[8, 8] - expected).max() > 30
    for more in (segment(0xEE, b"Adobe"), segment(0xE0, b"JFIF"), segment(0xE1, b"Exif\0\0")):
        np.testing.assert_array_equal(decode(with_segments(as_ycck, more), "JPEG"), decode(as_ycck, "JPEG"))
    jfif = bytearray(encoded(Image.new("RGB", (16, 16), (200, 10, 50)), "JPEG", quality=100))
    for marker, step, first in ((b"\xff\xc0", 3, 10), (b"\xff\xda", 2, 5)):  # components called R, G and B
        for index, name in enumerate(b"RGB"):
            jfif[jfif.index(marker) + first + step * index] = name
    assert np.abs(decode(bytes(jfif), "JPEG")[8, 8] - np.array((200, 10, 50))).max() <= 4, "JFIF is YCbCr"
    rgb = encoded(Image.new("RGB", (16, 16), (200, 10, 50)), "JPEG", keep_rgb=True, quality=100)
    assert np.abs(decode(rgb, "JPEG")[8, 8] - np.array((200, 10, 50))).max() <= 4


def test_the_first_picture_of_several_is_taken():
    first, second = picture(40, 30), picture(40, 30, seed=1)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data, "JPEG"), decode(encoded(first, "JPEG"), "JPEG"))
    turned = first.transpose(Image.Transpose.ROTATE_90)
    data = encoded(turned, "MPO", save_all=True, append_images=[second], exif=b"Exif\0\0" + tiff(orientation(6)))
    assert decode(data, "JPEG").shape == (30, 40, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 95, "subsampling": 0},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"mode": "L"},
        {"mode": "CMYK"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(160, 160), (33, 200), (500, 48)], ids=str)
def test_a_jpeg_that_lacks_its_last_bytes_is_read(options, size):
    """As browsers do; what is there is as in the whole file, and what lacks is grey. A tenth may."""
    options = dict(options)
    data = encoded(picture(*size).convert(options.pop("mode", "RGB")), "JPEG", **options)
    whole = decode(data, "JPEG")
    np.testing.assert_array_equal(decode(data[:-1], "JPEG"), whole)
    np.testing.assert_array_equal(decode(data[:-2], "JPEG"), whole)
    length = len(data) - data.index(b"\xff\xda")
    partly = decode(data[: len(data) - length // 25], "JPEG")
    same = (partly == whole).all(axis=2)
    assert 0.85 < same.mean() < 1
    for share in (0.15, 0.5, 0.95):
        with pytest.raises(Refusal, match="image_truncated"):
            decode(data[: len(data) - int(share * length)], "JPEG")


def test_a_progressive_jpeg_must_reach_its_last_scan():
    data = encoded(picture(160, 160), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert decode(data[:-40], "JPEG").shape == (160, 160, 3)
    for end in (last + 20, last + (len(data) - last) // 2, last, last // 2):
        with pytest.raises(Refusal, match="image_truncated"):
            decode(data[:end], "JPEG")


@pytest.mark.parametrize("size", [(7000, 7000), (160, 1600), (1600, 160), (160, 200)], ids=str)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_whose_header_lies_about_its_size_is_refused(options, size):
    data = bytearray(encoded(picture(160, 160), "JPEG", **options))
    frame = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, size[1], size[0])
    with pytest.raises(Refusal, match="image_truncated"):
        decode(bytes(data), "JPEG")


def test_a_jpeg_of_too_few_bytes_for_its_pixels_is_not_even_opened(monkeypatch):
    """A block takes a bit at least: 783 bytes are no 49 million pixels, and shall not cost as much to decode."""
    data = bytearray(encoded(picture(64, 48), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 7000, 7000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(Refusal, match="image_truncated"):
        decode(bytes(data), "JPEG")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_grey_jpeg_is_no_truncated_one(mode, options):
    """Grey is also what lacks; and pictures of one colour take hardly a bit for each block."""
    for colour in ("gray", "white", "black"):
        image = Image.new("RGB", (1000, 800), colour).convert(mode)
        assert decode(encoded(image, "JPEG", optimize=True, **options), "JPEG").shape == (800, 1000, 3)


def test_how_much_a_jpeg_must_give_is_a_setting():
    data = encoded(picture(160, 160), "JPEG")
    half = data[: len(data) - (len(data) - data.index(b"\xff\xda")) // 2]
    assert decode_image(half, "JPEG", limits=MediaLimits(min_decoded=0.3), geometry=AS_IS).shape == (1, 160, 160, 3)


# --- AVIF and HEIC ---


AVIF_BRANDS = [
    *((b"avif", b"mif1"), (b"mif1", b"miaf", b"avif"), (b"avis", b"avif")),
    *((b"miaf", b"mif1", b"avif"), (b"MA1B", b"avif"), (b"mif2", b"avif"), (b"MiHB", b"miaf", b"avif")),
]


@pytest.mark.parametrize("brands", AVIF_BRANDS, ids=str)
def test_avif_is_read_by_any_of_its_brands(brands):
    data = bytearray(encoded(picture(40, 30), "AVIF", quality=100))
    assert int.from_bytes(data[:4], "big") == 32
    data[8 : 16 + 4 * len(brands[1:])] = brands[0] + bytes(4) + b"".join(brands[1:])
    assert sniff(bytes(data)) == "AVIF"
    if brands[0] != b"avis":  # which promises a sequence
        assert decode(bytes(data), "AVIF").shape == (30, 40, 3)


@pytest.mark.parametrize("value", range(1, 9))
def test_avif_is_turned_upright(value):
    """Pillow writes the tag as properties of the picture, and those count."""
    upright = Image.new("RGB", (16, 24), "white")
    upright.paste((200, 0, 0), (0, 0, 8, 12))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if value == 1 else upright.transpose(Image.Transpose(undo[value]))
    exif = Image.Exif()
    exif[0x0112] = value
    pixels = decode(encoded(stored, "AVIF", exif=exif.tobytes(), quality=100, subsampling="4:4:4"), "AVIF")
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 30


def test_avif_with_odd_exif_and_with_transparency():
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x010E] = "description"
    data = encoded(image, "AVIF", exif=exif.tobytes())
    plain = decode(encoded(image, "AVIF"), "AVIF")
    np.testing.assert_array_equal(decode(data, "AVIF"), plain)
    at = data.index(b"description")
    start = data.rindex(b"II*\0" if b"II*\0" in data else b"MM\0*", 0, at)
    for place, odd in ((start, b"\xff" * 4), (start + 4, b"\xff" * 4), (start + 8, b"\xff" * 8)):
        np.testing.assert_array_equal(decode(data[:place] + odd + data[place + len(odd) :], "AVIF"), plain)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert decode(encoded(clear, "AVIF", quality=100), "AVIF").min() > 250


@pytest.mark.parametrize(
    "brands",
    [(b"heic", b"mif1", b"heic"), (b"heix", b"heic"), (b"mif1", b"heic"), (b"mif1", b"miaf", b"heic")],
    ids=str,
)
def test_heic_is_read_by_any_of_its_brands(brands):
    image = picture(96, 64)
    data = heic(image, brands=brands)
    assert sniff(data) == "HEIC"
    assert np.abs(decode(data, "HEIC").astype(int) - np.asarray(image)).mean() < 20


def test_heic_is_turned_by_its_properties_once():
    """A phone writes both, and the tag of EXIF says what the property has done already."""
    image = picture(96, 64)
    as_stored = decode(heic(image), "HEIC")
    exif = struct.pack(">I", 6) + b"Exif\0\0" + tiff(orientation(6))
    for turns in (1, 2, 3):
        np.testing.assert_array_equal(decode(heic(image, turns=turns), "HEIC"), np.rot90(as_stored, turns))
        np.testing.assert_array_equal(decode(heic(image, turns=turns, exif=exif), "HEIC"), np.rot90(as_stored, turns))
    for axis in (0, 1):
        np.testing.assert_array_equal(decode(heic(image, mirror=axis), "HEIC"), np.flip(as_stored, axis))
    for odd in (exif, b"", b"garbage", struct.pack(">I", 1 << 30)):
        np.testing.assert_array_equal(decode(heic(image, exif=odd), "HEIC"), as_stored)


def test_heic_of_tiles():
    image = picture(192, 128)
    pixels = decode(heic(image, grid=(2, 3)), "HEIC")
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 20
    assert decode(heic(image, grid=(2, 3), says=(150, 100)), "HEIC").shape == (100, 150, 3)


def test_heic_is_bounded_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pi_heif.HeifImage, "load", lambda self: pytest.fail("decoded"))
    for says in ((8000, 8000), (16_385, 8)):
        with pytest.raises(Refusal, match="too_many_pixels"):
            decode(heic(picture(64, 64), says=says), "HEIC")
    monkeypatch.undo()
    for says in ((60, 60), (4000, 4000)):
        with pytest.raises((RuntimeError, ValueError)):
            decode(heic(picture(64, 64), says=says), "HEIC")


def test_sizes_of_one_pixel():
    for format in IMAGE_FORMATS + ("AVIF",):
        for size in ((1, 1), (1, 300), (300, 1), (2, 3)):
            assert decode(encoded(picture(*size), format), format).shape == (size[1], size[0], 3)


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
        "AVIF": encoded(image, "AVIF", **everything, xmp=xmp),
        "animated AVIF": encoded(image, "AVIF", save_all=True, append_images=[picture(40, 30, seed=1)]),
        "HEIC": heic(picture(64, 48), turns=1, exif=exif.tobytes(), profile=swapped_profile()),
        "HEIC of tiles": heic(picture(128, 64), grid=(1, 2)),
        "RGB with another profile": encoded(image, "PNG", icc_profile=swapped_profile()),
        "grey with a profile": encoded(image.convert("L"), "JPEG", icc_profile=grey_profile(1.8)),
        "CMYK with a profile": encoded(image.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
        "a broken profile": encoded(image, "PNG", icc_profile=b"profile"),
        "JPEG without its end": encoded(image, "JPEG")[:-2],
        "RGB of 16 bits with a transparent colour": with_chunks(
            png(np.full((30, 40, 3), 0x1234), 16, RGB), chunk(b"tRNS", b"\x12\x34" * 3)
        ),
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
