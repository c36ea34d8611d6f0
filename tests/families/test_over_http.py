"""Real files over HTTP, against transformers alone: its own frame sampling, sizes and options on the decoded files.

One family is served over HTTP; the others go the same way from the form on, in this process.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from model.config import EngineConfig
from model.engine.engine import Engine
from model.request import Message, Request
from service.body import Form
from service.commands.decoding import answer_at_once
from service.media import MediaDecoder
from service.media.sampling import spread
from service.media_loader import decode_with_options
from service.schemas import generate as schema
from service.schemas.sampling import check_media_options, max_frames, sampling_params
from service.settings import Settings
from service.state import media_limits
from tests.e2e.server import EngineServer
from tests.families.reference import Reference
from tests.media.samples import encoded, picture, video_bytes
from tests.model import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in processors of transformers
NUM_TOKENS = 16
QUESTION = "What is it?"
SETTINGS = {"dtype": "float32", "drafter": "off", "device": "cpu", "threads": 1, "max_num_seqs": 2, "max_frames": 64}
Saved = Callable[[str], Path]


@dataclass(frozen=True)
class Compared:
    """A checkpoint in transformers, with which an answer is compared."""

    reference: Reference

    def expected(self, part: dict[str, Any], **options: Any) -> list[int]:
        """The same by transformers."""
        processor, model = self.reference.processor, self.reference.model
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=options,
        )
        inputs.pop("video_metadata", None)
        model.generation_config.eos_token_id = None
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return [length, *out[0, length:].tolist()]

    def expected_of_video(self, data: bytes, **sampling: Any) -> list[int]:
        """As transformers' users do it: all frames of the file, from which the family's processor samples."""
        frames, metadata = shown(data)
        if not sampling:
            part = {"type": "video", "video": frames}
            return self.expected(part, do_sample_frames=True, video_metadata=[metadata])
        # Some processors cannot be called with num_frames, since they have an fps of their own.
        indices = self.reference.processor.video_processor.sample_frames(metadata=metadata, **sampling)
        return self.expected_of_frames(data, [int(index) for index in indices])

    def expected_of_frames(self, data: bytes, indices: list[int]) -> list[int]:
        frames, metadata = shown(data)
        metadata.frames_indices = indices
        part = {"type": "video", "video": frames[indices]}
        return self.expected(part, do_sample_frames=False, video_metadata=[metadata])


@dataclass(frozen=True)
class Served(Compared):
    """The same checkpoint behind the service."""

    server: EngineServer

    def answer(self, data: bytes, **fields: Any) -> list[int]:
        """The tokens of the service's answer about a file, behind the length of its prompt."""
        response = self.server.http.post("/v1/generate", data=form(fields), files=[("media", data)])
        assert response.status_code == 200, response.text
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        tokens = [token["id"] for event in events if event["type"] == "token" for token in event["tokens"]]
        return [events[-1]["usage"]["prompt_tokens"], *tokens]


@dataclass(frozen=True)
class Local(Compared):
    """The same checkpoint, and what the service does with a form and its file, in this process: a server of its own
    would load torch and transformers again for each family."""

    settings: Settings
    engine: Engine
    decoder: MediaDecoder
    loop: asyncio.AbstractEventLoop

    def answer(self, data: bytes, **fields: Any) -> list[int]:
        """The tokens of the answer about a file, behind the length of its prompt."""
        parsed, (content,) = schema.read(Form(list(form(fields).items()), [("media", data)]), self.settings)
        options = check_media_options(parsed, self.settings, self.engine.info)
        medium = self.loop.run_until_complete(decode_with_options(self.decoder, content, None, options))
        params = sampling_params(parsed, self.settings, default_temperature=0.0)
        (outputs,) = tiny.drain(self.engine, [Request("r", (Message("user", (medium, QUESTION)),), params)]).values()
        assert outputs[-1].stats is not None
        return [outputs[-1].stats.prompt_tokens, *tiny.token_ids(outputs)]


def form(fields: dict[str, Any]) -> dict[str, str]:
    """The texts of a form that asks about a file."""
    values = {"prompt": QUESTION, "max_tokens": NUM_TOKENS, "ignore_eos": "true", "stream": "true", **fields}
    return {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in values.items()}


def shown(data: bytes) -> tuple[np.ndarray, VideoMetadata]:
    """All frames of a file, and what its container says."""
    with av.open(io.BytesIO(data), "r") as container:
        rate = container.streams.video[0].average_rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert rate is not None
    count, height, width, _ = frames.shape
    return frames, VideoMetadata(count, float(rate), width, height, count / float(rate))


@contextmanager
def serving(folder: Path, checkpoint: Path) -> Iterator[Served]:
    server = EngineServer(folder, SETTINGS | {"model": checkpoint})
    try:
        yield Served(Reference(checkpoint), server)
    finally:
        assert server.close() == 0, server.log_text()


@contextmanager
def local(checkpoint: Path) -> Iterator[Local]:
    settings = Settings.model_validate(SETTINGS | {"model": str(checkpoint)})
    engine = Engine(EngineConfig(**settings.engine_options()[0]))
    limits = replace(media_limits(settings), max_frames=max_frames(settings, engine.info))
    sample_frames = answer_at_once(engine.sample_frames)
    decoder = MediaDecoder(limits, engine.info.geometry, workers=1, sample_frames=sample_frames)
    with asyncio.Runner() as runner:
        runner.run(decoder.start())
        try:
            yield Local(Reference(checkpoint), settings, engine, decoder, runner.get_loop())
        finally:
            runner.run(decoder.close())


@pytest.fixture(scope="module")
def qwen3_vl(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("qwen3_vl"), saved("qwen3_vl")) as served:
        yield served


def clip(container: str, num_frames: int, rate: int) -> bytes:
    return video_bytes(container, (62, 46), num_frames=num_frames, rate=rate, noise=True)


@pytest.mark.parametrize(("container", "num_frames", "rate"), [("mp4", 25, 10), ("webm", 31, 30), ("avi", 9, 7)])
def test_a_video_is_sampled_and_timed_as_by_transformers(
    qwen3_vl: Served, container: str, num_frames: int, rate: int
) -> None:
    data = clip(container, num_frames, rate)
    assert qwen3_vl.answer(data) == qwen3_vl.expected_of_video(data)


@pytest.mark.parametrize("sampling", [{"num_frames": 12}, {"fps": 5.0}, {"fps": 8.0}], ids=str)
def test_the_clients_sampling_is_the_processors(qwen3_vl: Served, sampling: dict[str, Any]) -> None:
    data = clip("mp4", 25, 10)
    answer = qwen3_vl.answer(data, **sampling)
    assert answer == qwen3_vl.expected_of_video(data, **sampling)
    assert answer[0] > qwen3_vl.answer(data)[0]


@pytest.mark.parametrize("size", [(61, 47), (33, 201), (640, 128)], ids=str)
def test_a_picture_of_any_size_is_resized_by_the_processor_alone(qwen3_vl: Served, size: tuple[int, int]) -> None:
    image = picture(*size)
    assert qwen3_vl.answer(encoded(image, "PNG")) == qwen3_vl.expected({"type": "image", "image": image})


@pytest.mark.parametrize(("shortest", "longest"), [(1024, 8192), (30_000, 40_000)])
def test_options_reach_the_processor(qwen3_vl: Served, shortest: int, longest: int) -> None:
    image, options = picture(140, 90), {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    data = encoded(image, "PNG")
    answer = qwen3_vl.answer(data, mm_processor_kwargs=options)
    assert answer == qwen3_vl.expected({"type": "image", "image": image}, **options)
    assert answer[0] != qwen3_vl.answer(data)[0], "and no cache mixes them"
    assert answer == qwen3_vl.answer(data, mm_processor_kwargs=options)


@pytest.mark.parametrize(
    ("pixels", "size"),
    [
        ({"max_pixels": 6000}, {"shortest_edge": 4096, "longest_edge": 6000}),
        ({"max_pixels": 3000}, {"shortest_edge": 3000, "longest_edge": 3000}),
        ({"min_pixels": 30_000}, {"shortest_edge": 30_000, "longest_edge": 30_000}),
        ({"min_pixels": 9000, "max_pixels": 10_000}, {"shortest_edge": 9000, "longest_edge": 10_000}),
    ],
    ids=str,
)
def test_pixels_are_what_the_processor_calls_size(
    qwen3_vl: Served, pixels: dict[str, int], size: dict[str, int]
) -> None:
    image, data = picture(61, 90), clip("mp4", 9, 4)
    answer = qwen3_vl.answer(encoded(image, "PNG"), **pixels)
    assert answer == qwen3_vl.expected({"type": "image", "image": image}, size=size)
    assert answer[0] != qwen3_vl.answer(encoded(image, "PNG"))[0]
    frames, metadata = shown(data)
    part = {"type": "video", "video": frames}
    expected = qwen3_vl.expected(part, do_sample_frames=True, video_metadata=[metadata], size=size)
    assert qwen3_vl.answer(data, **pixels) == expected


# What each processor samples with: GLM's knows no number, Gemma's no rate, SmolVLM's needs both.
SAMPLINGS: dict[str, list[dict[str, Any]]] = {
    "smolvlm": [],
    "glm4v": [{}, {"fps": 4.0}],
    "gemma4": [{"num_frames": 6}],
    "internvl": [{"num_frames": 6}, {"fps": 4.0}],
    "llava_onevision": [{"num_frames": 6}, {"fps": 4.0}],
    "qwen2_vl": [{"num_frames": 6}, {"fps": 4.0}],
    "video_llama_3": [{"num_frames": 6}, {"fps": 4.0}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
def test_files_of_every_kind_of_processor_as_by_transformers(name: str, saved: Saved) -> None:
    with local(saved(name)) as served:
        for size in ((61, 47), (33, 170)):
            image = picture(*size)
            assert served.answer(encoded(image, "PNG")) == served.expected({"type": "image", "image": image})
        for container, num_frames, rate in (("mp4", 26, 10), ("webm", 65, 30)):
            data = clip(container, num_frames, rate)
            for sampling in SAMPLINGS[name]:
                assert served.answer(data, **sampling) == served.expected_of_video(data, **sampling), sampling
            evenly = spread(num_frames, 5).tolist()
            if name in ("glm4v", "smolvlm"):  # where the processor cannot take five, the service does
                assert served.answer(data, num_frames=5) == served.expected_of_frames(data, evenly)
