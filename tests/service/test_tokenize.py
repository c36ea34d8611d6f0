"""POST /tokenize and /detokenize in vLLM's and llama.cpp's forms; /v1/models with what the model can do."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.service.server import Server
from tests.service.test_openai import image_part


def post(server: Server, path: str, **fields: Any) -> Any:
    answer = server.http.post(path, json=fields)
    assert answer.headers["x-request-id"].startswith("tok-")
    return answer.json() if answer.status_code == 200 else answer.json()["error"] | {"status": answer.status_code}


def test_a_text_becomes_tokens_and_tokens_become_the_text(server: Server) -> None:
    found = post(server, "/tokenize", model="demo", prompt="one two three")
    assert (found["count"], found["max_model_len"], found["token_strs"]) == (3, 4096, None)
    assert post(server, "/detokenize", tokens=found["tokens"])["prompt"] == "one two three"
    named = post(server, "/tokenize", prompt="one two three", return_token_strs=True)
    assert named["token_strs"] == ["one", "two", "three"]
    llama = post(server, "/tokenize", content="one two three")
    assert llama["tokens"] == found["tokens"]
    assert post(server, "/detokenize", tokens=llama["tokens"])["content"] == "one two three"
    assert post(server, "/detokenize", tokens=[])["prompt"] == ""


def test_a_conversation_has_the_tokens_that_its_chat_is_charged(server: Server) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image_part(), {"type": "text", "text": "what is it?"}]},
    ]
    chat = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert post(server, "/tokenize", messages=messages)["count"] == chat["usage"]["prompt_tokens"]
    assert post(server, "/tokenize", messages=messages, add_generation_prompt=True)["count"] == 5


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "send one of"),
        ("/tokenize", {"prompt": None, "messages": None}, "prompt", "send one of"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages", "prompt and messages were sent"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "content", "prompt and content were sent"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "got `array`"),
        ("/tokenize", {"prompt": "a", "num_frames": 3}, "num_frames", "for messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools", "for messages"),
        ("/tokenize", {"prompt": "x" * 1_200_000}, "prompt", "1200000 characters"),
        ("/tokenize", {"content": "x" * 1_200_000}, "content", "1200000 characters"),
        ("/tokenize", {"messages": []}, "messages", "1 to 2048"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model", "not served"),
        ("/tokenize", {"prompt": "a", "parse_special": False}, "parse_special", "always special"),
        ("/tokenize", {"prompt": "a", "with_pieces": True}, "with_pieces", "return_token_strs"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
            "a",
        ),
        ("/detokenize", {}, "tokens", "missing"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", ">= 0"),
        ("/detokenize", {"tokens": [5, 2**30]}, "tokens", f"names token {2**30}"),
        ("/detokenize", {"tokens": [5, 2**40]}, "tokens[1]", "<= 2147483648"),
        ("/detokenize", {"tokens": [2**63]}, "tokens[0]", "<= 2147483648"),
        ("/detokenize", {"tokens": [2**200]}, "tokens[0]", "<= 2147483648"),
        ("/detokenize", {"tokens": [5.5]}, "tokens[0]", "got `float`"),
        ("/detokenize", {"tokens": "5"}, "tokens", "got `str`"),
        ("/detokenize", {"tokens": [5], "model": "gpt"}, "model", "not served"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    error = post(server, path, **fields)
    assert error["status"] == (404 if param == "model" else 400)
    assert error["param"] == param
    assert says in error["message"]


def test_a_medium_that_cannot_be_read_is_named(server: Server) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    error = post(server, "/tokenize", messages=[{"role": "user", "content": [image_part(), broken]}])
    assert error["param"] == "messages[0].content[1]"
    assert server.health()["requests"] == 0


def test_a_tokenizer_that_fails_costs_one_request(server: Server) -> None:
    error = post(server, "/tokenize", prompt="CHOKE on it")
    assert (error["status"], error["code"], error["param"]) == (500, "engine_failure", None)
    assert "trouble" not in error["message"]
    assert post(server, "/tokenize", prompt="go on")["count"] == 2


def test_a_worker_that_dies_of_it_is_replaced(server: Server) -> None:
    pids = server.worker_pids()
    assert post(server, "/tokenize", prompt="DIE once")["count"] == 2, "another worker answers"
    error = post(server, "/tokenize", prompt="ALWAYS DIE")
    assert (error["status"], error["code"]) == (500, "worker_died")
    server.wait(lambda: server.http.get("/readyz").status_code == 200)
    assert server.worker_pids() != pids
    assert server.chat().status_code == 200


def test_the_served_model_says_what_it_can_do(server: Server) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert server.http.get("/v1/models/demo").json() == model
    assert (model["id"], model["root"], model["owned_by"]) == ("demo", "demo", "flashserve")
    assert model["max_model_len"] == model["context_length"] == 4096
    assert model["architecture"]["input_modalities"] == ["text", "image", "video"]
    assert model["capabilities"]["vision"]
    assert not model["capabilities"]["function_calling"], "as the engine says of its chat template"
    assert not model["capabilities"]["reasoning"]
    assert model["limits"] == {"max_completion_tokens": 2048, "max_media": 8, "max_frames": 32}
    parameters = model["supported_parameters"]
    assert {"temperature", "top_k", "logprobs", "response_format", "stop", "n"} <= set(parameters)
    assert not {"tools", "tool_choice", "reasoning_effort"} & set(parameters)
    assert not {"model", "messages", "audio", "user", "use_beam_search"} & set(parameters)
    for name in parameters:
        none: dict[str, Any] = {name: None}
        answer = server.chat("hello", **none)
        assert answer.status_code == 200, f"{name}: {answer.text}"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert client.models.retrieve("demo").id == client.models.list().data[0].id == "demo"
