"""Requests of the Responses and Messages APIs become the chat completions that mean the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from service.errors import BadRequest
from service.schemas import anthropic, responses
from service.schemas.conversion import FieldNames
from service.schemas.openai import ChatRequest
from service.settings import Settings

PNG = "data:image/png;base64,AAAA"
SCHEMA = {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]}
LOOK = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
OF_CHAT = {"type": "function", "function": LOOK}
USER = {"role": "user", "content": "hi"}


def call(number: int, arguments: str = '{"at": 1}') -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}


def picture() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PNG}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def of_response(body: dict[str, Any], names: FieldNames | None = None) -> ChatRequest:
    return responses.to_chat(
        msgspec.convert({"input": "hi"} | body, responses.ResponsesRequest), names or responses.field_names()
    )


def of_message(body: dict[str, Any], names: FieldNames | None = None) -> ChatRequest:
    request = msgspec.convert({"messages": [USER]} | body, anthropic.MessagesRequest)
    return anthropic.to_chat(request, names or anthropic.field_names(), Settings())


def chat(body: dict[str, Any]) -> ChatRequest:
    return msgspec.convert({"messages": [USER]} | body, ChatRequest)


ITEM = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "look"}
RESPONSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tools": (
        {"tools": [{"type": "function", **LOOK, "strict": True}], "parallel_tool_calls": False},
        {
            "tools": [{"type": "function", "function": {**LOOK, "strict": True}}],
            "parallel_tool_calls": False,
        },
    ),
    "a tool by its name": (
        {"tools": [{"type": "function", **LOOK}], "tool_choice": {"type": "function", "name": "look"}},
        {"tools": [OF_CHAT], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ),
    "any tool": (
        {"tools": [{"type": "function", **LOOK}], "tool_choice": "required"},
        {"tools": [OF_CHAT], "tool_choice": "required"},
    ),
    "allowed tools": (
        {
            "tools": [{"type": "function", **LOOK}],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "look"}],
            },
        },
        {
            "tools": [OF_CHAT],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "look"}}],
                },
            },
        },
    ),
    "a round with tools": (
        {
            "input": [
                USER,
                {
                    "type": "reasoning",
                    "id": "rs",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm."}],
                },
                {
                    "type": "message",
                    "id": "msg",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
                },
                {**ITEM, "call_id": "c1", "arguments": '{"at": 1}'},
                {**ITEM, "call_id": "c2", "arguments": '{"at": 1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "a dog"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [
                        {"type": "input_text", "text": "this"},
                        {"type": "input_image", "image_url": PNG, "detail": None},
                    ],
                },
                {"role": "assistant", "content": "Both."},
                USER,
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [text("I look.")],
                    "reasoning_content": "Hm.",
                    "tool_calls": [call(1), call(2)],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "a dog"},
                {"role": "tool", "tool_call_id": "c2", "name": "look", "content": [text("this"), picture()]},
                {"role": "assistant", "content": "Both."},
                USER,
            ]
        },
    ),
    "calls without text, one after another": (
        {
            "input": [
                USER,
                {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "Short."}]},
                {**ITEM, "call_id": "c1", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": ""},
                {**ITEM, "call_id": "c2", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c3", "output": "of nobody"},
            ]
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "reasoning_content": "Short.", "tool_calls": [call(1, "{}")]},
                {"role": "tool", "tool_call_id": "c1", "name": "look", "content": ""},
                {"role": "assistant", "tool_calls": [call(2, "{}")]},
                {"role": "tool", "tool_call_id": "c3", "content": "of nobody"},
            ]
        },
    ),
    "two answers in a row": (
        {"input": [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    "a refusal": (
        {"input": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
        {"messages": [USER, {"role": "assistant", "content": [text("No.")]}]},
    ),
    "form and effort": (
        {
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
            "reasoning": {"effort": "low", "summary": "auto"},
        },
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "reasoning_effort": "low",
        },
    ),
    "sampling": (
        {"max_output_tokens": 7, "top_p": 0.5, "seed": 3, "top_logprobs": 2, "num_frames": 4, "stream": True},
        {
            "max_completion_tokens": 7,
            "top_p": 0.5,
            "seed": 3,
            "top_logprobs": 2,
            "logprobs": True,
            "num_frames": 4,
            "stream": True,
        },
    ),
    "log-probabilities by include": ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
    "media with options": (
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": PNG, "detail": "low", "max_pixels": 9},
                        {"type": "input_video", "video_url": "data:video/mp4;base64,AAAA", "fps": 2.0},
                    ],
                }
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}, "max_pixels": 9},
                        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "fps": 2.0},
                    ],
                }
            ]
        },
    ),
}


@pytest.mark.parametrize(("body", "expected"), RESPONSES.values(), ids=RESPONSES)
def test_a_response_is_a_chat(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert of_response(body) == chat(expected)


TOOL = {"name": "look", "description": "Looks.", "input_schema": SCHEMA}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def use(number: int, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"c{number}",
        "name": "look",
        "input": {"at": 1} if arguments is None else arguments,
    }


MESSAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tools": ({"tools": [{**TOOL, **CACHED, "type": "custom"}]}, {"tools": [OF_CHAT]}),
    "any tool, but one": (
        {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tools": [OF_CHAT], "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "a tool by its name": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}},
        {"tools": [OF_CHAT], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ),
    "no tool": (
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        {"tools": [OF_CHAT], "tool_choice": "none"},
    ),
    "a round with tools": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        text("I look."),
                        use(1),
                        use(2, {}),
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": "a dog", **CACHED},
                        {
                            "type": "tool_result",
                            "tool_use_id": "c2",
                            "content": [text("this"), IMAGE],
                            "is_error": False,
                        },
                        {"type": "tool_result", "tool_use_id": "c3"},
                        text("And now?"),
                        IMAGE,
                    ],
                },
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [text("I look.")],
                    "reasoning_content": "Hm.",
                    "tool_calls": [call(1, '{"at":1}'), call(2, "{}")],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "a dog"},
                {"role": "tool", "tool_call_id": "c2", "name": "look", "content": [text("this"), picture()]},
                {"role": "tool", "tool_call_id": "c3", "content": ""},
                {"role": "user", "content": [text("And now?"), picture()]},
            ]
        },
    ),
    "results behind and between texts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        text("a"),
                        {"type": "tool_result", "tool_use_id": "c1", "content": "x"},
                        text("b"),
                        text("c"),
                    ],
                }
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [text("a")]},
                {"role": "tool", "tool_call_id": "c1", "content": "x"},
                {"role": "user", "content": [text("b"), text("c")]},
            ]
        },
    ),
    "calls alone": (
        {"messages": [USER, {"role": "assistant", "content": [use(1)]}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call(1, '{"at":1}')]}]},
    ),
    "a system message in between": (
        {"messages": [USER, {"role": "system", "content": [text("Now."), text("Then.")]}]},
        {"messages": [USER, {"role": "system", "content": [text("Now."), text("Then.")]}]},
    ),
    "sampling": (
        {"max_tokens": 10**6, "stop_sequences": ["x"], "top_k": 3, "temperature": 0.5, "seed": 9},
        {"max_tokens": 2048, "stop": ["x"], "top_k": 3, "temperature": 0.5, "seed": 9},
    ),
    "a stream": (
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "form and effort": (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "high"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "reasoning_effort": "high"},
    ),
    "no thinking": ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"reasoning_effort": "medium"}),
    "thinking unseen": (
        {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "low"}},
        {"reasoning_effort": "low", "include_reasoning": False},
    ),
    "an answer that is begun": (
        {"messages": [USER, {"role": "assistant", "content": "The dog is"}]},
        {
            "messages": [USER, {"role": "assistant", "content": "The dog is"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
}


@pytest.mark.parametrize(("body", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_a_message_is_a_chat(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert of_message(body) == chat(expected)


def test_a_name_in_an_error_is_that_of_the_request() -> None:
    names = responses.field_names()
    of_response(RESPONSES["a round with tools"][0] | RESPONSES["allowed tools"][0] | {"max_output_tokens": 3}, names)
    for name, own in {
        "messages[0].content": "input[0].content",
        "messages[1].content[0]": "input[2].content[0]",
        "messages[1].tool_calls[1].function.arguments": "input[4].arguments",
        "messages[1].tool_calls[0].id": "input[3].call_id",
        "messages[3].content[1].image_url": "input[6].output[1].image_url",
        "messages[3].tool_call_id": "input[6].call_id",
        "tools[0].function.parameters.type": "tools[0].parameters.type",
        "tool_choice.allowed_tools.tools[0].function.name": "tool_choice.tools[0].name",
        "response_format.json_schema.schema.properties": "text.format.schema.properties",
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "messages[10]": "input[10]",
        "temperature": "temperature",
    }.items():
        assert names.own(name) == own
    names = anthropic.field_names()
    of_message(MESSAGES["a round with tools"][0] | MESSAGES["tools"][0] | {"system": "s"}, names)
    for name, own in {
        "messages[0].content": "system",
        "messages[1].content": "messages[0].content",
        "messages[2].content[0]": "messages[1].content[2]",
        "messages[2].tool_calls[1].function.arguments.at": "messages[1].content[4].input.at",
        "messages[4].content[1]": "messages[2].content[1].content[1]",
        "messages[6].content[1].image_url": "messages[2].content[4].image_url",
        "tools[0].function.parameters": "tools[0].input_schema",
        "stop": "stop_sequences",
    }.items():
        assert names.own(name) == own


def test_names_in_a_message_are_changed_where_they_are_names() -> None:
    names = responses.field_names()
    names.add("messages[1]", "input[2]")
    error = BadRequest(
        "messages[1].content: 3 messages, max_completion_tokens and messages[1]", param="messages[1].content"
    )
    names.rename(error)
    assert error.message == "input[2].content: 3 messages, max_output_tokens and input[2]"
    assert error.param == "input[2].content"


def test_errors_of_long_conversations_are_named_at_once() -> None:
    """One pattern of all names took seconds to compile, in which no other request went on."""
    names = FieldNames({"messages": "input", "max_tokens": "max_output_tokens"})
    for index in range(5000):
        names.add(f"messages[{index}]", f"input[{index + 1}]")
        names.add(f"messages[{index}].tool_calls[0].function", f"input[{index + 1}]")
    for index in range(1, 5000, 50):
        error = BadRequest(
            f"messages[{index}].tool_calls[0].function.name and messages[{index}].content[3].text are no messages. "
            "max_tokens is all right, so is x.max_tokens; leave the messages.",
            param=f"messages[{index}].content",
        )
        names.rename(error)
        own = f"input[{index + 1}]"
        assert error.param == f"{own}.content"
        assert error.message == (
            f"{own}.name and {own}.content[3].text are no messages. "
            "max_output_tokens is all right, so is x.max_tokens; leave the messages."
        )
