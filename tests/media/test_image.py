"""What becomes of a sound image file: orientation, transparency, modes, first frames. Decoded in process."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.request import Geometry
from service.media.container import webp_size
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import sniff
from tests.media.parts import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    SAMPLES,
    chunk,
    cmyk_profile,
    grey_profile,
    heic,
    png,
    segment,
    srgb_profile,
    swapped_profile,
    with_segments,
)
from tests.media.samples import IMAGE_FORMATS, encoded, picture

AS_IS = Geometry(default_num_frames=4, max_ratio=10_000)


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


# --- Transparency ---


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """colours: (..., 3), alpha: (...), both 0 to 255. Returns colours, not rounded."""
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def samples(depth: int, colour_type: int) -> np.ndarray:
    """(16, 24, channels): few levels, so that each colour comes often, and all bytes of deep ones matter."""
    rng = np.random.default_rng(depth)
    levels = rng.integers(0, 1 << depth, 3)
    levels[1] = levels[0] ^ 1  # differs in the lowest bit alone
    return rng.choice(levels, (16, 24, SAMPLES[colour_type]))


def eight_bit(values: np.ndarray, depth: int) -> np.ndarray:
    return values >> 8 if depth == 16 else values * (255 // ((1 << depth) - 1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_at_every_depth(depth):
    grey = samples(depth, GREY)
    for level in {int(grey[3, 3, 0]), int(grey.max()), 0}:
        seen = eight_bit(grey, depth)
        expected = np.where(grey == level, 255, seen).repeat(3, axis=2)
        data = png(grey, depth, GREY, chunk(b"tRNS", struct.pack(">H", level)))
        np.testing.assert_array_equal(decode(data, "PNG"), expected)
        ignored = chunk(b"tRNS", bytes([255 - 255 % (1 << min(8, depth)), 0])[:1])  # of one byte, where two belong
        np.testing.assert_array_equal(decode(png(grey, depth, GREY, ignored), "PNG"), seen.repeat(3, axis=2))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_at_every_depth(depth):
    """At 16 bits two colours may differ in what 8 bits do not show."""
    colours = samples(depth, RGB)
    for colour in (colours[3, 3], colours[3, 3] ^ 1, colours[3, 3] >> 8, np.zeros(3, int)):
        expected = np.where((colours == colour).all(axis=2, keepdims=True), 255, eight_bit(colours, depth))
        key = chunk(b"tRNS", struct.pack(">3H", *colour.tolist()))
        for interlaced in (False, True):
            data = png(colours, depth, RGB, key, interlaced=interlaced)
            np.testing.assert_array_equal(decode(data, "PNG"), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("opacity", [[0], [255, 0], [0, 128], [255, 255]], ids=str)
def test_transparent_entries_of_a_palette(depth, opacity):
    indices = np.random.default_rng(depth).integers(0, 2, (16, 24, 1))
    palette = np.random.default_rng(9).integers(0, 256, (1 << depth, 3))
    data = png(
        indices, depth, PALETTE, chunk(b"PLTE", palette.astype(np.uint8).tobytes()), chunk(b"tRNS", bytes(opacity))
    )
    alpha = np.array([*opacity, 255])[indices[..., 0]]
    assert np.abs(decode(data, "PNG") - on_white(palette[indices[..., 0]], alpha)).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY_ALPHA, RGB_ALPHA])
def test_alpha_at_every_depth(depth, colour_type):
    values = samples(depth, colour_type)
    seen = eight_bit(values, depth)
    colours = seen[..., :-1].repeat(3, axis=2) if colour_type == GREY_ALPHA else seen[..., :-1]
    assert np.abs(decode(png(values, depth, colour_type), "PNG") - on_white(colours, seen[..., -1])).max() <= 1


def test_a_bmp_that_is_transparent_everywhere_is_opaque():
    """Screenshots from a clipboard have a mask for it, and zeros under it; browsers look whether all are zero."""
    header = struct.pack("<IiiHHIIiiII", 124, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = b"BM" + struct.pack("<IHHI", 154, 0, 0, 138) + header + bytes(124 - len(header))
    red, clear = bytes((0, 0, 200, 0)), bytes((0, 0, 200, 255))
    assert (decode(header + red * 4, "BMP") == (200, 0, 0)).all()
    assert decode(header + (red + clear) * 2, "BMP")[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_sixteen_bits_of_grey_stay_as_many_levels_as_eight_have():
    ramp = (np.arange(256)[None].repeat(8, 0) * 257)[..., None]
    np.testing.assert_array_equal(decode(png(ramp, 16, GREY), "PNG"), (ramp >> 8).repeat(3, axis=2))


# --- Animations ---


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
@pytest.mark.parametrize("place", [(0, 0), (4, 6), (20, 2)], ids=str)
def test_a_first_frame_that_covers_a_part_lies_on_white(format, place):
    """Around it nothing has been drawn yet; and the file's own background colour is for nobody to see."""
    canvas, part = (40, 30), (12, 10)
    data = bytearray(
        encoded(Image.new("RGB", part, "blue"), "GIF")
        if format == "GIF"
        else encoded(
            Image.new("RGB", part, "blue"),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGB", part, "red")],
            lossless=True,
            background=(200, 0, 0, 255),
        )
    )
    if format == "GIF":
        struct.pack_into("<HH", data, 6, *canvas)
        struct.pack_into("<HH", data, data.index(b",\0\0\0\0") + 1, *place)
    else:
        data[24:30] = b"".join((side - 1).to_bytes(3, "little") for side in canvas)
        at = data.index(b"ANMF") + 8
        data[at : at + 6] = b"".join((side // 2).to_bytes(3, "little") for side in place)
    expected = Image.new("RGB", canvas, "white")
    expected.paste("blue", (*place, place[0] + part[0], place[1] + part[1]))
    np.testing.assert_array_equal(decode(bytes(data), format), np.asarray(expected))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_a_transparent_first_frame_lies_on_white(format):
    """Whatever later frames draw there."""
    first = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    first.paste((0, 0, 255, 255), (0, 0, 8, 16))
    second = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], duration=50, **options)
    pixels = decode(data, format)
    assert pixels[8, 2].tolist() == [0, 0, 255]
    assert pixels[8, 12].tolist() == [255, 255, 255]


def test_a_frame_beyond_its_canvas():
    """A GIF's canvas grows, as browsers have it; a WebP is broken."""
    gif = bytearray(encoded(Image.new("RGB", (12, 10), "blue"), "GIF"))
    struct.pack_into("<HH", gif, 6, 3, 3)
    assert decode(bytes(gif), "GIF").shape == (10, 12, 3)
    webp = bytearray(encoded(Image.new("RGB", (12, 10)), "WEBP", save_all=True, append_images=[picture(12, 10)]))
    webp[24:30] = b"\2\0\0" * 2
    with pytest.raises(ValueError, match="canvas"):
        decode(bytes(webp), "WEBP")


# --- Colour profiles ---


def test_colour_profiles_are_applied():
    """By lcms, as ImageCms does it; a profile that calls red green shows which way."""
    image = Image.new("RGB", (16, 16), (220, 20, 20))
    swapped = {
        "PNG": encoded(image, "PNG", icc_profile=swapped_profile()),
        "JPEG": encoded(image, "JPEG", icc_profile=swapped_profile(), quality=100, subsampling=0),
        "WEBP": encoded(image, "WEBP", icc_profile=swapped_profile(), lossless=True),
        "AVIF": encoded(image, "AVIF", icc_profile=swapped_profile(), quality=100, subsampling="4:4:4"),
        "HEIC": heic(Image.new("RGB", (64, 64), (220, 20, 20)), profile=swapped_profile()),
    }
    for format, data in swapped.items():
        assert sniff(data) == format
        assert np.abs(decode(data, format)[8, 8].astype(int) - (20, 220, 20)).max() <= 12, format


def test_a_large_profile_comes_in_several_segments_of_a_jpeg():
    profile = swapped_profile()
    parts = [profile[:100], profile[100:300], profile[300:]]
    segments = [segment(0xE2, b"ICC_PROFILE\0" + bytes([index + 1, 3]) + part) for index, part in enumerate(parts)]
    data = encoded(Image.new("RGB", (16, 16), (220, 20, 20)), "JPEG", quality=100, subsampling=0)
    expected = decode(
        encoded(Image.new("RGB", (16, 16), (220, 20, 20)), "JPEG", quality=100, subsampling=0, icc_profile=profile),
        "JPEG",
    )
    np.testing.assert_array_equal(decode(with_segments(data, segments[2], segments[0], segments[1]), "JPEG"), expected)
    np.testing.assert_array_equal(decode(with_segments(data, *segments[:2]), "JPEG"), decode(data, "JPEG"))


def test_profiles_of_grey_and_cmyk_pictures():
    grey = Image.linear_gradient("L").resize((64, 64))
    linear = decode(encoded(grey, "PNG", icc_profile=grey_profile(1.0)), "PNG")
    steep = decode(encoded(grey, "PNG", icc_profile=grey_profile(3.0)), "PNG")
    middle = decode(encoded(grey, "PNG"), "PNG")[32, 0, 0]
    assert steep[32, 0, 0] < middle - 10 < middle + 30 < linear[32, 0, 0]
    deep = png(
        np.asarray(grey, int)[..., None] * 257, 16, GREY, chunk(b"iCCP", b"a\0\0" + zlib.compress(grey_profile(1.0)))
    )
    np.testing.assert_array_equal(decode(deep, "PNG"), linear)
    with_alpha = encoded(
        Image.merge("LA", (grey, Image.new("L", grey.size, 255))), "PNG", icc_profile=grey_profile(1.0)
    )
    np.testing.assert_array_equal(decode(with_alpha, "PNG"), linear)
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain = decode(encoded(cyan, "JPEG", quality=100), "JPEG")[8, 8].astype(int)
    profiled = decode(encoded(cyan, "JPEG", quality=100, icc_profile=cmyk_profile()), "JPEG")[8, 8].astype(int)
    assert plain[0] < 10 < plain[1]
    assert profiled[0] > 200 > profiled[1], "what this profile calls cyan is red"
    mismatched = decode(encoded(cyan, "JPEG", quality=100, icc_profile=swapped_profile()), "JPEG")[8, 8]
    assert mismatched.tolist() == plain.tolist()


@pytest.mark.parametrize(
    "profile", [b"profile", srgb_profile()[:200], cmyk_profile(), grey_profile(1.0), bytes(5_000_000)], ids=len
)
def test_a_profile_of_no_use_is_passed_over(profile):
    """It is broken, too large or of another kind of picture."""
    image = picture(24, 16)
    np.testing.assert_array_equal(decode(encoded(image, "PNG", icc_profile=profile), "PNG"), np.asarray(image))


def test_profiles_of_srgb_change_nothing(monkeypatch):
    image = picture(24, 16)
    data = encoded(image, "PNG", icc_profile=srgb_profile())
    np.testing.assert_array_equal(decode(data, "PNG"), np.asarray(image))
    monkeypatch.setattr(ImageCms, "applyTransform", lambda *_, **__: pytest.fail("converted"))
    np.testing.assert_array_equal(decode(data, "PNG"), np.asarray(image))
    with pytest.raises(pytest.fail.Exception):
        decode(encoded(image, "PNG", icc_profile=swapped_profile()), "PNG")
