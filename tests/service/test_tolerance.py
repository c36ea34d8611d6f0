"""What ordinary clients send beside what OpenAI documents is accepted; what cannot be done is refused by its name."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from model.request import Message, SamplingParams, ToolCall
from service import chat_input
from service.errors import BadRequest
from service.media_loader import MediaLoader
from service.request_context import _salt
from service.schemas import openai
from service.schemas.openai import ChatRequest
from service.schemas.sampling import sampling_params
from service.settings import Settings
from service.uploads import Upload
from tests.media.samples import encoded, picture
from tests.service.refusals import USER, refusal
from tests.service.server import Server

SETTINGS = Settings()
LOADER = cast("MediaLoader", SimpleNamespace(check_used=lambda *_: None))


def read(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    """The checked request of a body."""
    body = json.dumps({"messages": messages or [USER], **fields})
    request = msgspec.json.decode(body, type=ChatRequest)
    openai.check(request, SETTINGS)
    return request


def params(**fields: Any) -> SamplingParams:
    return sampling_params(read(**fields), SETTINGS, default_temperature=1.0)


def history(*messages: dict[str, Any]) -> list[Message]:
    """What the engine gets for messages without media."""
    options = openai.media_options(request := read(*messages), SETTINGS, None)
    chat = asyncio.run(chat_input.from_chat(request, options, cast("Upload", None), LOADER))
    return list(chat.messages)


# -- the history of agents

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CALLED = (ToolCall("call_1", "look", '{"at": "sky"}'),)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None}, Message("assistant", ())),
        ({"role": "user", "content": None}, Message("user", ())),
        ({"role": "assistant", "content": []}, Message("assistant", ())),
        ({"role": "assistant", "content": None, "tool_calls": []}, Message("assistant", ())),
        ({"role": "assistant", "content": "x", "tool_calls": None}, Message("assistant", ("x",))),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, Message("assistant", (), CALLED)),
        ({"role": "assistant", "tool_calls": [CALL]}, Message("assistant", (), CALLED)),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL | {"index": 0}]},
            Message("assistant", ("",), CALLED),
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            Message("assistant", (), (ToolCall("", "f", '{"a":1}'),)),
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            Message("assistant", (), (ToolCall("", "f", "{}"),)),
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            Message("assistant", (), (ToolCall("", "f", "{}"),)),
        ),
        ({"role": "assistant", "content": None, "refusal": "no"}, Message("assistant", ("no",))),
        ({"role": "assistant", "refusal": "no"}, Message("assistant", ("no",))),
        ({"role": "assistant", "content": "x", "refusal": None, "audio": None}, Message("assistant", ("x",))),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
            Message("assistant", ("x",), reasoning="y"),
        ),
        ({"role": "assistant", "content": "x", "reasoning": "y"}, Message("assistant", ("x",), reasoning="y")),
        ({"role": "assistant", "content": "x", "reasoning_content": None}, Message("assistant", ("x",))),
        ({"role": "assistant", "content": "x", "reasoning_content": ""}, Message("assistant", ("x",))),
        (
            {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": "blue"},
            Message("tool", ("blue",), tool_call_id="call_1", name="look"),
        ),
        (
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "blue"}]},
            Message("tool", ("blue",), tool_call_id="call_1"),
        ),
        ({"role": "function", "name": "look", "content": "blue"}, Message("tool", ("blue",), name="look")),
        ({"role": "user", "content": "x", "id": "msg_1", "name": "Ann"}, Message("user", ("x",), name="Ann")),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            Message("user", ("x",)),
        ),
        ({"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}}, Message("user", ("x",))),
        (
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            Message("system", ("a", "b")),
        ),
        ({"role": "developer", "content": "x"}, Message("system", ("x",))),
    ],
    ids=lambda value: json.dumps(value)[:90] if isinstance(value, dict) else "",
)
def test_messages_of_a_history_reach_the_engine_as_they_are_meant(message: dict[str, Any], expected: Message) -> None:
    found = history(USER, message, USER)[1]
    fields = ("role", "content", "tool_calls", "reasoning", "tool_call_id", "name")
    assert {name: getattr(found, name) for name in fields} == {name: getattr(expected, name) for name in fields}


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user"}, "content", "missing_field"),
        ({"role": "assistant"}, "content", "missing_field"),
        ({"role": "assistant", "tool_calls": []}, "content", "missing_field"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio", "not_built"),
        ({"role": "assistant", "content": "x", "prefix": True}, "prefix", "not_built"),
        ({"role": "assistant", "content": "x", "partial": True}, "partial", "not_built"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
            "content[1].type",
            "not_built",
        ),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}, "content[0].type", "not_built"),
        ({"role": "user", "content": [{"type": "audio_url", "audio_url": {}}]}, "content[0].type", "not_built"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls", "invalid_request"),
        ({"role": "tool", "content": "x", "function_call": CALL["function"]}, "function_call", "invalid_request"),
        (
            {"role": "assistant", "tool_calls": [CALL, {"function": {"name": "f", "arguments": "{nope"}}]},
            "tool_calls[1].function.arguments",
            "invalid_request",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "tool_calls[0].function.arguments",
            "invalid_request",
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "7"}},
            "function_call.arguments",
            "invalid_request",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0].image_url", "missing_field"),
        (
            {"role": "user", "content": [{"type": "video_url", "video_url": {}}]},
            "content[0].video_url",
            "missing_field",
        ),
    ],
    ids=lambda value: json.dumps(value)[:90] if isinstance(value, dict) else "",
)
def test_messages_that_cannot_be_used_are_refused_by_name(message: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as error:
        read(USER, message)
    assert (error.value.param, error.value.code) == (f"messages[1].{param}", code)
    assert error.value.message.startswith(f"messages[1].{param} ")


def test_thoughts_and_calls_count_as_text_of_the_prompt() -> None:
    long = "x" * 1_200_000
    call = {"function": {"name": "f", "arguments": json.dumps({"a": long})}}
    for message in (
        {"role": "assistant", "content": "x", "reasoning": long},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "refusal": long},
    ):
        with pytest.raises(BadRequest, match="prompt is too long"):
            read(USER, message)


# -- fields of a request


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": None, "tools": None, "tool_choice": "none", "response_format": None, "stop": None},
        {"use_beam_search": False, "best_of": 1, "length_penalty": 1.0, "prompt_logprobs": None, "echo": False},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
        {"add_generation_prompt": True, "add_special_tokens": False, "documents": None, "truncate_prompt_tokens": None},
        {"return_token_ids": False, "return_tokens_as_token_ids": None, "logprob_token_ids": [], "bad_words": []},
        {"modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None},
        {"verbosity": "medium", "reasoning_effort": "none", "parallel_tool_calls": True, "tools": []},
        {"stop_regex": "", "no_stop_trim": False, "lora_path": None, "custom_logit_processor": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert params(seed=1, **fields) == params(seed=1)


@pytest.mark.parametrize(
    "field",
    [
        {"use_beam_search": True},
        {"best_of": 2},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 5},
        {"echo": True},
        {"logprob_token_ids": [5]},
        {"allowed_token_ids": [5]},
        {"bad_words": ["x"]},
        {"add_special_tokens": True},
        {"chat_template": "{{ messages }}"},
        {"documents": [{"text": "x"}]},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x", "format": "wav"}},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}},
        {"stop_regex": "a+"},
        {"no_stop_trim": True},
        {"lora_path": "x"},
    ],
    ids=str,
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused_by_name(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(BadRequest) as error:
        read(**field)
    assert (error.value.param, error.value.code) == (name, "not_built")
    assert error.value.message.startswith(f"{name} is not supported yet")


def test_a_nucleus_of_nothing_is_the_likeliest_token() -> None:
    for top_p in (0, 0.0, 1e-300, 1e-40):
        assert 0.0 < params(top_p=top_p).top_p <= 1e-9, "and does not vanish in single precision"
    assert params(top_p=0.5).top_p == 0.5


def test_tokens_that_end_the_answer_may_be_named() -> None:
    assert params(stop_token_ids=[7, 9, 7]).stop_token_ids == (7, 9)
    assert params(stop_token_ids=[]).stop_token_ids == params(stop_token_ids=None).stop_token_ids == ()
    with pytest.raises(BadRequest, match="at most 64 stop_token_ids are allowed"):
        params(stop_token_ids=list(range(65)))
    for wrong in ([-1], ["a"], 5):
        with pytest.raises(msgspec.ValidationError, match="stop_token_ids"):
            params(stop_token_ids=wrong)


def test_a_salt_of_the_caches_is_the_clients_and_the_keys() -> None:
    """vLLM's users share nothing with those of another salt; nor do two keys that send the same one."""
    assert _salt("", "") == ""
    salts = [_salt(key, salt) for key in ("", "a", "b") for salt in ("", "x", "y")]
    assert len(set(salts)) == len(salts)
    assert _salt("a", "x") == _salt("a", "x")
    assert params(cache_salt="x", seed=1) == params(seed=1), "it does not change the answer"
    with pytest.raises(msgspec.ValidationError, match="cache_salt"):
        params(cache_salt="x" * 1025)


@pytest.mark.parametrize("detail", [None, "auto", "original", "", 3, {}, ["low"]], ids=str)
def test_the_detail_of_an_image_may_be_anything(detail: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,", "detail": detail}}
    (message,) = read({"role": "user", "content": [part]}).messages
    assert [part.url for part in message.parts() if isinstance(part, openai.ImagePart)] == ["data:,"]


# -- media in messages of any role, and options of theirs

PNG = encoded(picture(40, 30), "PNG")


def test_pictures_may_stand_in_messages_of_any_role(server: Server) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    part = {"type": "image_url", "image_url": url}
    texts = set()
    for message in (
        {"role": "system", "content": [part]},
        {"role": "developer", "content": [{"type": "text", "text": "x"}, part]},
        {"role": "assistant", "content": [part]},
        {"role": "tool", "tool_call_id": "1", "content": [part, {"type": "text", "text": "seen"}]},
    ):
        response = server.chat(messages=[USER, message, USER])
        assert response.status_code == 200, response.text
        texts.add(response.json()["choices"][0]["message"]["content"])
    assert len(texts) == 4
    wrong = server.chat(messages=[{"role": "tool", "content": [{"type": "image_url", "image_url": "data:,x"}]}])
    assert refusal(wrong, 400)["param"] == "messages[0].content[0]"


@pytest.mark.parametrize("kind", [{}, [], ["text"], {"a": 1}, 5, True, 1.5])
def test_a_parts_type_that_is_no_text_is_refused(server: Server, kind: Any) -> None:
    """What looks up tags must not fail on what cannot be a key."""
    for unknown in ({}, {"unknown": 1}):
        part = {"type": kind, "text": "a", **unknown}
        answer = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("messages[0].content[0]")
