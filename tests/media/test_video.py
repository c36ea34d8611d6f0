"""Which frames are taken from a video, and that they are the right ones."""

from __future__ import annotations

import contextlib
import io
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from model.request import Geometry
from service.errors import BadRequest, TooLarge, UnsupportedMedia
from service.media import MediaDecoder
from service.media.clip import Clip, PacketInfo
from service.media.container import Truncated, check_complete
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.resize import resize_to_geometry
from service.media.sampling import Timeline, at_rate, spread
from service.media.sniff import Format
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.samples import (
    SQUARE,
    VIDEO_FORMATS,
    encoded,
    endless_gif,
    image_bytes,
    level,
    levels,
    shown_by,
    video_bytes,
)

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
    expected = np.stack([resize_to_geometry(frame, decoder.geometry) for frame in frames])
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
    expected = resize_to_geometry(Image.fromarray(shown), decoder.geometry)
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
    check_complete(data, format, MediaLimits())
    with pytest.raises(Truncated):
        check_complete(data[: int(len(data) * 0.9)], format, MediaLimits())
    for length in range(0, len(data), 7):  # never anything but sound, or Truncated
        with contextlib.suppress(Truncated):
            check_complete(data[:length], format, MediaLimits())


@pytest.mark.parametrize("box", [b"wide", b"free", b"skip", b"mdat", b"moov"])
async def test_quicktime_needs_no_ftyp(decoder, box):
    """Old cameras begin with what is to be skipped, with the frames or with their description."""
    data = video_bytes("mp4")
    size = int.from_bytes(data[:4], "big")
    assert data[4:8] == b"ftyp"
    if box == b"moov":
        start = data.index(b"moov") - 4
        data = shifted(data[start:] + data[:start], len(data) - start)
    elif box == b"mdat":
        start = data.index(b"mdat") - 4
        data = shifted(data[start:], -start)
    else:
        data = struct.pack(">I", size) + box + data[8:]
    assert data[4:8] == box
    medium = await decoder.decode(data, kind=None, num_frames=3, fps=None)
    assert (medium.kind, levels(medium.frames)) == ("video", [0, 6, 11])


def shifted(data: bytes, by: int) -> bytes:
    """An MP4 whose frames lie elsewhere in the file than they did."""
    at = data.index(b"stco") + 8
    (count,) = struct.unpack_from(">I", data, at)
    offsets = struct.unpack_from(f">{count}I", data, at + 4)
    moved = struct.pack(f">{count}I", *(offset + by for offset in offsets))
    return data[: at + 4] + moved + data[at + 4 + len(moved) :]


def partly_clear(number: int) -> Image.Image:
    """A grey square, at another place in each frame, on nothing."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((level(number), 0, 0, 255), (4 * number, 8, 4 * number + 16, 24))
    return image


ANIMATED: dict[str, dict[str, Any]] = {
    "GIF": {"disposal": 2},
    "WEBP": {"lossless": True},
    "PNG": {"disposal": 1},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("format", ANIMATED)
async def test_animated_pictures_may_be_sent_as_a_video(format):
    pictures = [partly_clear(number) for number in range(6)]
    data = encoded(
        pictures[0],
        format,
        save_all=True,
        append_images=pictures[1:],
        duration=[100, 100, 300, 100, 100, 100],
        loop=0,
        **ANIMATED[format],
    )
    whole = Geometry(exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=4)
    decoder = MediaDecoder(MediaLimits(), whole, workers=1)
    await decoder.start()
    try:
        medium = await decoder.decode(data, kind="video", num_frames=6, fps=None)
        for number, frame in enumerate(medium.frames):
            canvas = Image.new("RGBA", (40, 40), "white")
            canvas.alpha_composite(pictures[number])
            most = 3 if format == "AVIF" else 0  # converts colours
            assert np.abs(frame.astype(int) - np.asarray(canvas.convert("RGB"))).max() <= most, number
        by_time = await decoder.decode(data, kind="video", num_frames=None, fps=5.0)  # at 0, 0.2, 0.4, 0.6 seconds
        assert (by_time.frames == medium.frames[[0, 2, 2, 4]][[0, 1, 3]]).all()
        assert (await decoder.decode(data, kind=None, num_frames=None, fps=None)).kind == "image"
        assert (await decoder.decode(data, kind="image", num_frames=None, fps=None)).frames.shape == (1, 40, 40, 3)
        still = encoded(pictures[1], format)
        if format != "GIF":
            with pytest.raises(UnsupportedMedia, match="sent as video"):
                await decoder.decode(still, kind="video", num_frames=1, fps=None)
    finally:
        await decoder.close()


def titled(format: str, where: str, title: bytes) -> bytes:
    """A video whose file, track or sound track has a title of 8 bytes."""
    name, file = "handler_name" if format in ("mp4", "mov") and where != "file" else "title", io.BytesIO()
    with (
        av.open(io.BytesIO(video_bytes(format if format in VIDEO_FORMATS else "mp4")), "r") as source,
        av.open(file, "w", format=format) as target,
    ):
        track: Any = target.add_stream_from_template(source.streams.video[0], opaque=True)
        codec = {"webm": "libopus", "avi": "pcm_s16le"}.get(format, "aac")
        sound: Any = target.add_stream(codec, rate=48000, layout="mono")
        {"file": target, "track": track, "sound": sound}[where].metadata[name] = "TTTTTTTT"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = track
                target.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.int16), format="s16", layout="mono")
        silence.sample_rate = 48000
        target.mux(sound.encode(silence) + sound.encode())
    data = file.getvalue()
    assert b"TTTTTTTT" in data
    return data.replace(b"TTTTTTTT", title)


@pytest.mark.parametrize("where", ["file", "track", "sound"])
@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "webm", "avi"])
async def test_titles_may_be_in_any_encoding(decoder, format, where):
    for title in (
        "Caf\xe9 1\xb0!".encode("latin-1"),
        "Привет!!".encode("cp1251"),
        "動画動画".encode("shift-jis"),
        b"\xff" * 8,
    ):
        medium = await decoder.decode(titled(format, where, title), kind="video", num_frames=3, fps=None)
        assert levels(medium.frames) == [0, 6, 11], title


def sound(format: str, codec: str, *, cover: bool) -> bytes:
    """Half a second of silence, with a picture of an album."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=48000, layout="mono")
        if cover and format == "matroska":
            container.add_attachment("cover.jpg", "image/jpeg", image_bytes("JPEG"))
        elif cover:
            picture: Any = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            gray = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, dtype=np.uint8), format="rgb24")
            container.start_encoding()
            container.mux(picture.encode(gray) + picture.encode())
        for start in range(0, 24000, 960):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "codec", "cover"),
    [
        ("mp4", "aac", False),
        ("mp4", "aac", True),
        ("matroska", "libopus", True),
        ("webm", "libopus", False),
        ("matroska", "aac", False),
    ],
)
async def test_sound_is_not_a_video_and_its_cover_neither(decoder, format, codec, cover):
    with pytest.raises(BadRequest, match="has no video") as error:
        await decoder.decode(sound(format, codec, cover=cover), kind="video", num_frames=1, fps=None)
    assert error.value.code == "no_video"


async def test_a_track_header_of_version_1_turns_too(decoder):
    """Its times are of 64 bits, so the matrix lies 12 bytes further on."""
    data = shown_by(video_bytes("mp4", (64, 64), num_frames=1, noise=True), 0, 1, -1, 0)
    at = data.index(b"tkhd") + 4
    old = data[at : at + 84 - 4]
    times = old[4:24]
    new = (
        b"\x01"
        + old[1:4]
        + b"".join(bytes(4) + times[:4] for _ in range(1))
        + bytes(4)
        + times[4:8]
        + times[8:16]
        + bytes(4)
        + times[16:20]
        + old[24:]
    )
    grown = data.replace(old, new)
    for box in (b"tkhd", b"trak", b"moov"):
        place = grown.index(box) - 4
        (size,) = struct.unpack_from(">I", grown, place)
        grown = grown[:place] + struct.pack(">I", size + 12) + grown[place + 4 :]
    first = await decoder.decode(data, kind="video", num_frames=1, fps=None)
    second = await decoder.decode(grown, kind="video", num_frames=1, fps=None)
    assert (first.frames == second.frames).all()


def timeline(pts, dts=None, durations=None, unit=Fraction(1, 100)) -> Timeline:
    """Of a clip whose decoder gave these times."""
    clip = object.__new__(Clip)
    clip._unit, clip._limits = unit, MediaLimits()
    dts = [None] * len(pts) if dts is None else dts
    durations = [0] * len(pts) if durations is None else durations
    return clip._timeline([PacketInfo(*times, False, False) for times in zip(pts, dts, durations, strict=True)])


@pytest.mark.parametrize(
    ("pts", "dts", "starts"),
    [
        ([5, 9, 13], None, [0, 4, 8]),
        ([0, 4, None, 12, 16], None, [0, 4, 8, 12, 16]),
        ([0, 4, 4, 8], None, [0, 4, 8, 12]),
        ([0, 4, 8, -100, -96], None, [0, 4, 8, 12, 16]),
        ([0, 4, 8, 2**40, 2**40 + 4], None, [0, 4, 8, 12, 16]),
        ([1, 4, 3, 5, 2], [10, 12, 14, 16, 18], [0, 2, 4, 6, 8]),
        ([None, None, None], None, [0, 4, 8]),
        ([-(2**62), 2**62, 0], None, [0, 4, 8]),
        ([7], None, [0]),
    ],
    ids=str,
)
def test_times_that_cannot_be_are_replaced_as_players_do(pts, dts, starts):
    found = timeline(pts, dts)
    assert found.starts.tolist() == pytest.approx([tick / 100 for tick in starts])
    assert found.end > found.starts[-1]


def test_times_are_finite_and_ascend_whatever_the_file_says():
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = [int(rng.integers(-50, 50)), None, int(rng.integers(-(2**63), 2**63 - 1)), 0]
        pts, dts = ([values[rng.integers(4)] for _ in range(20)] for _ in range(2))
        found = timeline(pts, dts, [int(rng.integers(-(2**63), 2**63 - 1)) for _ in range(20)])
        assert np.isfinite(found.starts).all()
        assert (np.diff(found.starts) > 0).all()
        assert found.starts[-1] < found.end < 600


def test_the_last_frame_is_shown_as_long_as_it_says_if_that_can_be():
    assert timeline([0, 4, 8], durations=[0, 0, 100]).end == pytest.approx(1.08)
    assert timeline([0, 4, 8], durations=[4, 4, 2**60]).end == pytest.approx(0.12)
    assert timeline([0, 4, 8], durations=[4, 4, 0]).end == pytest.approx(0.12)
    whole = timeline(range(0, 60_000, 4))
    assert whole.end == 600.0, "ten minutes are ten minutes, to the last bit"


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (b"\0\0\0\x08free" * 1001, "MP4"),
        (b"\0\0\x1f\x48moov" + b"\0\0\0\x08trak" * 1000, "MP4"),
        (b"".join(struct.pack(">I4s", 8 * (2000 - depth), b"moov") for depth in range(2000)), "MP4"),
        (b"\x1a\x45\xdf\xa3\x80" + b"\xec\x80" * 1000, "WEBM"),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\xec\x80" * 1000, "WEBM"),
    ],
    ids=["flat", "wide", "deep", "ebml", "segment"],
)
def test_containers_of_more_parts_than_allowed_are_refused_unread(data, format):
    with pytest.raises(Refusal, match="too_many_elements"):
        check_complete(data, format, MediaLimits(max_elements=1000))


async def test_a_video_that_takes_too_long_costs_no_child():
    decoder = MediaDecoder(MediaLimits(cpu_seconds=1), SQUARE, workers=1)
    await decoder.start()
    try:
        children = decoder.stats.children
        with pytest.raises(BadRequest, match="longer to decode") as error:
            await decoder.decode(endless_gif(3000, 3000), kind="video", num_frames=3, fps=None)
        assert error.value.code == "too_much_work"
        assert decoder.stats.children == children
    finally:
        await decoder.close()


async def test_a_gif_of_more_frames_than_a_file_may_hold(decoder):
    with pytest.raises(TooLarge, match="more than the 36000 frames"):
        await decoder.decode(endless_gif(36_001, 8), kind="video", num_frames=1, fps=None)


async def test_more_pixels_than_can_be_decoded_in_time_are_refused_before_that():
    """A clip of one keyframe: for its last frame all must be decoded, for its first only that one."""
    limits = MediaLimits(max_decoded_pixels=11 * 48 * 32)
    files: tuple[tuple[str, Format], ...] = (("mp4", "MP4"), ("webm", "WEBM"))
    for name, format in files:
        data = video_bytes(name)
        for job, refused in ((Job("video", format, 1), False), (Job("video", format, 2), True)):
            with pytest.raises(Refusal, match="too_much_work") if refused else contextlib.nullcontext():
                decode_video(data, job, limits=limits, geometry=SQUARE)
    with pytest.raises(Refusal, match="too_much_work"):
        decode_video(endless_gif(1800, 3000), Job("video", "GIF", 2), limits=MediaLimits(), geometry=SQUARE)
