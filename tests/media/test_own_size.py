"""Pictures that keep their size: what a child may send of them, and what it may ask, is bounded all the same."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from typing import Any

import numpy as np
import pytest

from model.request import Geometry, Medium, VideoMetadata
from service.errors import BadRequest, EngineFailure
from service.media import MediaDecoder, MediaLimits, wire
from service.media.child_process import MAX_QUESTIONS, Child, ChildGone
from service.media.question import Question
from service.media.resize import within
from tests.media.samples import IMAGE_FORMATS, VIDEO_FORMATS, encoded, image_bytes, levels, picture, video_bytes

LIMITS = MediaLimits(max_pixels=5000, max_clip_pixels=9000, max_frames=4, max_video_seconds=60)
OWN_SIZE = Geometry(default_num_frames=3, samples_frames=True)
SOURCE = VideoMetadata(total_frames=20, fps=10.0, duration=2.0, width=40, height=30)
VIDEO_REPLY = wire.Decoded((3, 30, 40, 3), 0.5, (0.0, 0.5, 1.0), SOURCE)
IMAGE_REPLY = wire.Decoded((1, 30, 40, 3))


def medium(kind: Any, reply: wire.Decoded) -> Medium:
    decoder = MediaDecoder(LIMITS, OWN_SIZE, workers=1)
    return decoder._medium(kind, reply, np.zeros(int(np.prod(reply.shape)), np.uint8))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("image", {"shape": (1, 51, 99, 3)}),  # more pixels than may be sent
        ("image", {"shape": (2, 30, 40, 3)}),
        ("image", {"frame_times": (0.0,)}),
        ("image", {"source": SOURCE}),
        ("video", {"shape": (3, 50, 61, 3)}),  # more than all frames may have
        ("video", {"shape": (5, 3, 4, 3), "frame_times": None}),  # more frames than may be sampled
        ("video", {"frame_times": (0.0, 0.5)}),
        ("video", {"frame_times": (0.0, 1.0, 0.5)}),
        ("video", {"frame_times": (0.0, 0.5, 61.0)}),
        ("video", {"frame_times": (-1.0, 0.5, 1.0)}),
        ("video", {"seconds_per_frame": 61.0}),
        ("video", {"source": dataclasses.replace(SOURCE, total_frames=0)}),
        ("video", {"source": dataclasses.replace(SOURCE, total_frames=10**9)}),
        ("video", {"source": dataclasses.replace(SOURCE, fps=0.0)}),
        ("video", {"source": dataclasses.replace(SOURCE, duration=-1.0)}),
        ("video", {"source": dataclasses.replace(SOURCE, width=10**6)}),
    ],
)
def test_nothing_that_a_child_sends_is_believed(kind: str, change: dict[str, Any]) -> None:
    reply = VIDEO_REPLY if kind == "video" else IMAGE_REPLY
    fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
    assert medium(kind, reply).frames.shape == reply.shape
    with pytest.raises(ChildGone):
        medium(kind, wire.Decoded(**{**fields, **change}))


def test_the_largest_reply_is_that_of_all_frames_together() -> None:
    decoder = MediaDecoder(LIMITS, OWN_SIZE, workers=1)
    assert decoder._max_reply(wire.Job("image", "PNG")) == 3 * 5000
    for job in (wire.Job("video", "MP4", 2), wire.Job("video", "MP4", choose=True), wire.Job("video", "GIF", fps=2.0)):
        assert decoder._max_reply(job) == 3 * 9000


class Process:
    """Of a child that is played by the test."""

    pid, returncode = 0, None

    async def wait(self) -> int:
        return 1


async def play(sample: Any, *sources: VideoMetadata) -> tuple[list[Any], Question, wire.Reply]:
    """Play a child that asks about these sources one after the other, and then sends a picture without pixels.

    Returns what it hears, the question and the reply that the parent ends with.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    child, loop = Child(Process(), ours, None), asyncio.get_running_loop()  # type: ignore[arg-type]
    job, heard = wire.Job("video", "MP4", 30, choose=True), list[Any]()

    async def ask() -> None:
        await loop.sock_recv(theirs, 1 << 16)  # the job
        for source in sources:
            await loop.sock_sendall(theirs, wire.pack(wire.Choose(source)))
            if not (message := await loop.sock_recv(theirs, 1 << 16)):
                return
            heard.append(wire.unpack_chosen(message[wire.PREFIX.size :]).indices)
        await loop.sock_sendall(theirs, wire.pack(IMAGE_REPLY))

    with ours, theirs:
        asking = asyncio.create_task(ask())
        try:
            async with asyncio.timeout(10) as limit:
                question = Question(sample, job, limit, LIMITS)
                reply, _ = await child.run(job, b"", max_reply=0, choose=question.answer)
                if reply == IMAGE_REPLY:
                    await asking
        finally:
            asking.cancel()
    return heard, question, reply


@pytest.mark.anyio
async def test_a_child_is_answered_and_has_its_say() -> None:
    questions: list[Any] = []

    async def sample(*question: Any) -> Any:
        questions.append(question)
        return [0, 5] if len(questions) == 1 else None

    heard, question, reply = await play(sample, SOURCE, dataclasses.replace(SOURCE, total_frames=40))
    assert (heard, question.error, reply) == ([(0, 5), None], None, IMAGE_REPLY)
    assert [(source.total_frames, num_frames, fps) for source, num_frames, fps in questions] == [
        (20, 20, None),  # no more than there are
        (40, 30, None),
    ]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer", [[], [20], [-1], [0, 999], BadRequest("not so"), EngineFailure("not at all")], ids=repr
)
async def test_an_answer_that_is_none_ends_the_job_and_not_the_child(answer: Any) -> None:
    async def sample(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    heard, question, _ = await play(sample, SOURCE)
    assert heard == [()]
    assert isinstance(question.error, type(answer) if isinstance(answer, Exception) else EngineFailure)


@pytest.mark.anyio
async def test_a_child_that_asks_too_often_or_nonsense_is_not_served() -> None:
    async def sample(*_: Any) -> Any:
        return [0]

    heard, _, reply = await play(sample, *[SOURCE] * (MAX_QUESTIONS))
    assert (len(heard), reply) == (MAX_QUESTIONS, IMAGE_REPLY)
    heard, _, reply = await play(sample, *[SOURCE] * (MAX_QUESTIONS + 1))
    assert (len(heard), reply) == (MAX_QUESTIONS, wire.Choose(SOURCE))
    with pytest.raises(ChildGone):
        MediaDecoder(LIMITS, OWN_SIZE)._medium("video", reply, np.zeros(0, np.uint8))
    for change in ({"total_frames": 0}, {"fps": -1.0}, {"duration": 0.0}, {"height": 10**6}, {"total_frames": 10**6}):
        with pytest.raises(ChildGone):
            await play(sample, dataclasses.replace(SOURCE, **change))
    with pytest.raises(ChildGone):
        await play(None, SOURCE)


@pytest.mark.anyio
async def test_a_confined_child_decodes_every_format_at_its_own_size() -> None:
    async def sample(*_: Any) -> Any:
        return [0, 1, 9]

    limits = MediaLimits(max_frames=4, max_clip_pixels=4000)
    decoder = MediaDecoder(limits, OWN_SIZE, workers=1, sample_frames=sample)
    await decoder.start()
    try:
        for format in IMAGE_FORMATS:
            data = image_bytes(format, (41, 33))
            frames = (await decoder.decode(data, kind="image", num_frames=None, fps=None)).frames
            assert frames.shape == (1, 33, 41, 3)
            if format in ("PNG", "BMP"):
                assert np.array_equal(frames[0], np.asarray(picture(41, 33)))
        clips = [video_bytes(format, (50, 34), num_frames=10) for format in VIDEO_FORMATS]
        frames_of = [picture(50, 34, seed=seed) for seed in range(10)]
        clips += [
            encoded(frames_of[0], format, save_all=True, append_images=frames_of[1:], duration=100)
            for format in ("GIF", "PNG", "WEBP")
        ]
        for data in clips:
            video = await decoder.decode(data, kind="video", num_frames=None, fps=None)
            width, height = within(50, 34, 4000 // 3)
            assert video.frames.shape == (3, height, width, 3)
            assert video.source == VideoMetadata(10, 10.0, 1.0, 50, 34)
            assert video.frame_times == (0.0, 0.1, 0.9)
        assert levels((await decoder.decode(clips[0], kind=None, num_frames=None, fps=None)).frames) == [0, 1, 9]
        assert decoder.stats.children_started == 1
    finally:
        await decoder.close()


def test_scaling_down_keeps_the_aspect_and_takes_as_little_as_needed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(side) for side in np.exp(rng.uniform(0, 9, 2)).round())
        most = int(np.exp(rng.uniform(0, 16)))
        new_width, new_height = within(width, height, most)
        assert 1 <= new_width <= width
        assert 1 <= new_height <= height
        assert new_width * new_height <= max(1, most)
        if width * height <= most:
            assert (new_width, new_height) == (width, height)
        else:
            assert (new_width + 1) * (new_height + 1) > most or min(width, height) * most < max(width, height)
            assert abs(new_width / new_height / (width / height) - 1) <= 1 / new_width + 1 / new_height + 1e-9 or (
                min(new_width, new_height) == 1
            )
