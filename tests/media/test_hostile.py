"""Broken, mislabelled, oversized and mutated files: each a clear client error, and nothing else suffers."""

from __future__ import annotations

import asyncio
import random
import re
import struct

import numpy as np
import pytest
from PIL import Image

from service.errors import BadRequest, ServiceError, TooLarge, UnsupportedMedia
from service.media import MediaDecoder, MediaLimits
from service.media.sniff import sniff
from tests.media.samples import (
    IMAGE_FORMATS,
    SQUARE,
    VIDEO_FORMATS,
    audio_only_mp4,
    encoded,
    flip_bits,
    image_bytes,
    mutate,
    picture,
    png_header,
    video_bytes,
)

pytestmark = pytest.mark.anyio

INTERNALS = re.compile(r"pillow|ffmpeg|libav|pyav|traceback|errno|exception|/|\b0x", re.IGNORECASE)


async def decode(decoder: MediaDecoder, data: bytes, kind=None, **options):
    return await decoder.decode(data, kind=kind, **{"num_frames": None, "fps": None, **options})


async def refusal(decoder: MediaDecoder, data: bytes, kind=None, **options) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        await decode(decoder, data, kind, **options)
    assert error.value.status in (400, 413, 415)
    assert not INTERNALS.search(error.value.message)
    return error.value


@pytest.mark.parametrize(
    ("format", "share"),
    [
        (format, share)
        for format in IMAGE_FORMATS
        for share in (0.02, 0.1, 0.5, 0.8, 0.95)
        if (format, share) != ("JPEG", 0.95)  # which lacks little enough to be read
    ],
)
async def test_truncated_images(decoder, format, share):
    data = image_bytes(format, (64, 48))
    error = await refusal(decoder, data[: max(4, int(len(data) * share))], "image" if share > 0.02 else None)
    assert isinstance(error, (BadRequest, UnsupportedMedia))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("format", VIDEO_FORMATS)
async def test_truncated_videos(decoder, format, share):
    data = video_bytes(format, noise=True)
    error = await refusal(decoder, data[: int(len(data) * share)], "video")
    assert type(error) is BadRequest
    assert "could not be decoded" in error.message


async def test_a_png_with_a_flipped_bit_is_noticed(decoder):
    """Other formats have no checksums: there a flipped bit may pass as a different picture."""
    data = image_bytes("PNG", (64, 48))
    error = await refusal(decoder, flip_bits(data, 1, random.Random(0), start=100))
    assert type(error) is BadRequest


async def test_empty_files(decoder):
    for kind in (None, "image", "video"):
        assert type(await refusal(decoder, b"", kind)) is BadRequest


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"%PDF-1.7 " + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"#EXTM3U\nhttp://169.254.169.254/latest/",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"SIMPLE  =                    T" + bytes(200),  # FITS
        b"P6 2 2 255 " + bytes(12),
        b"BM" + bytes(60),
        b"RIFF\x04\0\0\0WAVE",
        b"\0" * 1000,
        encoded(picture(16, 16), "TIFF"),
        encoded(picture(16, 16), "ICO"),
    ],
    ids=lambda data: repr(data[:8]),
)
async def test_types_that_are_not_read(decoder, data):
    for kind in (None, "image", "video"):
        assert type(await refusal(decoder, data, kind)) is UnsupportedMedia


NAMED = {
    "TIFF": [encoded(picture(16, 16), "TIFF"), b"MM\0*" + bytes(60), b"II+\0" + bytes(60)],
    "JPEG XL": [b"\xff\x0a" + bytes(60), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60)],
    "JPEG 2000": [encoded(picture(16, 16), "JPEG2000"), b"\xff\x4f\xff\x51" + bytes(60)],
    "PDF": [b"%PDF-1.7 " + bytes(60)],
    "SVG": [b"<svg xmlns='x'/>", b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- by a tool -->\n<SVG/>"],
    "HTML": [b"<!DOCTYPE html><p>", b"\n<html>"],
    "FLV": [b"FLV\x01\x05" + bytes(60)],
    "Ogg": [b"OggS" + bytes(60)],
    "WMV": [b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(60)],
    "MPEG program stream": [b"\0\0\x01\xba" + bytes(60)],
}


@pytest.mark.parametrize("name", NAMED)
async def test_known_formats_that_are_not_read_are_named_and_what_is_read_too(decoder, name):
    for data in NAMED[name]:
        for kind in (None, "image", "video"):
            error = await refusal(decoder, data, kind)
            assert error.status == 415
            assert error.message.startswith(f"{name} is not supported; send JPEG, PNG")


async def test_a_kind_that_the_bytes_belie(decoder):
    """CVE-2026-34755 elsewhere: a video declared as an image went around the frame limit."""
    for format in VIDEO_FORMATS:
        error = await refusal(decoder, video_bytes(format), "image")
        assert type(error) is UnsupportedMedia
        assert "was sent as image" in error.message
    for format in IMAGE_FORMATS:
        if format != "GIF":  # may be an animation, so may be either
            assert type(await refusal(decoder, image_bytes(format), "video")) is UnsupportedMedia


async def test_the_smallest_side(decoder):
    """Any by default, as the model's own processor has it."""
    for data in (image_bytes("PNG", (1, 1)), image_bytes("JPEG", (2, 100)), image_bytes("GIF", (100, 1))):
        assert (await decode(decoder, data)).frames.shape == (1, 32, 32, 3)
    assert (await decode(decoder, video_bytes("avi", (4, 4)))).frames.shape == (4, 32, 32, 3)
    strict = MediaDecoder(MediaLimits(min_side=8), SQUARE, workers=1)
    await strict.start()
    try:
        for data in (image_bytes("PNG", (7, 100)), video_bytes("avi", (4, 4))):
            error = await refusal(strict, data)
            assert type(error) is BadRequest
            assert "at least 8 pixels" in error.message
    finally:
        await strict.close()


async def test_images_too_large_are_refused_unopened(decoder):
    children = decoder.stats.children
    for width, height in ((20_000, 20_000), (60_000, 16), (2**31 - 1, 2**31 - 1)):
        error = await refusal(decoder, png_header(width, height))
        assert isinstance(error, (TooLarge, BadRequest))
    assert type(await refusal(decoder, png_header(20_000, 20_000))) is TooLarge
    assert set(children) & set(decoder.stats.children), "a size check costs no child"
    webp = bytearray(encoded(Image.new("RGBA", (16, 16)), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    assert type(await refusal(decoder, bytes(webp))) is TooLarge


async def test_video_limits():
    limits = MediaLimits(max_video_pixels=64 * 48, max_source_frames=20, max_video_seconds=3.0, max_bytes=100_000)
    decoder = MediaDecoder(limits, SQUARE, workers=1)
    await decoder.start()
    try:
        assert len((await decode(decoder, video_bytes("mp4", (64, 48)))).frames) == 4
        for format in VIDEO_FORMATS:
            error = await refusal(decoder, video_bytes(format, (66, 48)))
            assert type(error) is TooLarge
            assert "66x48" in error.message
        error = await refusal(decoder, video_bytes("mp4", num_frames=21))
        assert "more than the 20 frames" in error.message
        error = await refusal(decoder, video_bytes("mp4", num_frames=10, rate=1))
        assert "lasts 10 seconds" in error.message
        assert type(await refusal(decoder, bytes(100_001))) is TooLarge
        assert decoder.stats.children_started == 1, "limits cost no child"
    finally:
        await decoder.close()


async def test_a_container_that_lies_about_its_size(decoder):
    """The header says 48x32; the stream inside is larger than allowed. The first decoded frame tells."""
    limits = MediaLimits(max_video_pixels=64 * 48)
    small = MediaDecoder(limits, SQUARE, workers=1)
    await small.start()
    try:
        data = video_bytes("mp4", (128, 96)).replace(struct.pack(">HH", 128, 96), struct.pack(">HH", 48, 32))
        error = await refusal(small, data)
        assert error.status in (400, 413)
    finally:
        await small.close()


async def test_a_video_without_frames(decoder):
    error = await refusal(decoder, audio_only_mp4(), "video")
    assert "has no video" in error.message
    for data in (b"\0\0\0\x10ftypisom\0\0\0\0", b"RIFF\x04\0\0\0AVI ", b"\x1a\x45\xdf\xa3"):
        assert type(await refusal(decoder, data)) is BadRequest


async def test_memory_of_a_decode_is_bounded():
    limits = MediaLimits(memory_bytes=400 * 1024 * 1024)
    decoder = MediaDecoder(limits, SQUARE, workers=1)
    await decoder.start()
    try:
        data = encoded(Image.new("RGB", (7000, 7000)), "PNG", compress_level=1)
        error = await refusal(decoder, data)
        assert type(error) is TooLarge
        assert "memory" in error.message
        assert (await decode(decoder, image_bytes("PNG"))).frames.shape == (1, 32, 32, 3)
    finally:
        await decoder.close()


async def test_fifty_at_once_good_and_bad_each_get_their_own_answer(decoder):
    rng = random.Random(5)
    colours = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(50)]

    async def one(index: int) -> bool:
        image = Image.new("RGB", (30 + index, 60), colours[index])
        match index % 5:
            case 0:
                await refusal(decoder, encoded(image, "PNG")[:60], "image")
                return True
            case 1:
                medium = await decode(decoder, video_bytes("mp4", num_frames=6), "video", num_frames=2)
                return medium.frames[:, 5, 5, 0].tolist() == pytest.approx([0, 100], abs=3)
            case 2:
                await refusal(decoder, video_bytes("avi")[:3000], "video")
                return True
            case _:
                medium = await decode(decoder, encoded(image, "PNG"), "image")
                return bool((medium.frames == np.array(colours[index])).all())

    assert all(await asyncio.gather(*(one(index) for index in range(50))))


async def test_mutated_files_give_a_medium_or_a_client_error(decoder):
    """Nothing else, never a hang; and the decoder is as good as new afterwards."""
    rng = random.Random(20)
    samples = [image_bytes(format, (50, 37), seed=1) for format in IMAGE_FORMATS]
    samples += [video_bytes(format, (32, 24), num_frames=5, noise=True) for format in VIDEO_FORMATS]
    outcomes = {"medium": 0, "error": 0}

    async def one(data: bytes) -> None:
        try:
            medium = await decode(decoder, data)
        except (BadRequest, TooLarge, UnsupportedMedia):
            outcomes["error"] += 1
        else:
            assert medium.frames.shape[1:] == (32, 32, 3)
            outcomes["medium"] += 1

    await asyncio.gather(*(one(mutate(rng.choice(samples), rng)) for _ in range(250)))
    assert min(outcomes.values()) > 30, outcomes
    for data in samples:
        await decode(decoder, data)


@pytest.mark.parametrize("format", [*IMAGE_FORMATS, *VIDEO_FORMATS])
async def test_magic_bytes_tell_every_format(format):
    data = video_bytes(format) if format in VIDEO_FORMATS else image_bytes(format)
    assert sniff(data) == format.upper()
