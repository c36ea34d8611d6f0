"""Which frames are taken from a video, and that they are the right ones."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from service.errors import BadRequest
from service.media.container import Truncated, check_whole
from service.media.geometry import to_geometry
from service.media.limits import MediaLimits
from service.media.video import at_rate, spread
from tests.media.samples import VIDEO_FORMATS, encoded, level, levels, shown_by, video_bytes

pytestmark = pytest.mark.anyio


def test_spread_takes_first_and_last_and_rounds_to_the_nearest():
    assert spread(10, 1).tolist() == [0]
    assert spread(10, 2).tolist() == [0, 9]
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(5, 3).tolist() == [0, 2, 4]
    assert spread(2, 4).tolist() == [0, 0, 1, 1]
    assert spread(1, 3).tolist() == [0, 0, 0]
    for total in range(1, 40):
        for count in range(2, 40):
            expected = np.floor(np.linspace(0, total - 1, count) + 0.5 + 1e-9)
            assert spread(total, count).tolist() == expected.tolist()


def test_at_rate_takes_the_frame_on_screen():
    starts = np.arange(20) / 10  # two seconds at 10 frames a second
    assert at_rate(starts, 2.0, 1.0, 64).tolist() == [0, 10]
    assert at_rate(starts, 2.0, 2.0, 64).tolist() == [0, 5, 10, 15]
    assert at_rate(starts, 2.0, 10.0, 64).tolist() == list(range(20))
    assert at_rate(starts, 2.0, 1e12, 64).tolist() == list(range(20)), "never more than there are"
    assert at_rate(starts, 2.0, 0.1, 64).tolist() == [0]
    assert at_rate(starts, 2.0, 10.0, 5).tolist() == spread(20, 5).tolist(), "capped, but to the end of the clip"
    uneven = np.array([0.0, 0.1, 0.2, 1.9])
    assert at_rate(uneven, 2.0, 1.0, 64).tolist() == [0, 2]
    assert at_rate(np.zeros(1), 0.0, 5.0, 64).tolist() == [0]


def test_however_uneven_a_clip_is_none_of_its_frames_is_out_of_reach():
    """A bound on the rate by the clip's average would lose those that are near each other, and the one after a gap."""
    gap = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 599.0])
    assert at_rate(gap, 599.1, 1.0, 64).tolist() == [0, 4, 5]
    assert at_rate(gap, 599.1, 1000.0, 64).tolist() == list(range(6))
    assert at_rate(gap, 599.1, 1e308, 64).tolist() == list(range(6))
    rng = np.random.default_rng(0)
    for _ in range(100):
        starts = np.append(0.0, rng.choice([0.01, 0.04, 0.1, 1.0], 29)).cumsum()
        assert at_rate(starts, starts[-1] + 0.01, 1000.0, 64).tolist() == list(range(30))
        fps = rng.uniform(0.3, 30.0)
        wanted = np.arange(0.0, starts[-1] + 0.009, 1.0 / fps)
        shown = np.unique(np.searchsorted(starts, wanted + 1e-3, side="right") - 1)
        assert at_rate(starts, starts[-1] + 0.01, fps, 64).tolist() == shown.tolist()


@pytest.mark.parametrize("format", VIDEO_FORMATS)
async def test_num_frames_are_spread_over_the_clip(decoder, format):
    data = video_bytes(format)
    for num_frames, expected in ((3, [0, 6, 11]), (12, list(range(12))), (1, [0])):
        medium = await decoder.decode(data, kind="video", num_frames=num_frames, fps=None)
        assert medium.kind == "video"
        assert medium.frames.shape == (num_frames, 32, 32, 3)
        assert levels(medium.frames) == expected


async def test_more_frames_than_there_are_repeat_the_nearest(decoder):
    medium = await decoder.decode(video_bytes("mp4", num_frames=3), kind="video", num_frames=6, fps=None)
    assert levels(medium.frames) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("format", VIDEO_FORMATS)
async def test_fps_samples_by_time(decoder, format):
    medium = await decoder.decode(video_bytes(format, num_frames=12, rate=10), kind=None, num_frames=None, fps=2.5)
    assert levels(medium.frames) == [0, 4, 8]


async def test_fps_reaches_every_frame_of_an_uneven_clip(decoder):
    times = (0, 40, 50, 60, 400, 410, 1950, 2010)  # milliseconds
    medium = await decoder.decode(video_bytes("mp4", times=times), kind=None, num_frames=None, fps=1000.0)
    assert levels(medium.frames) == list(range(8))
    medium = await decoder.decode(video_bytes("mp4", times=times), kind=None, num_frames=None, fps=1.0)
    assert levels(medium.frames) == [0, 5, 6]


async def test_neither_takes_the_models_default(decoder):
    medium = await decoder.decode(video_bytes("mp4"), kind=None, num_frames=None, fps=None)
    assert len(medium.frames) == decoder.geometry.default_num_frames


@pytest.mark.parametrize("size", [(49, 33), (64, 16), (17, 200)], ids=str)
@pytest.mark.parametrize("format", VIDEO_FORMATS)
async def test_odd_sizes(decoder, format, size):
    medium = await decoder.decode(video_bytes(format, size), kind="video", num_frames=2, fps=None)
    assert medium.frames.shape == (2, 32, 32, 3)
    assert np.abs(medium.frames[1].astype(int) - level(11)).max() < 12


@pytest.mark.parametrize("width", [8, 12, 16, 24, 32, 48, 96, 144])
async def test_rows_that_a_decoder_pads(decoder, width):
    """Decoders pad rows to a multiple of 64 bytes; the picture must come out whole all the same."""
    data = video_bytes("avi", (width, 16), noise=True)
    medium = await decoder.decode(data, kind="video", num_frames=12, fps=None)
    container: Any
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    expected = np.stack([to_geometry(frame, decoder.geometry) for frame in frames])
    assert np.abs(medium.frames.astype(int) - expected).max() <= 1


TURNED = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", TURNED + MIRRORED, ids=str)
async def test_frames_are_turned_and_mirrored_as_the_file_says(decoder, matrix):
    """Cameras that face their owner write mirrored files."""
    data = video_bytes("mp4", (64, 64), num_frames=1, noise=True)
    container: Any
    with av.open(io.BytesIO(data)) as container:
        (frame,) = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    a, b, c, d = matrix
    y, x = np.mgrid[-63:64:2, -63:64:2]
    shown = np.empty_like(frame)
    shown[(b * x + d * y + 63) // 2, (a * x + c * y + 63) // 2] = frame
    medium = await decoder.decode(shown_by(data, *matrix), kind="video", num_frames=1, fps=None)
    expected = to_geometry(Image.fromarray(shown), decoder.geometry)
    assert np.abs(medium.frames[0].astype(int) - expected).max() <= 1


async def test_an_animated_gif_may_be_sent_as_a_video(decoder):
    pictures = [Image.new("RGB", (40, 24), (level(index),) * 3) for index in range(6)]
    data = encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=100)
    medium = await decoder.decode(data, kind="video", num_frames=6, fps=None)
    assert medium.kind == "video"
    assert levels(medium.frames) == [0, 1, 2, 3, 4, 5]
    assert (await decoder.decode(data, kind=None, num_frames=None, fps=None)).kind == "image"


@pytest.mark.parametrize(
    ("num_frames", "fps", "param"),
    [
        (2, 1.0, "fps"),
        (0, None, "num_frames"),
        (-1, None, "num_frames"),
        (65, None, "num_frames"),
        (None, 0.0, "fps"),
        (None, -1.0, "fps"),
        (None, float("nan"), "fps"),
        (None, float("inf"), "fps"),
    ],
)
async def test_unusable_sampling_is_refused_by_name(decoder, num_frames, fps, param):
    with pytest.raises(BadRequest) as error:
        await decoder.decode(video_bytes("mp4"), kind="video", num_frames=num_frames, fps=fps)
    assert error.value.param == param


@pytest.mark.parametrize(("extension", "format"), [("mp4", "MP4"), ("webm", "WEBM"), ("avi", "AVI")])
def test_containers_tell_when_they_are_cut(extension, format):
    data = video_bytes(extension, (64, 48))
    check_whole(data, format, MediaLimits())
    with pytest.raises(Truncated):
        check_whole(data[: int(len(data) * 0.9)], format, MediaLimits())
    for length in range(0, len(data), 7):  # never anything but sound, or Truncated
        with contextlib.suppress(Truncated):
            check_whole(data[:length], format, MediaLimits())
