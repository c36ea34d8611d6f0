"""Test the search for the largest number of video frames that fits: the frames that it reports do fit."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.engine.engine import Engine
from model.request import Geometry, Medium, Message, Request, RequestError
from model.targets.base import Target
from model.targets.frames import SHARE, fitting_frames, most_frames
from model.targets.qwen2_5_vl import Qwen25VLTarget
from tests.model import tiny, tiny_qwen
from tests.model.tiny_qwen import UNIT


def user(*content: str | Medium) -> tuple[Message, ...]:
    return (Message("user", content),)


def length(target: Target, *content: str | Medium) -> int:
    return len(target.prompt(user(*content)).ids)


@pytest.mark.parametrize("context", [8, 24, 60, 64, 100, 256, 512, 4096])
def test_one_video_leaves_room_for_words_and_an_answer(tiny_target: Target, context: int) -> None:
    """One more frame would exceed a video's share; a context that is too small still gets one frame."""
    most = most_frames(tiny_target, context)
    if most > 1:
        assert length(tiny_target, tiny.video(0, most)) <= SHARE * context
    assert length(tiny_target, tiny.video(0, most + 1)) > int(SHARE * context)


@pytest.mark.parametrize("context", [24, 64, 128, 384, 512])
def test_where_sizes_differ_the_smallest_frames_count(qwen_checkpoint: Path, context: int) -> None:
    target = Engine(tiny.config(qwen_checkpoint, drafter="off", max_model_len=context, max_num_seqs=1)).target
    assert isinstance(target, Qwen25VLTarget)
    most = most_frames(target, context)
    area = target.geometry.video
    assert area is not None

    def smallest(num_frames: int) -> Medium:
        height, width = area.fitted(UNIT, UNIT, num_frames)
        return Medium("video", np.zeros((num_frames, height, width, 3), np.uint8), 0.01)

    if most > 1:
        assert length(target, smallest(most)) <= SHARE * context
    assert length(target, smallest(most + 1)) > int(SHARE * context)


def test_the_engine_tells_it(plain_engine: Engine) -> None:
    assert plain_engine.info.max_frames == most_frames(plain_engine.target, plain_engine.max_model_len) == 21


def test_what_is_said_to_fit_several_videos_fits(tiny_target: Target) -> None:
    """The videos fit with text and images between them, and one more frame of each would not."""
    rng = random.Random(0)
    none = 0
    for _ in range(40):
        content: list[str | Medium] = [tiny.video(i, rng.randint(1, 30)) for i in range(rng.randint(1, 4))]
        content += [tiny.image(9)] * rng.randint(0, 2) + ["word " * rng.randint(0, 40)]
        rng.shuffle(content)
        room = rng.randint(20, 300)
        fitting = fitting_frames(tiny_target, user(*content), room)

        def lengths(num_frames: int, content: list[str | Medium] = content) -> int:
            videos = (tiny.video(0, num_frames) if isinstance(p, Medium) and p.kind == "video" else p for p in content)
            return length(tiny_target, *videos)

        none += fitting == 0
        if fitting:
            assert lengths(fitting) <= room
        most = max(len(p.frames) for p in content if isinstance(p, Medium) and p.kind == "video")
        if fitting < most:
            assert lengths(fitting + 1) > room
    assert 0 < none < 40


def test_what_is_said_to_fit_does_whatever_size_the_files_had(qwen_plain: Engine) -> None:
    """Fewer frames may be larger ones if frames share a limit; counted at their file's size they would not fit."""
    target, rng = qwen_plain.target, random.Random(1)
    area = target.geometry.video
    assert area is not None
    for _ in range(30):
        sizes = [(rng.randint(16, 700), rng.randint(16, 700)) for _ in range(rng.randint(1, 3))]
        count, room = rng.randint(2, 40), rng.randint(60, 380)

        def clips(num_frames: int, sizes: list[tuple[int, int]] = sizes) -> list[Medium]:
            shapes = [(num_frames, *area.fitted(height, width, num_frames), 3) for height, width in sizes]
            return [Medium("video", np.zeros(shape, np.uint8), 0.1) for shape in shapes]

        if fitting := fitting_frames(target, user(*clips(count), "What?"), room):
            assert length(target, *clips(fitting), "What?") <= room


def test_without_a_video_nothing_is_said(tiny_target: Target) -> None:
    assert fitting_frames(tiny_target, user(tiny.image(0), "What?"), 100) == 0


@pytest.mark.parametrize("qwen", [False, True], ids=["llava", "qwen"])
@pytest.mark.parametrize("num_videos", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 90])
def test_a_request_that_does_not_fit_is_told_what_would(
    plain_engine: Engine, qwen_plain: Engine, qwen: bool, num_videos: int, max_tokens: int
) -> None:
    engine = qwen_plain if qwen else plain_engine

    def clips(num_frames: int) -> list[Medium]:
        """As large as they may be."""
        if not qwen:
            return [tiny.video(i, num_frames) for i in range(num_videos)]
        area = engine.target.geometry.video
        assert area is not None
        height, width = area.fitted(4000, 4000, num_frames)
        frames = tiny_qwen.picture(0, width, height, num_frames)
        return [Medium("video", frames, 0.1) for _ in range(num_videos)]

    with pytest.raises(RequestError) as refused:
        engine.prepare(tiny.ask("r", *clips(300), "What is it?", max_tokens=max_tokens))
    assert refused.value.code == "context_length_exceeded"
    hint = re.search(r"with num_frames (\d+) it would fit", refused.value.message)
    assert hint is not None, refused.value.message
    engine.prepare(tiny.ask("r", *clips(int(hint[1])), "What is it?", max_tokens=max_tokens))


def test_a_prompt_that_is_too_long_is_not_processed_again_where_the_processor_resizes(tiny_target: Target) -> None:
    """That would take seconds for a long clip, in the thread that prepares all requests."""

    class Resizing:
        geometry = Geometry()

        def prompt(self, _: object) -> None:
            raise AssertionError("processed again")

    video = Medium("video", np.zeros((4, 48, 48, 3), np.uint8))
    messages = (Message("user", (video, "What?")),)
    assert fitting_frames(Resizing(), messages, 10) == 0  # type: ignore[arg-type]
    assert fitting_frames(tiny_target, messages, 1000) == 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_option_that_no_processor_takes_is_refused_by_its_name(plain_engine: Engine, kind: Any) -> None:
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    medium = Medium(kind, frames, options=(("max_pixels", 9), ("do_pan_and_scan", True)))
    with pytest.raises(RequestError, match=f"{kind} processor does not take do_pan_and_scan") as caught:
        plain_engine.prepare(Request("r", (Message("user", (medium,)),)))
    assert caught.value.code == "unknown_option"
