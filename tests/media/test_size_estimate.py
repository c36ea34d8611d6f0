"""The share of the largest allowed file, from its header: right for sound files, bounded for hostile ones."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image, features

from service.media.limits import MediaLimits
from service.media.size_estimate import size_from_header, size_share
from service.media.sniff import sniff
from tests.media.samples import IMAGE_FORMATS, encoded, image_bytes, mutate, png_header, video_bytes

LIMITS = MediaLimits(max_pixels=1_000_000, max_bytes=1_000_000)
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF here"))


@pytest.mark.parametrize("format", [*IMAGE_FORMATS, AVIF])
@pytest.mark.parametrize("size", [(64, 48), (33, 100), (1200, 10)])
def test_the_size_in_the_header_of_every_format(format, size):
    assert size_from_header(image_bytes(format, size), format) == size


def test_the_size_behind_much_metadata():
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    image = Image.new("RGB", (70, 50))
    profile = bytes(500_000)
    for options in ({"progressive": True}, {"exif": exif}, {"icc_profile": profile}, {"comment": b"c" * 60_000}):
        assert size_from_header(encoded(image, "JPEG", **options), "JPEG") == (70, 50)
    for lossless in (True, False):
        assert size_from_header(encoded(image, "WEBP", lossless=lossless, exif=exif), "WEBP") == (70, 50)
    assert size_from_header(encoded(image, "WEBP", lossless=True), "WEBP") == (70, 50)


def test_a_file_counts_by_its_pixels_or_its_bytes():
    assert size_share(png_header(500, 500), "image", "PNG", LIMITS) == 0.25
    assert size_share(png_header(5000, 5000), "image", "PNG", LIMITS) == 1.0
    assert size_share(png_header(8, 8) + bytes(500_000), "image", "PNG", LIMITS) == pytest.approx(0.5, abs=0.01)
    video = video_bytes("mp4")
    assert size_share(video, "video", "MP4", LIMITS) == len(video) / 1_000_000


def test_the_size_of_a_gif_whose_frame_is_larger_than_its_canvas():
    """Pillow decodes all of the frame."""
    for options in ({}, {"comment": b"c" * 2000}, {"duration": 100, "loop": 0}):
        data = encoded(Image.new("P", (300, 200)), "GIF", **options)
        lying = data[:6] + (10).to_bytes(2, "little") * 2 + data[10:]
        assert size_from_header(data, "GIF") == size_from_header(lying, "GIF") == (300, 200)
        assert Image.open(io.BytesIO(lying)).size == (300, 200)
    assert size_from_header(data[:13] + b"\x21\xfe" + b"\1c" * 100_000, "GIF") is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff\xe5\0\2" * 100_000,
        b"\xff\xd8" + b"\xff" * 100_000,
        b"\xff\xd8\xff\xe0\xff\xff",
    ],
    ids=["short", "markers", "fill", "leap"],
)
def test_a_jpeg_without_a_size_counts_as_one_of_the_largest(data):
    assert size_share(data, "image", "JPEG", LIMITS) == 1.0


def test_no_header_is_too_odd():
    rng = random.Random(7)
    samples = [image_bytes(format) for format in IMAGE_FORMATS]
    for _ in range(3000):
        data = mutate(rng.choice(samples), rng)
        if (format := sniff(data)) is not None:
            assert 0.0 <= size_share(data, "image", format, LIMITS) <= 1.0
