"""The promise: not one token depends on speculation, on company, or on the worker that happens to compute."""

from __future__ import annotations

import random
from typing import Any

import pytest

from loadtest import media
from loadtest.client import Question, Variant
from tests.e2e.conftest import StartServer
from tests.e2e.server import EngineServer

IMAGES = [media.image(seed) for seed in range(10, 14)]
CLIPS = [media.video(seed) for seed in range(20, 22)]
CROWD = 16


@pytest.fixture(params=["tiny", "qwen", "demo"])
def any_server(request: pytest.FixtureRequest) -> EngineServer:
    """The bundled draft is right often, the tiny one nearly never: long accepted paths, and long rejected ones."""
    names = {"tiny": "server", "qwen": "qwen_server", "demo": "demo_server"}
    server: EngineServer = request.getfixturevalue(names[request.param])
    return server


def questions(num_tokens: int = 40) -> list[Question]:
    """Every kind of medium with every kind of sampling, of different lengths, so that they join and leave in turn."""
    shown: list[tuple[media.File, ...]] = [(), (IMAGES[0],), (IMAGES[1], IMAGES[2]), (CLIPS[0],), (IMAGES[3], CLIPS[1])]
    sampled: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.0, "seed": 2, "top_p": 0.9},
        {"temperature": 1.0, "seed": 3, "top_k": 20, "min_p": 0.02},
    ]
    prompts = ("Describe the image.", "How many objects are there?", "What do you see in the video?")
    pairs = [(files, sampling) for files in shown for sampling in sampled][:CROWD]
    return [
        Question(prompts[i % 3], files, {"max_tokens": num_tokens - 2 * i, "ignore_eos": i % 2 == 0} | sampling)
        for i, (files, sampling) in enumerate(pairs)
    ]


def test_speculation_off_and_on_alone_and_in_a_crowd_say_the_same(any_server: EngineServer) -> None:
    server, asked = any_server, questions()
    alone = [server.text(question, Variant(speculation="off")) for question in asked]
    assert len(set(alone)) > len(asked) // 2, "answers that are all alike would be the same without meaning anything"
    for speculation in ("auto", "off"):
        for route in ("chat", "generate"):
            way = Variant("chat" if route == "chat" else "generate", True, "auto" if speculation == "auto" else "off")
            answers = server.ask_all([(question, way) for question in asked])
            assert [answer.texts[0] for answer in answers] == alone, way
    ways = [Variant(stream=bool(i & 1), speculation="auto" if i & 2 else "off") for i in range(CROWD)]
    random.Random(0).shuffle(ways)
    mixed = server.ask_all(list(zip(asked, ways, strict=True)))
    assert [answer.texts[0] for answer in mixed] == alone, "some with, some without, in one batch"
    drafts = [answer.usage["completion_tokens_details"]["rejected_prediction_tokens"] for answer in mixed]
    assert all(not drafted for drafted, way in zip(drafts, ways, strict=True) if way.speculation == "off")
    assert server.metric("flash_spec_drafts_total") > 0, "nothing was drafted, so that nothing was shown"


def test_on_two_workers_it_is_the_same_and_both_work(start_server: StartServer, server: EngineServer) -> None:
    asked = questions()
    alone = [server.text(question) for question in asked]
    two = start_server(workers=2)
    two.wait(lambda: two.metric("flash_worker_up") == 2)
    answers = two.ask_all([(question, Variant(stream=True)) for question in asked])
    assert [answer.texts[0] for answer in answers] == alone
    two.wait_idle()
    counted = [two.metric("flash_generation_tokens_total", worker=str(worker)) for worker in range(2)]
    assert all(counted)
    assert sum(counted) == sum(answer.usage["completion_tokens"] for answer in answers)
