"""Codecs times containers times what makes a file odd: every frame taken is the one that a player shows then.

Each of 250 frames carries its number in its pixels. What is right says PyAV, by decoding the shown track in order and
keeping what comes out; the pixels must be the same to the bit, whether pictures are looked up by keyframes or not.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
import struct
import subprocess
from functools import cache
from typing import Any

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from model.request import Geometry
from service.media import MediaDecoder, clip
from service.media.limits import MediaLimits
from service.media.sniff import sniff
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.samples import shown_by

NUM_FRAMES, RATE, SIDE = 250, 25, 64
AS_SENT = Geometry(exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=4)
LIMITS = MediaLimits(max_frames=NUM_FRAMES)
SAMPLINGS = [(3, None), (6, None), (16, None), (32, None), (None, 1.0), (None, 2.0), (None, 5.0)]

X265 = "log-level=none:pools=1:frame-threads=1:"
# Of each codec, ways to arrange its frames: name -> encoder, options.
ENCODINGS: dict[str, tuple[str, dict[str, str]]] = {
    "h264 no B": ("libx264", {"g": "25", "bf": "0"}),
    "h264 closed": ("libx264", {"x264-params": "keyint=25:bframes=3:b-adapt=0:b-pyramid=normal"}),
    "h264 open": ("libx264", {"x264-params": "open-gop=1:keyint=25:bframes=3:b-adapt=0"}),
    "h264 one keyframe": ("libx264", {"g": "250", "bf": "2"}),
    "h264 refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}),
    "hevc no B": ("libx265", {"x265-params": X265 + "keyint=25:min-keyint=25:bframes=0"}),
    "hevc closed": ("libx265", {"x265-params": X265 + "keyint=25:min-keyint=25:open-gop=0:bframes=3:b-adapt=0"}),
    "hevc open": ("libx265", {"x265-params": X265 + "keyint=25:min-keyint=25:bframes=4:b-adapt=0"}),
    "mpeg4 no B": ("mpeg4", {"g": "12", "qmin": "2", "qmax": "4"}),
    "mpeg4 B": ("mpeg4", {"g": "12", "bf": "2", "qmin": "2", "qmax": "4"}),
    "mpeg2 no B": ("mpeg2video", {"g": "12", "qmin": "2", "qmax": "4"}),
    "mpeg2 open": ("mpeg2video", {"g": "12", "bf": "2", "qmin": "2", "qmax": "4"}),
    "mpeg2 closed": (
        "mpeg2video",
        {"g": "12", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000", "qmin": "2", "qmax": "4"},
    ),
    "vp8": ("libvpx", {"g": "25", "deadline": "realtime", "cpu-used": "8", "b": "500k"}),
    "vp8 hidden": ("libvpx", {"g": "50", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "500k"}),
    "vp9": ("libvpx-vp9", {"g": "25", "deadline": "realtime", "cpu-used": "8", "b": "500k"}),
    "vp9 hidden": ("libvpx-vp9", {"g": "50", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "500k"}),
    "av1": ("libsvtav1", {"g": "25", "preset": "12", "crf": "30"}),
    "mjpeg": ("mjpeg", {"qmin": "2", "qmax": "4"}),
}
# Name -> muxer, its options, whether it can go back to fill in what it knows only at the end.
CONTAINERS: dict[str, tuple[str, dict[str, str], bool]] = {
    "mp4": ("mp4", {}, True),
    "mov": ("mov", {}, True),
    "mkv": ("matroska", {}, True),
    "webm": ("webm", {}, True),
    "avi": ("avi", {}, True),
    "ts": ("mpegts", {}, True),
    "m2ts": ("mpegts", {"mpegts_m2ts_mode": "1"}, True),
    "fragmented": ("mp4", {"movflags": "frag_keyframe+empty_moov"}, True),
    "piped mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov"}, False),
    "piped mkv": ("matroska", {}, False),
    "piped webm": ("webm", {}, False),
    "piped avi": ("avi", {}, False),
}
WHERE = {
    "h264": ("mp4", "mov", "matroska", "avi", "mpegts"),
    "hevc": ("mp4", "mov", "matroska", "mpegts"),
    "mpeg4": ("mp4", "mov", "matroska", "avi"),
    "mpeg2": ("mp4", "mov", "matroska", "avi", "mpegts"),
    "vp8": ("matroska", "webm", "avi"),
    "vp9": ("mp4", "matroska", "webm"),
    "av1": ("mp4", "matroska", "webm"),
    "mjpeg": ("mp4", "mov", "matroska", "avi"),
}
ODD = ("plain", "variable rate", "edit list", "turned", "mirrored", "two tracks", "cover", "late start")


def barcode(number: int, flip: bool = False) -> np.ndarray:
    """(SIDE, SIDE, 3): the bits of a number from 0 to 255 as bright and dark bars, each beside its opposite."""
    bits = [number >> bit & 1 for bit in range(8)]
    rows = np.array([[bit, 1 - bit] for bit in bits], dtype=np.uint8) ^ flip
    return np.repeat((32 + 192 * np.kron(rows, np.ones((SIDE // 8, SIDE // 2), dtype=np.uint8)))[..., None], 3, axis=2)


def number_of(pixels: np.ndarray) -> int:
    """The number in an upright frame, from the middle of each bar; -1 where it is none of ours."""
    left, right = pixels[SIDE // 16 :: SIDE // 8, SIDE // 4 :: SIDE // 2, 1].astype(int).T
    bits = left > right
    return int(bits @ (1 << np.arange(8))) if (abs(left - right) > 60).all() else -1


@cache
def encoded(encoding: str, uneven: bool = False, flip: bool = False) -> bytes:
    """All frames of one codec in a Matroska file, out of which they are copied into the others."""
    codec, options = ENCODINGS[encoding]
    speed = {"libx264": {"preset": "ultrafast", "refs": "2"}, "libx265": {"preset": "ultrafast"}}.get(codec, {})
    steps = np.random.default_rng(0).choice([1, 1, 1, 2, 7], NUM_FRAMES) if uneven else np.ones(NUM_FRAMES, dtype=int)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=speed | options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for number, time in enumerate(np.cumsum(steps) - 1):
            frame = av.VideoFrame.from_ndarray(barcode(number, flip), format="rgb24")
            frame.pts = int(time)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def exists(encoding: str, container: str, odd: str) -> bool:
    """Whether there is such a combination; what does not depend on how frames are arranged is tried on one encoding
    of each codec, and what does not depend on being piped only on files."""
    codec = encoding.split()[0]
    format = CONTAINERS[container][0]
    if format not in WHERE[codec]:
        return False
    if odd == "plain":
        return True
    if encoding not in ("h264 open", "hevc open", "mpeg4 B", "mpeg2 open", "vp8 hidden", "vp9 hidden", "av1", "mjpeg"):
        return False
    if container.startswith("piped") and odd != "variable rate":
        return False
    if (codec, odd) in (("vp8", "turned"), ("vp8", "mirrored")) or (format, odd) == ("webm", "cover"):
        return False  # there is no MP4 to copy it from; no JPEG in there
    if odd == "edit list":
        return container in ("mp4", "mov")
    if format == "mpegts":
        return odd in ("late start", "variable rate")  # as AVI
    return odd == "late start" if format == "avi" else True  # has one rate, does not turn, and has no default track


def muxed(encoding: str, container: str, odd: str) -> bytes:
    """One file of the grid."""
    format, options, seekable = CONTAINERS[container]
    in_mp4 = container in ("mp4", "mov")
    if odd in ("turned", "mirrored") and not in_mp4:
        source = muxed(encoding, "mov" if "mov" in WHERE[encoding.split()[0]] else "mp4", odd)  # and copied from there
    else:
        source = encoded(encoding, uneven=odd == "variable rate")
    sources = [source]
    if odd == "two tracks":
        sources.insert(0, encoded("mpeg4 no B" if format != "webm" else "vp8", flip=True))  # first, and not to be shown
    target = io.BytesIO()
    sink: Any = target if seekable else type("Pipe", (), {"write": target.write})()
    with av.open(sink, "w", format=format, options=options) as output:
        copy(output, sources, cover=odd == "cover", late=odd == "late start")
    data = target.getvalue()
    if odd == "edit list":
        return trimmed(data)
    if odd in ("turned", "mirrored") and in_mp4:
        return shown_by(data, *((0, 1, -1, 0) if odd == "turned" else (-1, 0, 0, 1)))
    return data


def copy(output: Any, sources: list[bytes], *, cover: bool, late: bool) -> None:
    """Copy the packets of each source's only track; the last is the default one."""
    inputs: list[Any] = [av.open(io.BytesIO(source), "r") for source in sources]
    tracks = [output.add_stream_from_template(each.streams.video[0], opaque=True) for each in inputs]
    for track in tracks[:-1]:
        track.disposition = Disposition(0)
    tracks[-1].disposition = Disposition.default
    shown_track = inputs[-1].streams.video[0]
    annexb = output.format.name == "avi" and shown_track.codec.name == "h264"
    to_annexb = BitStreamFilterContext("h264_mp4toannexb" if annexb else "null", shown_track)
    if cover:
        picture = output.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 96
        picture.pix_fmt = "yuvj420p"
        picture.disposition = Disposition.attached_pic
    packets = itertools.chain(
        *(zip(itertools.repeat(track), each.demux(video=0)) for track, each in zip(tracks, inputs, strict=True))
    )
    if cover:
        gray = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 99, dtype=np.uint8), format="rgb24")
        output.mux(picture.encode(gray) + picture.encode())
    for track, packet in sorted(
        ((track, packet) for track, packet in packets if packet.size),
        key=lambda pair: float((pair[1].dts if pair[1].dts is not None else -1) * pair[1].time_base),
    ):
        if late:
            shift = int(3 / packet.time_base)
            packet.pts += shift
            packet.dts = None if packet.dts is None else packet.dts + shift
        for ready in to_annexb.filter(packet) if annexb and track is tracks[-1] else (packet,):
            ready.stream = track
            output.mux(ready)
    for each in inputs:
        each.close()


def trimmed(data: bytes) -> bytes:
    """An MP4 of which an edit list shows from 3.4 s to 8.2 s."""
    edited = bytearray(data)
    at, mdhd, mvhd = data.index(b"elst") + 12, data.index(b"mdhd") + 16, data.index(b"mvhd") + 16
    (track_scale,), (movie_scale,) = struct.unpack_from(">I", data, mdhd), struct.unpack_from(">I", data, mvhd)
    (start,) = struct.unpack_from(">I", data, at + 4)
    struct.pack_into(">II", edited, at, round(4.8 * movie_scale), start + round(3.4 * track_scale))
    return bytes(edited)


Shown = list[tuple[float, float, np.ndarray]]


def shown(data: bytes) -> Shown:
    """What a player shows: (from this second, to that one, upright pixels), by decoding the default track in order."""
    frames: list[tuple[int | None, int, np.ndarray]] = []
    container: Any
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            pixels = frame.to_ndarray(format="rgb24", threads=1)
            if frame.side_data.get("DISPLAYMATRIX") is not None:
                turned = frame.rotation % 360 == 270
                pixels = np.rot90(pixels, 3) if turned else pixels[:, ::-1]
            frames.append((frame.pts, frame.duration, pixels))
        unit = float(stream.time_base)
    ticks: list[Any] = [pts for pts, _, _ in frames]
    if any(b is None or a is None or b <= a for a, b in itertools.pairwise(ticks)):  # a container without them
        ticks = [round(index / RATE / unit) for index in range(len(frames))]
    starts = [(tick - ticks[0]) * unit for tick in ticks]
    ends = [*starts[1:], starts[-1] + (frames[-1][1] * unit or 1 / RATE)]
    return [(start, end, pixels) for start, end, (_, _, pixels) in zip(starts, ends, frames, strict=True)]


def expected(frames: Shown, num_frames: int | None, fps: float | None) -> list[int]:
    if num_frames is not None:
        return [int(index + 0.5) for index in np.linspace(0, len(frames) - 1, num_frames) + 1e-9]
    assert fps is not None
    times, end = np.array([start for start, _, _ in frames]), frames[-1][1]
    asked = np.arange(0, 1000) / fps
    return sorted({int(np.searchsorted(times, time + 1e-3, "right")) - 1 for time in asked[asked < end - 1e-3]})


def as_encoded(pixels: np.ndarray, odd: str) -> np.ndarray:
    return np.rot90(pixels) if odd == "turned" else pixels[:, ::-1] if odd == "mirrored" else pixels


def check(data: bytes, odd: str = "plain", samplings: list[tuple[int | None, float | None]] = SAMPLINGS) -> None:
    format = sniff(data)
    assert format is not None
    frames = shown(data)
    numbers = [number_of(as_encoded(pixels, odd)) for _, _, pixels in frames]
    assert -1 not in numbers
    if odd != "cut":
        assert numbers == list(range(85, 205) if odd == "edit list" else range(NUM_FRAMES)), "the file itself is odd"
    for (num_frames, fps), saving in itertools.chain(
        zip(samplings, itertools.repeat(clip.SEEK_SAVING)), zip(samplings[1::3], itertools.repeat(0))
    ):
        wanted = expected(frames, num_frames, fps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip, "SEEK_SAVING", saving)  # 0: by keyframes wherever the packets allow it
            pixels = decode_video(data, Job("video", format, num_frames, fps), limits=LIMITS, geometry=AS_SENT).pixels
        where = (num_frames, fps, saving)
        same = [np.array_equal(frame, frames[index][2]) for frame, index in zip(pixels, wanted, strict=True)]
        if not all(same):
            found = [number_of(as_encoded(frame, odd)) for frame in pixels]
            raise AssertionError(f"{where}: {found}, not {[numbers[index] for index in wanted]}; the same: {same}")


FILES = [
    (encoding, container, odd)
    for encoding, container, odd in itertools.product(ENCODINGS, CONTAINERS, ODD)
    if exists(encoding, container, odd)
]
QUICK = [
    ("h264 closed", "avi", "plain"),
    ("h264 open", "piped avi", "plain"),
    ("h264 one keyframe", "avi", "plain"),
    ("h264 open", "avi", "late start"),
    ("h264 open", "mp4", "edit list"),
    ("hevc closed", "mp4", "plain"),
    ("hevc open", "mkv", "two tracks"),
    ("mpeg4 B", "avi", "plain"),
    ("mpeg2 open", "mkv", "variable rate"),
    ("vp8 hidden", "piped webm", "plain"),
    ("h264 refresh", "fragmented", "turned"),
    ("vp9", "mkv", "mirrored"),
    ("mjpeg", "piped avi", "plain"),
    ("h264 open", "ts", "variable rate"),
    ("hevc open", "m2ts", "late start"),
]


@pytest.mark.parametrize(("encoding", "container", "odd"), QUICK)
def test_some_of_the_grid(encoding, container, odd):
    check(muxed(encoding, container, odd), odd, [(6, None), (None, 2.0)])


@pytest.fixture(scope="module")
async def child():
    decoder = MediaDecoder(LIMITS, AS_SENT, workers=1)
    await decoder.start()
    yield decoder
    await decoder.close()


@pytest.mark.anyio
@pytest.mark.parametrize(("encoding", "container", "odd"), QUICK)
async def test_a_confined_child_reads_them_too(child, encoding, container, odd):
    """It can open no file, so nothing may be imported late, whatever is odd about a video."""
    data = muxed(encoding, container, odd)
    format = sniff(data)
    assert format is not None
    for num_frames, fps in ((6, None), (None, 2.0)):
        medium = await child.decode(data, kind="video", num_frames=num_frames, fps=fps)
        pixels = decode_video(data, Job("video", format, num_frames, fps), limits=LIMITS, geometry=AS_SENT).pixels
        assert np.array_equal(medium.frames, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_frame_taken_is_the_one_that_is_shown(encoding):
    files = [(container, odd) for each, container, odd in FILES if each == encoding]
    assert len(files) >= 5
    for container, odd in files:
        try:
            check(muxed(encoding, container, odd), odd)
        except Exception as error:
            raise AssertionError(f"{encoding} in {container}, {odd}: {error}") from error


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("encoding", ["h264 closed", "h264 open", "hevc open", "mpeg4 B", "vp9 hidden"])
def test_what_ffmpeg_cuts_without_encoding_it_again(encoding, tmp_path):
    """`ffmpeg -ss ... -c copy`: an edit list, or frames that cannot be decoded at the start."""
    (tmp_path / "whole.mkv").write_bytes(encoded(encoding))
    for name in ("cut.mp4", "cut.mkv") if encoding == "vp9 hidden" else ("cut.mp4", "cut.mov", "cut.mkv"):
        command = ["ffmpeg", "-v", "error", "-y", "-ss", "3.37", "-t", "4", "-i", "whole.mkv", "-c", "copy", name]
        subprocess.run(command, cwd=tmp_path, check=True)
        check((tmp_path / name).read_bytes(), "cut")
    command = ["ffmpeg", "-v", "error", "-i", "cut.mp4", "-c", "copy", "-f", "matroska", "-"]
    check(subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout, "cut")


def cut_at_a_keyframe(encoding: str) -> bytes:
    """From the second keyframe on; what was decoded after it and shown before it comes along."""
    file = io.BytesIO()
    with av.open(io.BytesIO(encoded(encoding)), "r") as source, av.open(file, "w", format="matroska") as target:
        track = source.streams.video[0]
        copy: Any = target.add_stream_from_template(track, opaque=True)
        num_keyframes = 0
        for packet in source.demux(track):
            num_keyframes += packet.is_keyframe
            if num_keyframes > 1 and packet.size:
                packet.stream = copy
                target.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    "encoding", ["h264 closed", "h264 open", "hevc closed", "hevc open", "mpeg2 open", "vp8 hidden"]
)
@pytest.mark.parametrize("cut", [False, True])
def test_few_frames_are_looked_up_without_decoding_the_rest(encoding, cut, monkeypatch):
    """Even where the first pictures cannot be decoded, or some are never shown."""

    def in_order(*_: object) -> None:
        raise AssertionError("decoded from the first packet to the last")

    data = cut_at_a_keyframe(encoding) if cut else encoded(encoding)
    frames = shown(data)
    monkeypatch.setattr(clip.Clip, "_take_in_order", in_order)
    pixels = decode_video(data, Job("video", "WEBM", 3), limits=LIMITS, geometry=AS_SENT).pixels
    wanted = expected(frames, 3, None)
    assert [number_of(frame) for frame in pixels] == [number_of(frames[index][2]) for index in wanted]


@pytest.mark.parametrize("encoding", ["hevc open", "mpeg4 no B", "mpeg4 B", "mpeg2 no B", "mpeg2 open"])
def test_keyframes_that_are_none_are_noticed(encoding):
    """Some writers mark every packet; decoding from such a place gives a picture all the same, of something else."""
    file = io.BytesIO()
    with av.open(io.BytesIO(encoded(encoding)), "r") as source, av.open(file, "w", format="mp4") as target:
        track = source.streams.video[0]
        copy: Any = target.add_stream_from_template(track, opaque=True)
        for packet in source.demux(track):
            if packet.size:
                packet.is_keyframe, packet.stream = True, copy
                target.mux(packet)
    check(file.getvalue(), samplings=[(3, None), (6, None), (None, 1.0)])


@pytest.mark.parametrize("encoding", ["vp8 hidden", "h264 closed", "hevc open"])
def test_packets_that_announce_too_much_are_not_believed(encoding, monkeypatch):
    """Packets of which no picture comes, and nobody knows before they are decoded."""
    data = encoded(encoding)
    if encoding != "vp8 hidden":
        announced = clip.Clip._read_packets

        def with_one_more(self: clip.Clip, *where: Any) -> list[clip.PacketInfo]:
            first, *rest = announced(self, *where)
            return [
                first,
                dataclasses.replace(first, pts=(first.pts or 0) + 1, keyframe=False, hidden=False),
                *rest[:-1],
            ]

        monkeypatch.setattr(clip.Clip, "_read_packets", with_one_more)
    monkeypatch.setattr(clip, "_is_hidden", lambda *_: False)
    check(data, samplings=[(3, None), (6, None), (None, 1.0)])
