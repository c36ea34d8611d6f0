"""Videos as lists of pictures, `data:video/jpeg;base64,FRAME,...`: which frames are shown, and what is refused."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from model.request import Area, Geometry
from service.errors import ServiceError, UnsupportedMedia
from service.media import MediaDecoder, MediaLimits, frame_list
from service.media.fetch import resolve
from service.media.refusal import Refusal
from service.media.sniff import sniff
from service.media.stills import decode_frame_list
from service.media.wire import Job
from tests.media.samples import SQUARE, encoded, picture, video_bytes

pytestmark = pytest.mark.anyio

AS_IS = Geometry(default_num_frames=4, max_ratio=10_000)
LIMITS = MediaLimits(max_frames=8, max_source_frames=60)


def grey(level: int, size: tuple[int, int] = (32, 32), format: str = "JPEG") -> bytes:
    return encoded(Image.new("RGB", size, (level, level, level)), format)


def greys(number: int) -> list[bytes]:
    return [grey(4 * index) for index in range(number)]


def uri(frames: Sequence[bytes], parameters: str = "") -> str:
    return f"data:video/jpeg{parameters};base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


def decode(
    data: bytes,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    limits: MediaLimits = LIMITS,
    geometry: Geometry = AS_IS,
) -> tuple[np.ndarray, float | None]:
    job = Job("video", "FRAME LIST", num_frames, fps)
    video = decode_frame_list(data, job, limits=limits, geometry=geometry)
    return np.stack(video.pixels), video.seconds_per_frame


def shown(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in frames]


@pytest.mark.parametrize("number", [1, 2, 5, 8])
async def test_all_frames_are_taken_in_their_order(number):
    data = await resolve(uri(greys(number)), limits=LIMITS)
    assert sniff(data) == "FRAME LIST"
    frames, seconds = decode(data)
    assert (shown(frames), seconds) == (list(range(number)), None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_frames": 1}, [0]),
        ({"num_frames": 3}, [0, 10, 19]),
        ({"num_frames": 8}, [0, 3, 5, 8, 11, 14, 16, 19]),
        ({}, [0, 3, 5, 8, 11, 14, 16, 19]),  # no more than `max_frames`, though nothing asked for fewer
    ],
    ids=str,
)
async def test_fewer_are_spread_evenly(options, expected):
    data = await resolve(uri(greys(20)), limits=LIMITS)
    assert shown(decode(data, **options)[0]) == expected


async def test_more_than_there_are_repeats_the_nearest():
    data = await resolve(uri(greys(3)), limits=LIMITS)
    assert shown(decode(data, num_frames=5)[0]) == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("rate", "options", "expected", "seconds"),
    [
        ("2", {}, [0, 1, 2, 3, 4, 5, 6, 7], 0.5),
        ("2", {"fps": 1.0}, [0, 2, 4, 6], 1.0),
        ("0.5", {"fps": 0.25}, [0, 2, 4, 6], 4.0),
        ('"4"', {"fps": 100.0}, [0, 1, 2, 3, 4, 5, 6, 7], 0.25),
        ("10", {"num_frames": 2}, [0, 7], 0.7),
        ("10", {"num_frames": 1}, [0], None),
    ],
    ids=str,
)
async def test_a_rate_in_the_type_gives_the_frames_times(rate, options, expected, seconds):
    data = await resolve(uri(greys(8), f";fps={rate}"), limits=LIMITS)
    frames, apart = decode(data, **options)
    assert shown(frames) == expected
    assert apart == (None if seconds is None else pytest.approx(seconds))


async def test_without_times_fps_is_refused_and_says_how_to_tell_them():
    data = await resolve(uri(greys(3)), limits=LIMITS)
    with pytest.raises(Refusal, match="no_frame_times"):
        decode(data, fps=1.0)
    for rate in ("0", "-1", "nan", "inf", "fast", "1001", ""):
        with pytest.raises(ServiceError, match="fps") as error:
            await resolve(uri(greys(2), f";fps={rate}"), limits=LIMITS)
        assert error.value.code == "invalid_data_uri"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
async def test_a_frame_is_decoded_as_a_picture_is(format):
    image = picture(40, 32)
    data = await resolve(uri([encoded(image, format), grey(9, (40, 32))]), limits=LIMITS)
    frames = decode(data)[0]
    assert np.abs(frames[0].astype(int) - np.asarray(image)).mean() < (40 if format in ("JPEG", "WEBP") else 0.1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = await resolve(
        uri([grey(0, (16, 24)), encoded(picture(24, 16), "JPEG", exif=exif.tobytes())]), limits=LIMITS
    )
    assert decode(turned)[0].shape == (2, 24, 16, 3)


async def test_frames_of_other_sizes_are_brought_to_that_of_the_first():
    frames = [grey(40, (48, 32)), grey(80, (200, 16)), grey(120, (8, 80))]
    data = await resolve(uri(frames), limits=LIMITS)
    got = decode(data)[0]
    assert got.shape == (3, 32, 48, 3)
    assert shown(got) == [10, 20, 30]
    for geometry in (SQUARE, Geometry(None, None, None, 3, 4, Area(28, 784, 6272), Area(28, 784, 3136, 20_000))):
        got = decode(data, geometry=geometry)[0]
        assert shown(got) == [10, 20, 30]
        assert geometry.fits("video", *got.shape[:3])


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (grey(0)[:200], "frame {}: the image could not be decoded"),
        (b"neither this nor that", "frame {}: the picture format is not supported"),
        (video_bytes("mp4", num_frames=2), "frame {}: the picture format is not supported"),
        (grey(0, (4096, 2400), "PNG"), "frame {}: the medium is 4096x2400 pixels; at most 9437184"),
        (b"", "frame {}: the data: URI has an empty frame"),
    ],
    ids=["truncated", "text", "video", "too large", "empty"],
)
async def test_one_broken_frame_is_named_by_its_number(decoder: MediaDecoder, number, frame, complaint):
    frames = greys(3)
    frames[number - 1] = frame

    async def show(frames: Sequence[bytes]) -> np.ndarray:
        data = await resolve(uri(frames), limits=LIMITS)
        return (await decoder.decode(data, kind="video", num_frames=None, fps=None)).frames

    with pytest.raises(ServiceError) as error:
        await show(frames)
    assert error.value.message.startswith(complaint.format(number))
    assert shown(await show(greys(3))) == [0, 1, 2]


async def test_malformed_base64_is_named_by_frame_and_place():
    for spoilt, complaint in (
        ("/9j!", "frame 2: the data: URI has '!' at offset 3"),
        ("/9j/A", "frame 2: .*only one character"),
    ):
        with pytest.raises(ServiceError, match=complaint):
            await resolve(uri(greys(1)) + "," + spoilt, limits=LIMITS)


@pytest.mark.parametrize("comma", [",", "%2C", "%2c", "\n,\n"])
async def test_frames_are_counted_and_weighed_before_they_are_decoded(comma):
    text = uri(greys(60)).split(";base64,", 1)[1].replace(",", comma)
    data = await resolve("DATA:VIDEO/JPEG;BASE64," + text, limits=LIMITS)
    assert len(frame_list.split(data)[0]) == 60
    for limits, code in (
        (MediaLimits(max_source_frames=59), "too_many_source_frames"),
        (MediaLimits(max_bytes=sum(map(len, greys(60))) - 1), "too_many_bytes"),
    ):
        with pytest.raises(ServiceError) as error:
            await resolve("data:video/jpeg;base64," + text, limits=limits)
        assert (error.value.code, error.value.status) == (code, 413)
    with pytest.raises(Refusal, match="too_many_source_frames"):
        decode(data, limits=MediaLimits(max_source_frames=59))
    slow = await resolve("data:video/jpeg;fps=1;base64," + text, limits=LIMITS)
    with pytest.raises(Refusal, match="too_long"):
        decode(slow, limits=MediaLimits(max_video_seconds=59))


async def test_only_a_video_may_be_a_list(decoder: MediaDecoder):
    data = await resolve(uri(greys(2)), limits=LIMITS)
    with pytest.raises(UnsupportedMedia, match=r"sent as image but is a FRAME LIST video"):
        await decoder.decode(data, kind="image", num_frames=None, fps=None)
    medium = await decoder.decode(data, kind="video", num_frames=None, fps=None)
    assert medium.frames.shape == (2, 32, 32, 3)
    with pytest.raises(ServiceError, match="data:video/jpeg;base64,FRAME,FRAME"):
        await resolve(uri(greys(2)).replace("video/jpeg", "image/jpeg"), limits=LIMITS)


async def test_lists_that_lie_about_their_lengths_are_refused(decoder: MediaDecoder):
    """Anybody may upload a file that begins like one."""
    sound = frame_list.join(greys(2), 2.0)
    for data in (sound[:-1], sound + b"\0", sound[:20], sound[:12], sound[:8], sound[:16], sound[:8] + b"\xff" * 40):
        with pytest.raises(ServiceError) as error:
            await decoder.decode(data, kind="video", num_frames=None, fps=None)
        assert error.value.code == "video_not_decodable"


@pytest.mark.parametrize("number", [1, 60])
@pytest.mark.parametrize("parameters", ["", ";fps=2"])
async def test_a_list_is_decoded_off_the_event_loop(monkeypatch, number, parameters):
    """36,000 frames of six characters each held up everybody for more than a second, in a body of 250 kB."""
    threads, from_uri = [], frame_list.from_uri

    def recorded(*arguments):
        threads.append(threading.current_thread())
        return from_uri(*arguments)

    monkeypatch.setattr(frame_list, "from_uri", recorded)
    await resolve(uri([b"abc"] * number, parameters), limits=LIMITS)
    assert threads
    assert threading.main_thread() not in threads
