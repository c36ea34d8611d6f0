"""Clips as phones, cameras and screen recorders write them: deep colours, odd sizes, few frames."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from model.request import Geometry
from service.media import MediaDecoder
from service.media.limits import MediaLimits
from service.media.sniff import sniff
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.samples import encoded, level, levels, video_bytes

pytestmark = pytest.mark.anyio

AS_SENT = Geometry(exact=None, shortest_edge=None, crop=None, resample=3, default_num_frames=4)
X265 = {"x265-params": "log-level=none:pools=1:frame-threads=1:keyint=5:min-keyint=5:bframes=2"}
HDR = {"color_trc": "smpte2084", "color_primaries": "bt2020", "colorspace": "bt2020nc"}
# Codec, container, pixel format, options, size.
KINDS: list[tuple[str, str, str, dict[str, str], tuple[int, int]]] = [
    ("libx265", "mp4", "yuv420p10le", X265, (64, 48)),
    ("libx265", "mov", "yuv444p12le", X265, (63, 49)),
    ("libx265", "matroska", "yuv420p10le", X265 | HDR, (64, 48)),
    ("libx265", "mpegts", "yuv420p", X265, (64, 48)),
    ("libx264", "mp4", "yuv422p10le", {"bf": "2", "g": "5"}, (64, 48)),
    ("libx264", "mp4", "yuv444p", {"bf": "2", "g": "5"}, (63, 49)),
    ("libx264", "matroska", "gray", {"g": "5"}, (64, 48)),
    ("libvpx-vp9", "webm", "yuv444p", {"deadline": "realtime", "cpu-used": "8"}, (63, 49)),
    ("libsvtav1", "mp4", "yuv420p10le", {"preset": "12"}, (64, 64)),
    ("prores_ks", "mov", "yuv422p10le", {}, (64, 48)),
    ("ffv1", "avi", "bgr0", {}, (63, 49)),
    ("qtrle", "mov", "rgb24", {}, (64, 48)),
]


def made(codec: str, container: str, pixel_format: str, options: dict[str, str], size: tuple[int, int]) -> bytes:
    """Ten frames, each a plain colour of its own."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=10, options=options)
        (stream.width, stream.height), stream.pix_fmt = size, pixel_format
        for number in range(10):
            pixels = np.full((size[1], size[0], 3), (level(number), 240 - level(number), 99), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind[:3])))
async def test_deep_and_odd_formats_are_read(decoder: MediaDecoder, kind: tuple[Any, ...]) -> None:
    """As FFmpeg shows them; a confined child reads them too."""
    data = made(*kind)
    format = sniff(data)
    assert format is not None
    container: Any
    with av.open(io.BytesIO(data)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(expected) == 10
    video = decode_video(data, Job("video", format, 4), limits=MediaLimits(), geometry=AS_SENT)
    for frame, number in zip(video.pixels, (0, 3, 6, 9), strict=True):
        assert np.array_equal(frame, expected[number])
        if kind[2] != "gray" and "colorspace" not in kind[3]:
            assert np.abs(frame[20, 20] - np.array((level(number), 240 - level(number), 99))).max() <= 12
    medium = await decoder.decode(data, kind="video", num_frames=4, fps=None)
    assert len(medium.frames) == 4


@pytest.mark.parametrize("number", [1, 2, 3, 5, 31])
@pytest.mark.parametrize("format", ["mp4", "webm", "avi", "gif"])
async def test_any_number_of_frames_may_be_wanted_of_any_clip(decoder: MediaDecoder, format: str, number: int) -> None:
    if format == "gif":
        pictures = [Image.new("RGB", (48, 32), (level(index),) * 3) for index in range(number)]
        data = encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=100)
    else:
        data = video_bytes(format, num_frames=number, rate=10)
    for num_frames in (1, 2, 3, 32):
        medium = await decoder.decode(data, kind="video", num_frames=num_frames, fps=None)
        last = (number - 1) % 12 if num_frames > 1 else 0
        assert len(medium.frames) == num_frames
        assert (levels(medium.frames[:1]), levels(medium.frames[-1:])) == ([0], [last])
    for fps, expected in ((0.01, 1), (2.0, (number + 4) // 5), (1000.0, number)):
        medium = await decoder.decode(data, kind="video", num_frames=None, fps=fps)
        assert len(medium.frames) == expected, fps
        assert medium.frame_times is not None
        assert list(medium.frame_times) == sorted(set(medium.frame_times))


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx", "ffv1"])
@pytest.mark.parametrize("container", ["webm", "matroska", "piped"])
async def test_transparent_videos_lie_on_white(decoder: MediaDecoder, codec: str, container: str) -> None:
    """As stickers and overlays are; a WebM has its transparency beside each frame."""
    if codec == "ffv1" and container == "webm":
        container = "matroska"
    file = io.BytesIO()
    target: Any = type("Pipe", (), {"write": file.write})() if container == "piped" else file
    options = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
    with av.open(target, "w", format="matroska" if container == "piped" else container) as output:
        stream: Any = output.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgra" if codec == "ffv1" else "yuva420p"
        for number in range(12):
            pixels = np.zeros((48, 64, 4), dtype=np.uint8)  # black and clear
            pixels[:, :32] = (level(number), level(number), level(number), 255)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        output.mux(stream.encode())
    data = file.getvalue()
    for num_frames, numbers in ((1, [0]), (4, [0, 4, 7, 11]), (12, range(12))):
        video = decode_video(data, Job("video", "WEBM", num_frames), limits=MediaLimits(), geometry=AS_SENT)
        for frame, number in zip(video.pixels, numbers, strict=True):
            assert frame[10:-10, 40:].min() >= 250
            assert abs(int(frame[24, 16].mean()) - level(number)) <= 8
    assert (await decoder.decode(data, kind="video", num_frames=2, fps=None)).frames.shape[0] == 2
