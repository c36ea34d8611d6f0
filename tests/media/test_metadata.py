"""Metadata decides how a picture is turned and what its colours mean, and nothing else; and parts are bounded."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from model.request import Geometry
from service.media.container import webp_size
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.metadata import exif_orientation, split_metadata
from service.media.refusal import Refusal
from service.media.sniff import sniff
from tests.media.parts import (
    GREY,
    chunk,
    heic,
    orientation,
    png,
    segment,
    srgb_profile,
    tiff,
    with_chunks,
    with_segments,
)
from tests.media.samples import encoded, picture

AS_IS = Geometry(default_num_frames=4, max_ratio=10_000)
IMAGE = picture(24, 16)
JPEG, PNG = encoded(IMAGE, "JPEG"), encoded(IMAGE, "PNG")
WEBP = encoded(IMAGE, "WEBP", lossless=True)
UNDO = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that stores it so


def decode(data: bytes, **limits) -> np.ndarray:
    format = sniff(data)
    assert format is not None
    return decode_image(data, format, limits=MediaLimits(**limits), geometry=AS_IS)[0]


def webp_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A simple WebP file as an extended one, with more chunks behind the picture."""
    sides = b"".join((side - 1).to_bytes(3, "little") for side in webp_size(data) or ())
    parts = [(b"VP8X", bytes([0b1100, 0, 0, 0]) + sides), (data[12:16], data[20:]), *chunks]
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for name, content in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


ODD = {
    "resolution as text": tiff(orientation(1), (282, 2, 2, b"72\0\0")),
    "unit of four bytes": tiff(orientation(1), (296, 1, 4, b"\0\0\0\2")),
    "an offset beyond the end": tiff((271, 2, 500, b"\x7f\xff\xff\xff"), orientation(1)),
    "a directory of itself": tiff(orientation(1), (0x8769, 4, 1, struct.pack(">I", 8))),
    "an unknown type": tiff((270, 99, 7, bytes(4)), orientation(1)),
    "not TIFF": b"garbage",
    "cut short": tiff(orientation(1))[:13],
    "empty": b"",
    "more entries than bytes": b"MM" + struct.pack(">HIH", 42, 8, 60_000),
    "a directory at the end of the world": b"II" + struct.pack("<HI", 42, 0xFFFFFFF0),
}


@pytest.mark.parametrize("exif", ODD.values(), ids=list(ODD))
def test_odd_exif_does_no_harm(exif):
    for plain, data in (
        (JPEG, with_segments(JPEG, segment(0xE1, b"Exif\0\0" + exif))),
        (PNG, with_chunks(PNG, chunk(b"eXIf", exif))),
        (WEBP, webp_chunks(WEBP, (b"EXIF", exif))),
        (WEBP, webp_chunks(WEBP, (b"EXIF", b"Exif\0\0" + exif))),
    ):
        np.testing.assert_array_equal(decode(data), decode(plain))


ANCILLARY = {
    "text of 1.5 MB, compressed": chunk(b"zTXt", b"mxfile\0\0" + zlib.compress(b"x" * 1_500_000)),
    "international text of 1.5 MB": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 1_500_000)),
    "80 MB of text in all": chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_000_000)) * 80,
    "a profile of 5 MB": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(5_000_000))),
    "a profile that is none": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"profile")),
    "a profile of an unknown method": chunk(b"iCCP", b"a\0\7" + zlib.compress(srgb_profile())),
    "a profile that is no zlib": chunk(b"iCCP", b"a\0\0profile"),
    "a profile that is cut short": chunk(b"iCCP", b"a\0\0" + zlib.compress(srgb_profile())[:99]),
    "a profile without a name's end": chunk(b"iCCP", b"profile"),
    "short gAMA": chunk(b"gAMA", b"abc"),
    "short pHYs": chunk(b"pHYs", b"abc"),
    "short cHRM": chunk(b"cHRM", b"abc"),
    "empty sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"abc"),
    "acTL of no frames": chunk(b"acTL", bytes(8)),
    "fcTL beyond the picture": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\xff" * 26),
    "empty text": chunk(b"tEXt", b"") + chunk(b"zTXt", b"") + chunk(b"iTXt", b""),
    "two palettes of no use": chunk(b"PLTE", b"ab") * 2,
    "transparency of a wrong length": chunk(b"tRNS", b"abc"),
    "a wrong checksum of text": chunk(b"tEXt", b"a\0b", sound=False),
    "a wrong checksum of orientation": chunk(b"eXIf", tiff(orientation(6)), sound=False),
    "a wrong checksum of transparency": chunk(b"tRNS", bytes(6), sound=False),
    "chunks of nobody": chunk(b"abCd", b"") + chunk(b"zzZz", bytes(70_000)),
}


@pytest.mark.parametrize("chunks", ANCILLARY.values(), ids=list(ANCILLARY))
def test_odd_chunks_of_a_png_do_no_harm(chunks):
    np.testing.assert_array_equal(decode(with_chunks(PNG, chunks)), np.asarray(IMAGE))
    if not chunks.startswith(chunk(b"PLTE", b"ab")):
        end = len(PNG) - 12
        np.testing.assert_array_equal(decode(PNG[:end] + chunks + PNG[end:]), np.asarray(IMAGE))


SEGMENTS = {
    "short JFIF": segment(0xE0, b"JFIF"),
    "JFIF and no more": segment(0xE0, b"JFIF\0\1"),
    "empty APP0": segment(0xE0, b""),
    "an empty profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a profile without its number of parts": segment(0xE2, b"ICC_PROFILE\0\1"),
    "a profile of which parts lack": segment(0xE2, b"ICC_PROFILE\0\1\3abc"),
    "a profile that is none": segment(0xE2, b"ICC_PROFILE\0\1\1abc"),
    "short Adobe": segment(0xEE, b"Adobe\0\x64"),
    "empty APP14": segment(0xEE, b""),
    "broken list of pictures": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "Photoshop cut short": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\2ab"),
    "flashpix": segment(0xE2, b"FPXR\0"),
    "comments": segment(0xFE, b"") + segment(0xFE, b"\xff\xff\xd8"),
    "XMP that is none": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
    "EXIF twice": segment(0xE1, b"Exif\0\0" + tiff(orientation(1))) + segment(0xE1, b"Exif\0\0MM"),
    "reserved markers": segment(0xF3, b"abc") + segment(0x42, b"abc"),
    "a length of nothing": b"\xff\xe5\0\0",
    "fill bytes": b"\xff" * 999,
    "junk between segments": segment(0xE0, b"") + b"junk\xff\0junk",
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=list(SEGMENTS))
def test_odd_segments_of_a_jpeg_do_no_harm(segments):
    np.testing.assert_array_equal(decode(with_segments(JPEG, segments)), decode(JPEG))


def test_a_spoilt_byte_within_a_scan_costs_no_more_than_up_to_the_next_restart():
    """It may look like a marker that there is not: to skip a segment there would lose what a decoder can give."""
    image = picture(160, 160)
    data = encoded(image, "JPEG", restart_marker_rows=1)
    whole = decode(data)
    start = data.index(b"\xff\xd2") + 8
    for spoilt in (b"\xff\x42", b"\xff\xbe", b"\xff\xff\xff\x02"):
        pixels = decode(data[:start] + spoilt + data[start + len(spoilt) :])
        assert (pixels == whole).all(axis=2).mean() > 0.8
    rows = (pixels == whole).all(axis=(1, 2))
    assert rows[:47].all()
    assert rows[-80:].all()


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_counts_whatever_is_beside_it(value):
    """Its siblings are odd, its byte order is either, and the file is of any kind that carries EXIF."""
    stored = IMAGE if value == 1 else IMAGE.transpose(Image.Transpose(UNDO[value]))
    for order, more in ((">", (282, 2, 2, b"72\0\0")), ("<", (270, 99, 7, bytes(4))), ("<", (271, 2, 9, b"\xff" * 4))):
        exif = tiff(more, orientation(value, order), order=order)
        assert exif_orientation(exif) == value
        for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
            pixels = decode(encoded(stored, format, exif=b"Exif\0\0" + exif, **options))
            np.testing.assert_array_equal(pixels, np.asarray(IMAGE))
        jpeg = with_segments(encoded(stored, "JPEG", quality=100, subsampling=0), segment(0xE1, b"Exif\0\0" + exif))
        assert np.abs(decode(jpeg).astype(int) - np.asarray(IMAGE)).max() < 12


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_there_is_not_is_none(value):
    assert exif_orientation(tiff(orientation(value))) == 1


def random_exif(rng: random.Random, value: int) -> bytes:
    """A directory that turns the picture, between tags of random numbers, types, counts and values."""
    order = rng.choice("<>")
    entries = [
        (
            rng.choice((rng.randrange(65536), 282, 296, 0x8769, 0x8825)),
            rng.randrange(14),
            rng.choice((0, 1, 2, 1 << 31)),
            rng.randbytes(4),
        )
        for _ in range(rng.randrange(6))
    ]
    entries = [entry for entry in entries if entry[0] != 0x0112]
    entries.insert(rng.randint(0, len(entries)), orientation(value, order))
    return tiff(*entries, order=order) + rng.randbytes(rng.randrange(20))


def random_chunks(rng: random.Random) -> bytes:
    """Chunks with known and random names and random content, some compressed, some of wrong checksum."""
    names: tuple[bytes, ...] = (
        b"gAMA",
        b"pHYs",
        b"cHRM",
        b"sRGB",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"iCCP",
        b"zTXt",
        b"iTXt",
        b"tEXt",
        b"tIME",
    )
    names += (b"sBIT", b"bKGD", b"hIST", b"cICP", b"caBX", b"PLTE")
    chunks = []
    for _ in range(rng.randrange(1, 5)):
        content = rng.randbytes(rng.choice((0, 1, 2, 3, 4, 7, 8, 9, 26, 32, 33, 300)))
        if rng.random() < 0.3:
            content = b"name\0" + rng.choice((b"\0", b"\1\0\0\0", b"\7")) + zlib.compress(content)
        content = content[:-1] if len(content) in (6,) else content  # of an RGB picture, that would be a colour
        chunks.append(chunk(rng.choice(names), content, sound=rng.random() < 0.8))
    return b"".join(chunks)


def random_segments(rng: random.Random) -> bytes:
    """Segments of applications and comments, with known and random beginnings."""
    known: tuple[bytes, ...] = (
        b"JFIF\0",
        b"Exif\0\0",
        b"ICC_PROFILE\0",
        b"MPF\0",
        b"FPXR\0",
        b"Photoshop 3.0\0",
        b"JFXX\0",
        b"Adob",
        b"",
    )
    known += (b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\x008BIM")
    return b"".join(
        segment(rng.choice((*range(0xE0, 0xF0), 0xFE)), rng.choice(known) + rng.randbytes(rng.choice((0, 1, 2, 9, 99))))
        for _ in range(rng.randrange(1, 5))
    )


def test_four_thousand_variants_of_a_sound_picture_are_read():
    """None is refused, and all give its pixels."""
    rng = random.Random(21)
    stored = {value: IMAGE if value == 1 else IMAGE.transpose(Image.Transpose(UNDO[value])) for value in range(1, 9)}
    files = {
        value: {
            "PNG": encoded(image, "PNG"),
            "JPEG": encoded(image, "JPEG"),
            "WEBP": encoded(image, "WEBP", lossless=True),
        }
        for value, image in stored.items()
    }
    upright = {
        (value, format): decode(data) if value == 1 else np.asarray(_turned(data, value))
        for value, by_format in files.items()
        for format, data in by_format.items()
    }
    for index in range(4000):
        value = rng.randrange(1, 9)
        exif = random_exif(rng, value)
        match index % 5:
            case 0:
                format, data = "PNG", with_chunks(files[value]["PNG"], random_chunks(rng), chunk(b"eXIf", exif))
            case 1:
                exif = segment(0xE1, b"Exif\0\0" + exif)
                format, data = "JPEG", with_segments(files[value]["JPEG"], exif, random_segments(rng))
            case 2:
                format, data = "WEBP", webp_chunks(files[value]["WEBP"], (b"EXIF", exif), (b"XMP ", rng.randbytes(9)))
            case 3:
                value, format, data = 1, "PNG", with_chunks(PNG, random_chunks(rng))
            case _:
                exif = segment(0xE1, b"Exif\0\0" + rng.randbytes(rng.randrange(40)))
                value, format, data = 1, "JPEG", with_segments(JPEG, exif, random_segments(rng))
        np.testing.assert_array_equal(decode(data), upright[value, format], err_msg=repr((index, data)))


def _turned(data: bytes, value: int) -> Image.Image:
    """By Pillow itself, for a file that holds nothing but pixels."""
    image = Image.fromarray(decode(data))
    image.getexif()[0x0112] = value
    return ImageOps.exif_transpose(image)


# --- How many parts ---


def test_a_progressive_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded():
    data = encoded(picture(64, 48), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(Refusal, match="too_many_scans"):
        decode(data[:-2] + data[scan:-2] * 400 + b"\xff\xd9")
    with pytest.raises(Refusal, match="too_many_scans"):
        decode(data[:-2] + (b"\xff\xda\0\x08\1\1\0\1\5\1") * 400)
    assert decode(data).shape == (48, 64, 3)
    assert 8 < data.count(b"\xff\xda") <= 12, "as progressive as usual"
    with pytest.raises(Refusal, match="too_many_scans"):
        decode(data, max_scans=8)


BOMB: dict[str, Callable[[int], bytes]] = {
    "JPEG segments": lambda number: with_segments(JPEG, b"\xff\xe5\0\2" * number),
    "JPEG comments behind a scan": lambda number: JPEG[:-2] + b"\xff\xfe\0\2" * number + b"\xff\xd9",
    "PNG chunks": lambda number: with_chunks(PNG, chunk(b"abCd", b"") * number),
    "PNG image data": lambda number: with_chunks(PNG, chunk(b"IDAT", b"") * number),
    "WebP chunks": lambda number: webp_chunks(WEBP, *[(b"abcd", b"")] * number),
    "GIF comments": lambda number: _gif(b"\x21\xfe\0" * number),
    "GIF sub-blocks": lambda number: _gif(b"\x21\xfe" + b"\1a" * number + b"\0"),
    "AVIF boxes": lambda number: encoded(IMAGE, "AVIF") + b"\0\0\0\x08free" * number,
}


def _gif(extension: bytes) -> bytes:
    data = encoded(IMAGE, "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + extension + data[at:]


@pytest.mark.parametrize("bomb", BOMB.values(), ids=list(BOMB))
def test_parts_are_bounded(bomb):
    """A million would take seconds to walk through; what thousands hold is read."""
    np.testing.assert_array_equal(decode(bomb(5000)), decode(bomb(0)))
    with pytest.raises(Refusal, match="too_many_parts"):
        decode(bomb(200_000))
    with pytest.raises(Refusal, match="too_many_parts"):
        decode(bomb(60), max_parts=50)


def test_what_is_beyond_the_bound_is_not_walked():
    """So the time is that of the parts allowed: a chunk that would be an error behind them is never seen."""
    wrong = chunk(b"IHDR", bytes(13), sound=False)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"abCd", b"") * 1000
    with pytest.raises(Refusal, match="too_many_parts"):
        decode(data + wrong, max_parts=1000)
    with pytest.raises(ValueError, match="header"):
        decode(data + wrong)


# --- What is broken stays an error ---


def test_image_data_with_a_wrong_byte_are_refused():
    """Their own checksum decides, whether or not the chunk's was mended; a wrong chunk checksum alone does no harm."""
    data = png(np.arange(24 * 16 * 1).reshape(16, 24, 1) % 251, 8, GREY)
    at = data.index(b"IDAT") + 4
    end = data.index(b"IEND") - 8
    whole, num_refused = decode(data), 0
    for place in range(at, end):
        broken = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        try:
            np.testing.assert_array_equal(decode(broken), whole)  # not every bit counts
        except (OSError, ValueError, SyntaxError):
            num_refused += 1
    assert num_refused > 0.9 * (end - at)
    forgiven = data[:end] + bytes(4) + data[end + 4 :]
    np.testing.assert_array_equal(decode(forgiven), decode(data))


@pytest.mark.parametrize(
    "data",
    [
        PNG[:40],
        PNG[: len(PNG) // 2],
        JPEG[:200],
        JPEG[: JPEG.index(b"\xff\xda")],
        WEBP[:-20],
        WEBP[:20],
        webp_chunks(WEBP)[:-20],
        encoded(IMAGE, "GIF")[:100],
        encoded(IMAGE, "AVIF")[:-50],
        encoded(IMAGE, "AVIF")[:60],
        heic(picture(64, 64))[:-300],
        heic(picture(64, 64))[:200],
        encoded(IMAGE, "BMP")[:-200],
    ],
    ids=lambda data: f"{sniff(data)} {len(data)}",
)
def test_files_that_end_early_are_errors(data):
    with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever type: a child turns each into a refusal
        decode(data)


def test_files_that_end_within_their_metadata_are_read():
    webp = webp_chunks(WEBP, (b"XMP ", bytes(200)), (b"EXIF", bytes(200)))
    for data in (webp[:-50], webp[:-250], PNG[:-12], PNG[:-8] + chunk(b"tEXt", bytes(200))[:-50]):
        np.testing.assert_array_equal(decode(data), np.asarray(IMAGE))


def test_nothing_but_pixels_reaches_a_decoder():
    secret = b"secret words"
    exif = tiff((270, 2, len(secret), struct.pack(">I", 26))) + secret
    for data in (
        with_segments(JPEG, segment(0xE1, b"Exif\0\0" + exif), segment(0xFE, secret)),
        with_chunks(PNG, chunk(b"eXIf", exif), chunk(b"tEXt", b"a\0" + secret)),
        webp_chunks(WEBP, (b"EXIF", exif), (b"XMP ", secret)),
        _gif(b"\x21\xfe" + bytes([len(secret)]) + secret + b"\0"),
    ):
        format = sniff(data)
        assert format is not None
        assert secret not in split_metadata(data, format, MediaLimits()).data
