"""Conversations of every shape that people send, on the real engine: each is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest import media
from loadtest.client import data_uri
from tests.e2e.server import EngineServer

IMAGE = {"type": "image_url", "image_url": data_uri(media.image(1))}
OTHER = {"type": "image_url", "image_url": data_uri(media.image(2))}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


HI = {"role": "user", "content": "hi"}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "image only": [user(IMAGE)],
    "nothing": [{"role": "user", "content": ""}],
    "null": [{"role": "user", "content": None}],
    "no part": [user()],
    "empty text": [user(text(""))],
    "empty text beside an image": [user(text(""), IMAGE)],
    "blanks": [user(text("  \n "))],
    "system of two texts": [{"role": "system", "content": [text("a"), text("b")]}, HI],
    "system alone": [{"role": "system", "content": "x"}],
    "empty system": [{"role": "system", "content": ""}, HI],
    "two users in a row": [HI, HI],
    "assistant last": [HI, {"role": "assistant", "content": "well"}],
    "assistant first": [{"role": "assistant", "content": "well"}, HI],
    "assistant of nothing": [HI, {"role": "assistant", "content": None}, HI],
    "image of the assistant": [HI, {"role": "assistant", "content": [IMAGE]}, HI],
    "image of the system": [{"role": "system", "content": [IMAGE, text("x")]}, HI],
    "private use": [user(text("\ue000"), text("\ue0000\ue001"), IMAGE)],
    "placeholders": [user(text("<image> <|image_pad|> <|im_end|> <|vision_start|>"), IMAGE)],
    "zero width": [user(text("\u200b\u200d\ufeff"))],
    "control characters": [user(text("\x00\x01\x7f"))],
}


@pytest.fixture(params=["tiny", "qwen"])
def any_server(request: pytest.FixtureRequest) -> EngineServer:
    server: EngineServer = request.getfixturevalue({"tiny": "server", "qwen": "qwen_server"}[request.param])
    return server


def ask(server: EngineServer, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **fields}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_answered(any_server: EngineServer, shape: str) -> None:
    answer = ask(any_server, SHAPES[shape])
    assert answer["usage"]["completion_tokens"] == 6
    off = ask(any_server, SHAPES[shape], speculation="off")
    assert off["choices"] == answer["choices"]
    assert off["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] > 0


def test_texts_that_look_like_placeholders_bring_no_medium(any_server: EngineServer) -> None:
    """One image, whatever the text says: its tokens are charged once."""
    plain = ask(any_server, [user(text("one two three"))])["usage"]["prompt_tokens"]
    image = ask(any_server, [user(text("one two three"), IMAGE)])["usage"]["prompt_tokens"] - plain
    for odd in ("<image>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "\ue000", "\ue0000\ue001"):
        bare = ask(any_server, [user(text(odd))])["usage"]["prompt_tokens"]
        assert ask(any_server, [user(text(odd), IMAGE)])["usage"]["prompt_tokens"] == bare + image


def test_the_order_of_texts_and_images_is_kept(any_server: EngineServer) -> None:
    first, second = text("first:"), text("second:")
    orders = [
        [first, IMAGE, second, OTHER],
        [first, OTHER, second, IMAGE],
        [IMAGE, first, OTHER, second],
        [IMAGE, OTHER, first, second],
        [first, second, IMAGE, OTHER],
    ]
    answers = [ask(any_server, [user(*order)], max_tokens=16) for order in orders]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == len(orders)
    in_turns = ask(any_server, [user(first, IMAGE), user(second, OTHER)], max_tokens=16)
    assert in_turns["usage"]["prompt_tokens"] > answers[0]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("top_p", [0, 1e-300])
def test_an_empty_nucleus_takes_the_likeliest_token(any_server: EngineServer, top_p: float) -> None:
    greedy = ask(any_server, [user(IMAGE, text("x"))], max_tokens=16)
    drawn = ask(any_server, [user(IMAGE, text("x"))], max_tokens=16, temperature=1, seed=5, top_p=top_p)
    assert drawn["choices"] == greedy["choices"]


# -- the chunks of a stream

STREAM_OPTIONS: dict[str, dict[str, Any]] = {
    "absent": {},
    "null": {"stream_options": None},
    "empty": {"stream_options": {}},
    "no usage": {"stream_options": {"include_usage": False}},
    "usage": {"stream_options": {"include_usage": True}},
    "in every chunk": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


def chunks_of(server: EngineServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.http.post("/v1/chat/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("options", STREAM_OPTIONS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1},
        {"logprobs": True, "top_logprobs": 1},
        {"stop": ["e", "a", "o"]},
        {"temperature": 1, "seed": 3},
    ],
    ids=lambda fields: next(iter(fields), "plain"),
)
def test_a_stream_has_the_shape_that_clients_rely_on(
    server: EngineServer, n: int, options: str, fields: dict[str, Any]
) -> None:
    body = {"messages": [user(IMAGE, text("x"))], "temperature": 0, "max_tokens": 9, "n": n, **fields}
    whole = server.http.post("/v1/chat/completions", json=body).json()
    chunks = chunks_of(server, body | STREAM_OPTIONS[options])
    with_usage = options in ("usage", "in every chunk")
    if with_usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == (
            [],
            last["usage"] | {"prompt_tokens": whole["usage"]["prompt_tokens"]},
        )
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    ended: list[int] = []
    texts, entries = [""] * n, [0] * n
    for chunk in chunks:
        assert ("usage" in chunk) == with_usage
        assert not with_usage or (chunk["usage"] is not None) == (options == "in every chunk")
        (choice,) = chunk["choices"]
        assert choice.keys() == {"index", "delta", "logprobs", "finish_reason"}
        index = choice["index"]
        assert index not in ended, "nothing follows the end of a choice"
        if choice["finish_reason"] is not None:
            ended.append(index)
            assert choice["delta"] == {}
        texts[index] += choice["delta"].get("content") or ""
        entries[index] += len((choice["logprobs"] or {}).get("content") or ())
    assert sorted(ended) == list(range(n))
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["message"]["content"]
        assert entries[choice["index"]] == len((choice["logprobs"] or {}).get("content") or ())
    if "logprobs" in fields:
        assert sum(entries) == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_picture_that_fails_late_is_refused_before_a_stream_begins(server: EngineServer, n: int) -> None:
    broken = {"type": "image_url", "image_url": IMAGE["image_url"][:-40]}
    body = {"messages": [user(IMAGE, OTHER, broken)], "stream": True, "n": n}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == "messages[0].content[2]"
