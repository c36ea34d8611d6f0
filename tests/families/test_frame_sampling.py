"""A family's own processor chooses the frames of a video, as far as it can; otherwise nobody is refused for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor
from transformers.video_utils import VideoMetadata as FamilyMetadata

from model.request import MEDIA_OPTIONS, VideoMetadata
from model.targets.chat_processor import ChatProcessor

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in processors of transformers
Saved = Callable[[str], Path]
SHORT, LONG = VideoMetadata(26, 10.0, 2.6, 64, 48), VideoMetadata(900, 30.0, 30.0, 64, 48)
WITHOUT_RATE = VideoMetadata(26, None, None, 64, 48)


@pytest.fixture(scope="module")
def chat(saved: Saved) -> Callable[[str], ChatProcessor]:
    made: dict[str, ChatProcessor] = {}

    def make(name: str) -> ChatProcessor:
        if name not in made:
            folder = saved(name)
            processor: Any = AutoProcessor.from_pretrained(folder)
            made[name] = ChatProcessor(name, processor, AutoConfig.from_pretrained(folder))
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "source", "sampling"),
    [
        ("qwen3_vl", SHORT, {}),
        ("qwen3_vl", LONG, {}),
        ("qwen3_vl", LONG, {"fps": 0.5}),
        ("qwen3_vl", LONG, {"num_frames": 7}),
        ("glm4v", SHORT, {}),
        ("glm4v", LONG, {"fps": 1.0}),
        ("gemma4", LONG, {}),
        ("gemma4", LONG, {"num_frames": 5}),
        ("internvl", LONG, {"num_frames": 5}),
        ("internvl", LONG, {"fps": 0.4}),
        ("qwen2_vl", LONG, {"num_frames": 9}),
        ("qwen2_vl", LONG, {"fps": 1.0}),
    ],
)
def test_the_processors_choice_is_taken(
    chat: Callable[[str], ChatProcessor], name: str, source: VideoMetadata, sampling: dict[str, Any]
) -> None:
    videos = chat(name).processor.video_processor
    metadata = FamilyMetadata(source.total_frames, source.fps, source.width, source.height, source.duration)
    expected = np.asarray(videos.sample_frames(metadata=metadata, **sampling)).tolist()
    assert chat(name).sample_frames(source, sampling.get("num_frames"), sampling.get("fps")) == expected


@pytest.mark.parametrize(
    ("name", "source", "num_frames", "fps"),
    [
        ("internvl", LONG, None, None),  # it does not sample unless told to
        ("qwen2_vl", LONG, None, None),
        ("glm4v", LONG, 5, None),  # it knows no number
        ("glm4v", WITHOUT_RATE, None, None),  # it needs a rate
        ("smolvlm", LONG, None, 2.0),  # it has no default that it needs
        ("qwen2_vl", LONG, 1, None),  # it divides by nought
        ("qwen2_vl", SHORT, 25, None),  # it rounds up to 26, but takes even numbers
        ("llava_next", LONG, 4, None),  # no videos
    ],
)
def test_without_one_the_choice_is_left_to_the_caller(
    chat: Callable[[str], ChatProcessor], name: str, source: VideoMetadata, num_frames: int | None, fps: float | None
) -> None:
    indices = chat(name).sample_frames(source, num_frames, fps)
    assert indices is None or name == "qwen2_vl" and len(indices) == 24, indices


def test_a_processor_that_knows_how_many_samples_though_it_is_set_not_to(
    chat: Callable[[str], ChatProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolVLM's published checkpoints set a rate and a number, and `do_sample_frames` false, which takes all frames."""
    videos = chat("smolvlm").processor.video_processor
    assert not videos.do_sample_frames
    monkeypatch.setattr(videos, "fps", 1, raising=False)
    monkeypatch.setattr(videos, "num_frames", 8, raising=False)
    metadata = FamilyMetadata(LONG.total_frames, LONG.fps, LONG.width, LONG.height, LONG.duration)
    for num_frames, fps in ((None, None), (None, 0.2), (4, None)):
        expected = videos.sample_frames(metadata=metadata, num_frames=num_frames, fps=fps).tolist()
        assert chat("smolvlm").sample_frames(LONG, num_frames, fps) == expected
        assert len(expected) == (num_frames or 8 if fps is None else 6)


def test_a_clip_shorter_than_the_default_is_taken_whole(chat: Callable[[str], ChatProcessor]) -> None:
    """Gemma's processor itself raises for one of fewer than 32 frames."""
    assert chat("gemma4").sample_frames(SHORT, None, None) == list(range(26))
    assert chat("gemma4").sample_frames(SHORT, 99, None) == list(range(26))


@pytest.mark.parametrize(
    ("name", "area", "image", "video"),
    [
        ("qwen3_vl", True, {"min_pixels", "max_pixels", "size"}, {"min_pixels", "max_pixels", "size"}),
        ("qwen2_vl", True, {"min_pixels", "max_pixels", "size"}, {"min_pixels", "max_pixels", "size"}),
        ("glm4v", True, {"min_pixels", "max_pixels", "size"}, {"min_pixels", "max_pixels", "size"}),
        ("smolvlm", False, {"size", "do_image_splitting"}, {"size"}),
        ("gemma3", False, {"size", "do_pan_and_scan"}, set()),
        ("gemma4", False, {"max_soft_tokens"}, {"max_soft_tokens"}),
        ("internvl", False, {"size", "crop_to_patches", "max_patches"}, {"size"}),
        ("lfm2_vl", False, {"min_image_tokens", "max_image_tokens"}, set()),
    ],
)
def test_options_are_those_that_the_processors_know(
    chat: Callable[[str], ChatProcessor], name: str, area: bool, image: set[str], video: set[str]
) -> None:
    geometry = chat(name).geometry
    assert geometry.size_is_area == area
    assert image <= set(geometry.image_options) <= set(MEDIA_OPTIONS)
    assert video <= set(geometry.video_options) <= set(MEDIA_OPTIONS)
    assert geometry.depends_on_file
