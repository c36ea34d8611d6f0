"""Qwen2.5-VL behind the service: pictures keep their size and clips their time, all the way to the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtest import media
from loadtest.client import Question, Variant
from loadtest.media import File
from model.engine.engine import Engine
from model.request import Medium
from service.media import MediaDecoder, MediaLimits
from tests.e2e.server import EngineServer
from tests.model import tiny

SHOWN: dict[str, tuple[File, ...]] = {
    "small": (media.image(1, 40, 30),),
    "wide": (media.image(2, 200, 40),),
    "large": (media.image(3, 400, 300),),
    "slow clip": (media.video(4, rate=4),),
    "fast clip": (media.video(4, rate=24),),
    "clip and image": (media.video(5), media.image(6, 64, 64)),
}


@pytest.fixture(scope="module")
def in_process(qwen_server: EngineServer) -> dict[str, tuple[str, int]]:
    """Text and prompt tokens of each, from the engine itself, without speculation."""
    engine = Engine(tiny.config(Path(qwen_server.settings["model"]), drafter="off", max_num_seqs=1, max_model_len=None))
    decoder = MediaDecoder(MediaLimits(), engine.info.geometry, workers=1)

    async def decoded() -> dict[str, list[Medium]]:
        await decoder.start()
        try:
            return {
                name: [await decoder.decode(f.data, kind=f.kind, num_frames=None, fps=None) for f in files]
                for name, files in SHOWN.items()
            }
        finally:
            await decoder.close()

    found = {}
    for name, shown in asyncio.run(decoded()).items():
        outputs = tiny.drain(engine, [tiny.ask(name, *shown, "Describe it.")])[name]
        assert outputs[-1].stats is not None
        found[name] = tiny.text_of(outputs), outputs[-1].stats.prompt_tokens
    return found


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_it_says_over_http_what_the_engine_says(
    qwen_server: EngineServer, in_process: dict[str, tuple[str, int]], route: str
) -> None:
    way = Variant("chat" if route == "chat" else "generate", stream=True)
    asked = [Question("Describe it.", files, {"max_tokens": 24, "ignore_eos": True}) for files in SHOWN.values()]
    answers = qwen_server.ask_all([(question, way) for question in asked])
    for name, answer in zip(SHOWN, answers, strict=True):
        assert (answer.texts[0], answer.usage["prompt_tokens"]) == in_process[name], name


def test_size_and_time_tell(in_process: dict[str, tuple[str, int]]) -> None:
    tokens = {name: count for name, (_, count) in in_process.items()}
    assert tokens["small"] < tokens["wide"] < tokens["large"]
    assert tokens["slow clip"] == tokens["fast clip"]
    assert in_process["slow clip"][0] != in_process["fast clip"][0], "the same frames, at another pace"


def test_a_picture_that_is_too_narrow_is_refused_and_the_next_is_served(qwen_server: EngineServer) -> None:
    answer = qwen_server.ask(Question("Describe it.", (media.image(7, 2000, 9),)))
    assert answer.status == 400
    assert "differ too much" in answer.error["message"]
    assert qwen_server.text(Question("Describe it.", SHOWN["small"], {"max_tokens": 4}))
