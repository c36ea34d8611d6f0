"""Targets that take pictures of any size: frames come out at the size, and with the time, that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.request import Area, Geometry
from service.errors import BadRequest
from service.media import MediaDecoder, MediaLimits, wire
from service.media.child_process import ChildGone
from service.media.refusal import Refusal
from service.media.resize import check_size, resize_to_geometry
from service.media.sniff import Kind
from tests.media.samples import encoded, endless_gif, image_bytes, levels, picture, video_bytes

UNIT = 16
IMAGE = Area(UNIT, 4 * UNIT**2, 36 * UNIT**2)
VIDEO = Area(UNIT, 4 * UNIT**2, 36 * UNIT**2, all_frames=48 * UNIT**2)
BY_AREA = Geometry(
    exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=6, image=IMAGE, video=VIDEO
)


@pytest.fixture(scope="module")
async def decoder() -> AsyncIterator[MediaDecoder]:
    decoder = MediaDecoder(MediaLimits(decode_seconds=10.0), BY_AREA, workers=1)
    await decoder.start()
    yield decoder
    await decoder.close()


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (200, 1), (5, 900), (8, 8), (31, 57), (97, 96), (224, 224), (333, 500), (641, 9), (96, 96)],
    ids=str,
)
def test_pixels_equal_those_of_transformers(size):
    image = picture(*size)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=IMAGE.min_pixels,
        max_pixels=IMAGE.max_pixels,
        patch_size=UNIT,
        merge_size=1,
        temporal_patch_size=1,
        do_rescale=False,
        do_normalize=False,
    )
    made = processor(images=[image], return_tensors="np")
    ours = resize_to_geometry(image, BY_AREA)
    _, down, across = made["image_grid_thw"][0]
    assert ours.shape == (down * UNIT, across * UNIT, 3)
    patches = made["pixel_values"].reshape(down, across, 3, UNIT, UNIT)
    np.testing.assert_array_equal(ours, patches.transpose(0, 3, 1, 4, 2).reshape(ours.shape))


def test_narrow_pictures_are_refused():
    limits = MediaLimits()
    for size in ((1600, 8), (1, 200), (200, 1)):
        check_size(*size, max_pixels=limits.max_pixels, limits=limits, geometry=BY_AREA)
    for size in ((1601, 8), (1, 201), (201, 1)):  # transformers refuses these as well
        with pytest.raises(Refusal, match="too_narrow") as refusal:
            check_size(*size, max_pixels=limits.max_pixels, limits=limits, geometry=BY_AREA)
        assert refusal.value.numbers["max_ratio"] == 200
        with pytest.raises(ValueError, match="aspect ratio"):
            Qwen2VLImageProcessorPil(patch_size=UNIT, merge_size=1)(images=[picture(*size)])


@pytest.mark.anyio
@pytest.mark.parametrize("size", [(40, 30), (300, 200), (16, 64), (9, 9)], ids=str)
async def test_images_come_at_their_own_size(decoder, size):
    medium = await decoder.decode(image_bytes("PNG", size), kind="image", num_frames=None, fps=None)
    assert medium.frames.shape[1:3] == IMAGE.fitted(size[1], size[0])
    assert medium.seconds_per_frame is None
    np.testing.assert_array_equal(medium.frames[0], resize_to_geometry(picture(*size), BY_AREA))


@pytest.mark.anyio
async def test_the_more_frames_a_video_gives_the_smaller_they_are(decoder):
    data = video_bytes("mp4", (160, 120))
    areas = []
    for num_frames in (1, 2, 4, 8, 12):
        medium = await decoder.decode(data, kind="video", num_frames=num_frames, fps=None)
        assert medium.frames.shape[1:3] == VIDEO.fitted(120, 160, num_frames)
        areas.append(medium.frames[0].size)
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[-1]


@pytest.mark.anyio
@pytest.mark.parametrize("format", ["mp4", "webm", "avi"])
async def test_frames_come_with_the_time_between_them(decoder, format):
    """Twelve frames, a tenth of a second each: positions in time depend on it."""
    data = video_bytes(format, num_frames=12, rate=10)
    for num_frames, fps, seconds in ((12, None, 0.1), (3, None, 1.1 / 2), (2, None, 1.1), (None, 2.5, 0.4)):
        medium = await decoder.decode(data, kind="video", num_frames=num_frames, fps=fps)
        assert medium.seconds_per_frame == pytest.approx(seconds, abs=2e-3), (num_frames, fps)
    repeated = await decoder.decode(data, kind="video", num_frames=23, fps=None)
    assert repeated.seconds_per_frame == pytest.approx(0.05, abs=2e-3)
    assert levels(repeated.frames)[:4] == [0, 1, 1, 2]


@pytest.mark.anyio
async def test_a_single_frame_has_no_time_to_the_next(decoder):
    for data, num_frames in ((video_bytes("mp4"), 1), (video_bytes("mp4", num_frames=1), 4)):
        medium = await decoder.decode(data, kind="video", num_frames=num_frames, fps=None)
        assert medium.seconds_per_frame is None


@pytest.mark.anyio
async def test_an_animation_has_time_as_well(decoder):
    medium = await decoder.decode(endless_gif(8), kind="video", num_frames=4, fps=None)
    assert medium.seconds_per_frame == pytest.approx(0.7 / 3, abs=2e-3)


@pytest.mark.anyio
async def test_a_file_that_is_too_narrow_is_a_clear_error(decoder):
    with pytest.raises(BadRequest, match="differ too much"):
        await decoder.decode(encoded(picture(2000, 9), "PNG"), kind="image", num_frames=None, fps=None)


@pytest.mark.parametrize(
    ("kind", "shape", "seconds"),
    [
        ("image", (1, 48, 50, 3), None),  # no multiple
        ("image", (1, 160, 160, 3), None),  # too large
        ("image", (2, 48, 48, 3), None),
        ("image", (1, 48, 48, 3), 0.5),
        ("video", (12, 96, 96, 3), 0.5),  # too large for so many
        ("video", (2, 48, 48, 3), 0.0),
        ("video", (2, 48, 48, 3), -1.0),
        ("video", (2, 48, 48, 3), 601.0),
        ("video", (2, 48, 48, 3), float("nan")),
    ],
)
def test_nothing_that_a_child_says_is_believed(kind, shape, seconds):
    decoder = MediaDecoder(MediaLimits(), BY_AREA, workers=1)
    payload = np.zeros(int(np.prod(shape)), np.uint8)
    with pytest.raises(ChildGone):
        decoder._medium(kind, wire.Decoded(shape, seconds), payload)
    sane = decoder._medium("video", wire.Decoded((2, 48, 48, 3), 0.5), np.zeros(2 * 48 * 48 * 3, np.uint8))
    assert sane.seconds_per_frame == 0.5


def test_a_child_cannot_have_more_memory_taken_than_frames_may_have():
    """Its answer's length is believed before anything of it has come: fifty million pixels each would be gigabytes."""
    unit = 28**2
    image, video = Area(28, 4 * unit, 16384 * unit), Area(28, 128 * unit, 768 * unit, all_frames=6635 * unit)  # Qwen's
    geometry = dataclasses.replace(BY_AREA, image=image, video=video)
    decoder = MediaDecoder(MediaLimits(max_frames=32), geometry, workers=1)

    def most(kind: Kind, num_frames: int | None = None, fps: float | None = None) -> int:
        return decoder._max_reply(wire.Job(kind, "PNG" if kind == "image" else "MP4", num_frames, fps))

    assert max(most("image"), most("video", fps=1.0)) < 64 << 20
    rng = np.random.default_rng(0)
    for _ in range(2000):
        short, ratio = rng.integers(8, 9000), np.exp(rng.uniform(0, np.log(Area.MAX_RATIO)))
        height, width = rng.permutation([int(short), int(short * ratio)])
        count = int(rng.integers(1, 33))
        assert 3 * np.prod(image.fitted(height, width)) <= most("image")
        sent = 3 * count * np.prod(video.fitted(height, width, count))
        assert sent <= most("video", count) <= most("video", fps=1.0)
