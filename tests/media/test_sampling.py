"""Which frames are chosen, and what is known of when they appear: as transformers computes it where a rate is even."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from model.request import Geometry, VideoMetadata
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sampling import Sampler, Timeline, thinned
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.samples import VIDEO_FORMATS, encoded, picture, video_bytes

NAMES = {"mp4": "MP4", "webm": "WEBM", "avi": "AVI"}
LIMITS = MediaLimits()
ANY_SIZE = Geometry(default_num_frames=3, samples_frames=True)


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(60)])
@pytest.mark.parametrize("rounding", [None, 3])
def test_an_even_rate_is_found_however_the_container_rounds(rate: Fraction, rounding: int | None) -> None:
    """Times then are what transformers computes: the number of the frame over the rate, to the last bit."""
    starts = np.arange(90) / float(rate)
    if rounding is not None:
        starts = starts.round(rounding)
    timeline = Timeline(starts, float(starts[-1] + 1 / rate))
    source, times = timeline.described(float(rate), (64, 48))
    assert source == VideoMetadata(90, float(rate), 90 / float(rate), 64, 48)
    assert times.tolist() == [number / float(rate) for number in range(90)]
    guessed, _ = timeline.described(None, (64, 48))
    assert guessed.fps == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize(
    ("starts", "end", "claimed"),
    [
        ([0.0, 0.1, 0.2, 0.5], 0.6, 10.0),
        ([0.0, 0.1, 0.2, 0.3], 0.4, 25.0),  # a header that lies
        ([0.0, 0.04, 0.07, 0.1], 0.13, 30.0),  # a GIF, which rounds to hundredths
        ([0.0, 0.001, 0.002, 0.003], 0.004, 500.0),
        ([0.0], 0.4, 1000.0),
    ],
)
def test_a_rate_that_does_not_hold_is_not_believed(starts: list[float], end: float, claimed: float) -> None:
    source, times = Timeline(np.array(starts), end).described(claimed, (8, 8))
    assert source.fps is not None
    assert source.fps == pytest.approx(len(starts) / end)
    assert source.duration == pytest.approx(end)
    np.testing.assert_allclose(times, starts, atol=1e-9)


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_files_say_what_they_are(format: str) -> None:
    seen: list[VideoMetadata] = []

    def choose(source: VideoMetadata) -> list[int]:
        seen.append(source)
        return [1, 5, 5, 7]

    job = Job("video", NAMES[format])  # type: ignore[arg-type]
    data = video_bytes(format, (50, 34), num_frames=8, rate=30)
    video = decode_video(data, job, limits=LIMITS, geometry=ANY_SIZE, choose=choose)
    assert seen == [video.source] == [VideoMetadata(8, 30.0, 8 / 30, 50, 34)]
    assert video.frame_times == (1 / 30, 5 / 30, 5 / 30, 7 / 30)
    assert len(video.pixels) == 4
    assert video.seconds_per_frame == pytest.approx(2 / 30)


def test_an_animation_without_a_rate_has_its_own_times() -> None:
    frames = [picture(20, 10, seed=seed) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=[100, 300, 200], lossless=True)
    video = decode_video(data, Job("video", "WEBP"), limits=LIMITS, geometry=ANY_SIZE, choose=lambda _: [0, 1, 2])
    assert video.frame_times == pytest.approx((0.0, 0.1, 0.4))
    source = video.source
    assert (source.total_frames, source.width, source.height) == (3, 20, 10)
    assert (source.fps, source.duration) == pytest.approx((5.0, 0.6))
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(video.pixels, frames, strict=True))


def test_a_clip_is_asked_about_again_only_where_it_turns_out_otherwise() -> None:
    """A decoder may show other frames than the packets announced; then the choice is another."""
    asked: list[int] = []

    def choose(source: VideoMetadata) -> list[int]:
        asked.append(source.total_frames)
        return [source.total_frames - 1]

    sampler = Sampler(Job("video", "MP4"), LIMITS, ANY_SIZE, choose)
    announced, true = (Timeline(np.arange(count) / 10, count / 10) for count in (10, 9))
    samples = [sampler.sample(timeline, 10.0, (8, 8)) for timeline in (announced, announced, true, true)]
    assert samples == [[9], [9], [8], [8]]
    assert asked == [10, 9]
    assert (sampler.source.total_frames, sampler.times) == (9, (0.8,))


def test_choices_are_sorted_and_thinned_out_to_the_limit() -> None:
    def chosen(indices: list[int], most: int) -> list[int]:
        sampler = Sampler(Job("video", "MP4"), MediaLimits(max_frames=most), ANY_SIZE, lambda _: indices)
        return sampler.sample(Timeline(np.arange(20) / 10, 2.0), 10.0, (8, 8))

    assert chosen([7, 3, 3, 19], 8) == [3, 3, 7, 19]
    assert chosen(list(range(20)), 4) == [0, 6, 13, 19]
    assert chosen(list(range(0, 20, 2)), 9) == thinned(np.arange(0, 20, 2), 9).tolist()
    assert chosen([5, 6], 1) == [5]
    with pytest.raises(Refusal, match="not_sampled"):
        chosen([], 4)


def test_without_a_choice_the_default_of_the_target_counts() -> None:
    sampler = Sampler(Job("video", "MP4"), LIMITS, ANY_SIZE, lambda _: None)
    assert sampler.sample(Timeline(np.arange(21) / 10, 2.1), 10.0, (8, 8)) == [0, 10, 20]
    few = Sampler(Job("video", "MP4"), MediaLimits(max_frames=2), ANY_SIZE, None)
    assert few.sample(Timeline(np.arange(21) / 10, 2.1), 10.0, (8, 8)) == [0, 20]
