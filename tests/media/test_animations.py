"""Animations and videos of pictures carry what pictures do: colour profiles, an orientation, odd metadata."""

from __future__ import annotations

import gc
import io
import struct
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from model.request import Geometry
from service.media import MediaDecoder
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import sniff
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.parts import chunk, orientation, segment, swapped_profile, tiff, with_chunks, with_segments
from tests.media.samples import encoded, level, video_bytes

pytestmark = pytest.mark.anyio

AS_SENT = Geometry(exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=4)
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
RED, GREEN = (200, 20, 20), (20, 200, 20)


def animation(format: str, *pictures: Image.Image, **options: Any) -> bytes:
    more = LOSSLESS[format] | options
    return encoded(pictures[0], format, save_all=True, append_images=list(pictures[1:]), duration=100, **more)


def frames(data: bytes, num_frames: int | None = 2, fps: float | None = None) -> list[np.ndarray]:
    format = sniff(data)
    assert format is not None
    return decode_video(data, Job("video", format, num_frames, fps), limits=MediaLimits(), geometry=AS_SENT).pixels


def halves(first: tuple[int, ...], second: tuple[int, ...]) -> Image.Image:
    """A picture of 32 x 16 whose left half has one colour, and whose right half another."""
    image = Image.new("RGB", (32, 16), first)
    image.paste(second, (16, 0, 32, 16))
    return image


def motion_jpeg(*pictures: bytes) -> bytes:
    """An AVI of JPEG files of 32 x 16 as they are."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuvj420p"
        for number, data in enumerate(pictures):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_colour_profile_of_an_animation_is_applied(format: str, mode: str) -> None:
    """The profile says that red is green."""
    pictures = [Image.new(mode, (32, 16), RED), Image.new(mode, (32, 16), GREEN)]
    plain = frames(animation(format, *pictures))
    swapped = frames(animation(format, *pictures, icc_profile=swapped_profile()))
    for frame, other, as_stored in zip(plain, reversed(swapped), (RED, GREEN), strict=True):
        assert np.abs(frame[8, 8] - np.array(as_stored)).max() <= 3
        assert np.abs(frame[8, 8].astype(int) - other[8, 8]).max() <= 40, "profiles have curves of their own"
    broken = frames(animation(format, *pictures, icc_profile=b"no profile"))
    assert all(np.array_equal(one, other) for one, other in zip(plain, broken, strict=True))


@pytest.mark.parametrize("format", ["mov", "avi"])
def test_metadata_do_no_harm_to_a_video_of_pngs(format: str) -> None:
    """PyAV frees the name of such a profile twice, and so may crash where a frame has one."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "rgb24"
        for number in range(20):
            picture = Image.new("RGB", (32, 16), (level(number),) * 3)
            data = encoded(picture, "PNG", icc_profile=swapped_profile(), exif=b"Exif\0\0garbage")
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            container.mux(packet)
    assert [round(frame.mean() / 20) for frame in frames(file.getvalue(), 10)] == [0, 2, 4, 6, 8, 11, 1, 3, 5, 7]
    gc.collect()


def test_the_colour_profile_of_motion_jpeg_is_applied() -> None:
    image = Image.new("RGB", (32, 16), RED)
    files = [encoded(image, "JPEG", quality=95, icc_profile=profile) for profile in (b"", swapped_profile())]
    plain, swapped = frames(motion_jpeg(*files))
    assert plain[8, 8].argmax() == 0
    assert swapped[8, 8].argmax() == 1


ODD_EXIF = {
    "orientation": b"Exif\0\0" + tiff(orientation(1)),
    "garbage": b"Exif\0\0garbage",
    "empty": b"Exif\0\0",
    "cut": b"Exif\0\0" + tiff(orientation(6))[:14],
    "of another camera": b"Exif\0\0II*\0\x08\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", ODD_EXIF.values(), ids=list(ODD_EXIF))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "MJPEG"])
def test_exif_does_no_harm_to_a_video(format: str, exif: bytes) -> None:
    """PyAV knows fewer kinds of side data than FFmpeg, which makes EXIF one of them."""
    pictures = [halves(RED, GREEN), halves(GREEN, RED)]
    if format == "MJPEG":
        files = [encoded(picture, "JPEG", quality=95) for picture in pictures]
        plain = motion_jpeg(*files)
        odd = motion_jpeg(*(with_segments(file, segment(0xE1, exif)) for file in files))
    elif format == "PNG":
        plain = animation(format, *pictures)
        odd = with_chunks(plain, chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    else:
        plain, odd = animation(format, *pictures), animation(format, *pictures, exif=exif)
    assert odd != plain
    for one, other in zip(frames(plain), frames(odd), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize(("value", "shape"), [(3, (16, 32)), (6, (32, 16)), (8, (32, 16))])
def test_an_animation_is_turned_upright_as_its_still_is(format: str, value: int, shape: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    stored = halves(RED, GREEN)
    turned = {3: stored.rotate(180), 6: stored.rotate(270, expand=True), 8: stored.rotate(90, expand=True)}[value]
    for frame in frames(animation(format, stored, Image.new("RGB", (32, 16)), exif=exif.tobytes()), 2)[:1]:
        assert frame.shape[:2] == shape
        assert np.array_equal(frame, np.asarray(turned))


def test_frames_of_an_avif_are_shown_as_long_as_it_says() -> None:
    pictures = [Image.new("RGB", (32, 16), (level(number),) * 3) for number in range(6)]
    durations = [100, 400, 100, 1000, 100, 300]
    data = encoded(pictures[0], "AVIF", save_all=True, append_images=pictures[1:], duration=durations)
    assert sniff(data) == "AVIF"
    video = decode_video(data, Job("video", "AVIF", fps=5.0), limits=MediaLimits(), geometry=AS_SENT)
    shown = [round(frame.mean() / 20) for frame in video.pixels]
    assert shown == [0, 1, 3, 4, 5]  # at 0, 0.2, 0.6, 1.6 and 1.8 seconds
    assert video.frame_times == pytest.approx((0.0, 0.1, 0.6, 1.6, 1.7))
    assert video.source.duration == pytest.approx(2.0)
    for limits, refusal in (
        (MediaLimits(max_video_seconds=1.5), "too_long"),
        (MediaLimits(max_source_frames=5), "too_many_source_frames"),
        (MediaLimits(max_decoded_pixels=5 * 32 * 16), "too_much_work"),
    ):
        with pytest.raises(Refusal, match=refusal):
            decode_video(data, Job("video", "AVIF", 2), limits=limits, geometry=AS_SENT)


def test_a_heic_sequence_is_a_video() -> None:
    """The same container and codec as an MP4 of HEVC; only its brand differs."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx265", rate=10, options={"x265-params": "log-level=none:pools=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            pixels = np.full((48, 64, 3), level(number), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = file.getvalue()
    (length,) = struct.unpack_from(">I", data)
    brands = b"msf1\0\0\0\0hevc" + b"msf1" * ((length - 20) // 4)
    sequence = data[:8] + brands + data[8 + len(brands) :]
    assert sniff(sequence) == "HEIC"
    assert [round(frame.mean() / 20) for frame in frames(sequence, 3)] == [0, 3, 5]


async def test_the_confined_child_plays_them_too(decoder: MediaDecoder) -> None:
    pictures = [Image.new("RGB", (32, 16), (level(number),) * 3) for number in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 1
    for data in (
        animation("AVIF", *pictures, icc_profile=swapped_profile()),
        animation("PNG", *pictures, exif=exif.tobytes(), icc_profile=swapped_profile()),
        animation("WEBP", *pictures, exif=exif.tobytes(), icc_profile=swapped_profile()),
        motion_jpeg(*(encoded(one, "JPEG", exif=exif.tobytes()) for one in pictures)),
        video_bytes("mp4", (32, 16), num_frames=3),
    ):
        medium = await decoder.decode(data, kind="video", num_frames=3, fps=None)
        means = [frame.mean() for frame in medium.frames]
        assert means == sorted(means)
        assert len(set(means)) == 3
