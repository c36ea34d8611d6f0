"""Test tools and reasoning over HTTP with OpenAI's client: what large models say, scripted, on a real engine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.model.chat_templates import call
from tests.model.scripted import say
from tests.service.server import Server

ENGINE = "tests.service.scripted_engine:load"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Berlin"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
PARIS: dict[str, Any] = {"city": "Paris", "days": 2}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
Clients = Callable[[str], openai.OpenAI]


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    """A client of a server for each kind of chat template, started when a test asks for it."""
    with ExitStack() as resources:

        @cache
        def client(kind: str) -> openai.OpenAI:
            folder = resources.enter_context(tempfile.TemporaryDirectory())
            server = Server(Path(folder), {"kind": kind}, {"engine": ENGINE})

            def close() -> None:
                assert server.close() == 0, server.log_text()

            resources.callback(close)
            return resources.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0))

        yield client


def put_together_function(chunks: list[Any]) -> tuple[str | None, str, Any, str]:
    """The same of a stream in OpenAI's former way: text, name and arguments of the one call, finish_reason."""
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    calls = [delta.function_call for delta in deltas if delta.function_call]
    assert not any(delta.tool_calls for delta in deltas)
    assert [call.name for call in calls[1:]] == [None] * (len(calls) - 1)
    text = "".join(delta.content or "" for delta in deltas)
    arguments = json.loads("".join(call.arguments for call in calls))
    return text or None, calls[0].name, arguments, chunks[-1].choices[0].finish_reason


@pytest.fixture(scope="module")
def client(clients: Clients) -> openai.OpenAI:
    return clients("hermes")


def ask(client: openai.OpenAI, content: Any, **fields: Any) -> Any:
    messages: Any = content if isinstance(content, list) else [{"role": "user", "content": content}]
    fields = {"max_tokens": 200, "temperature": 0, "tools": [WEATHER, CLOCK]} | fields
    fields = {name: value for name, value in fields.items() if value is not None}
    return client.chat.completions.create(model="demo", messages=messages, **fields)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or []]


def put_together(chunks: list[Any]) -> tuple[str | None, str | None, list[tuple[str, Any]], str]:
    """Put a stream together as clients do, and check the form of its deltas."""
    text, reasoning, reason = "", "", ""
    calls: list[list[str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            text += delta.content or ""
            reasoning += (delta.model_extra or {}).get("reasoning_content") or ""
            for each in delta.tool_calls or []:
                if each.index == len(calls):
                    assert (each.type, each.function.arguments) == ("function", "")
                    assert each.id.startswith("call_")
                    calls.append([each.function.name, ""])
                else:
                    assert (each.id, each.type, each.function.name) == (None, None, None)
                    assert each.index == len(calls) - 1
                    calls[each.index][1] += each.function.arguments
            reason = choice.finish_reason or reason
    return text or None, reasoning or None, [(name, json.loads(arguments)) for name, arguments in calls], reason


@pytest.mark.parametrize("kind", ["hermes", "mistral"])
def test_calls_of_the_models_own_accord_are_told_from_text(clients: Clients, kind: str) -> None:
    client, written = clients(kind), call(kind, "get_weather", PARIS, ("clock", {}))
    prompt = say(f"Let me see.\n{written}")
    answer = ask(client, prompt).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Let me see."
    assert calls_of(answer.message) == [("get_weather", PARIS), ("clock", {})]
    assert len({one.id for one in answer.message.tool_calls}) == 2
    chunks = list(ask(client, prompt, stream=True))
    assert put_together(chunks) == (answer.message.content, None, calls_of(answer.message), "tool_calls")
    plain = ask(client, say("It is warm. <tool")).choices[0]
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", "It is warm. <tool", None)


def test_a_whole_round_reaches_the_model_and_its_results_too(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": say(call("hermes", "get_weather", PARIS), "It is 7 degrees.")}]
    first = ask(client, messages)
    assert first.usage.prompt_tokens > ask(client, messages, tools=None).usage.prompt_tokens
    messages.append(first.choices[0].message)
    messages.append({"role": "tool", "tool_call_id": first.choices[0].message.tool_calls[0].id, "content": "7"})
    second = ask(client, messages)
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is 7 degrees.", "stop")
    messages[-1]["content"] = "7 and a half"
    assert ask(client, messages).usage.prompt_tokens > second.usage.prompt_tokens


@pytest.mark.parametrize("kind", ["hermes", "plain"])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 5}], ids=["greedy", "sampled"])
def test_required_and_named_calls_are_valid_whatever_the_model_would_say(
    clients: Clients, kind: str, fields: dict[str, Any]
) -> None:
    client = clients(kind)
    answers = [
        ask(client, "Hello", tool_choice=choice, speculation=None, extra_body={"speculation": speculation}, **fields)
        for choice in ("required", NAMED)
        for speculation in ("auto", "off")
    ]
    for answer in answers:
        (choice,) = answer.choices
        assert choice.finish_reason in ("tool_calls", "length")
        found = choice.message.tool_calls
        assert {one.function.name for one in found} <= {"get_weather", "clock"}
        for one in found[: len(found) - (choice.finish_reason == "length")]:
            arguments = json.loads(one.function.arguments)
            if one.function.name == "get_weather":
                assert arguments["city"] in ("Paris", "Berlin")
                assert isinstance(arguments["days"], int)
            else:
                assert arguments == {}
        assert choice.message.content is None
    for on, off in (answers[:2], answers[2:]):
        assert calls_of_raw(on) == calls_of_raw(off), "a draft changes nothing"
    assert [one.function.name for one in answers[2].choices[0].message.tool_calls] == ["get_weather"]


def calls_of_raw(answer: Any) -> list[tuple[str, str]]:
    return [(one.function.name, one.function.arguments) for one in answer.choices[0].message.tool_calls]


def test_a_forced_call_is_what_the_model_would_say_where_it_says_one(client: openai.OpenAI) -> None:
    written = call("hermes", "get_weather", PARIS, ("clock", {}))
    answer = ask(client, say(written), tool_choice="required")
    assert calls_of(answer.choices[0].message) == [("get_weather", PARIS), ("clock", {})]
    one = ask(client, say(written), tool_choice="required", parallel_tool_calls=False)
    assert calls_of(one.choices[0].message) == [("get_weather", PARIS)]
    auto = ask(client, say(written), parallel_tool_calls=False)
    assert calls_of(auto.choices[0].message) == [("get_weather", PARIS)]
    chosen = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}}
    other = ask(client, say(written), tool_choice=chosen)
    assert {name for name, _ in calls_of(other.choices[0].message)} == {"clock"}
    both = ask(client, say(written), n=2, stream=True, tool_choice="required", temperature=1, seed=3)
    chunks = list(both)
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert put_together(own)[2:] == ([("get_weather", PARIS), ("clock", {})], "tool_calls")


FUNCTIONS = {"tools": None, "functions": [WEATHER["function"], CLOCK["function"]]}


def test_functions_are_tools_and_are_answered_in_openais_former_way(client: openai.OpenAI) -> None:
    """LangChain's older agents and AutoGen still send them."""
    two = "Let me see.\n" + call("hermes", "get_weather", PARIS) + "\n" + call("hermes", "clock", {})
    (choice,) = ask(client, say(two), **FUNCTIONS).choices
    assert choice.finish_reason == "function_call"
    message = choice.message
    assert (message.content, message.tool_calls) == ("Let me see.", None)
    assert (message.function_call.name, json.loads(message.function_call.arguments)) == ("get_weather", PARIS)
    streamed = put_together_function(list(ask(client, say(two), stream=True, **FUNCTIONS)))
    assert streamed == ("Let me see.", "get_weather", PARIS, "function_call")
    tools = ask(client, say(two), parallel_tool_calls=False).choices[0].message
    assert calls_of(tools) == [("get_weather", PARIS)], "the prompt is that of tools"


def test_a_function_is_forced_or_forbidden(client: openai.OpenAI) -> None:
    (choice,) = ask(client, say("No."), function_call={"name": "get_weather"}, **FUNCTIONS).choices
    assert (choice.finish_reason, choice.message.function_call.name) == ("function_call", "get_weather")
    assert set(json.loads(choice.message.function_call.arguments)) == {"city", "days"}
    written = call("hermes", "clock", {})
    (choice,) = ask(client, say(written), function_call="none", **FUNCTIONS).choices
    assert (choice.finish_reason, choice.message.function_call, choice.message.content) == ("stop", None, written)
    (choice,) = ask(client, say("Good day."), function_call="auto", **FUNCTIONS).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "Good day.")


def test_a_round_of_functions_reaches_the_model(client: openai.OpenAI) -> None:
    script = say(call("hermes", "get_weather", PARIS), "It rains.")
    history = [{"role": "user", "content": script}]
    message = ask(client, history, **FUNCTIONS).choices[0].message
    history += [message.model_dump(), {"role": "function", "name": "get_weather", "content": "rain"}]
    (choice,) = ask(client, history, **FUNCTIONS).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "It rains.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [CLOCK]}, "functions"),
        ({"tool_choice": "auto"}, "functions"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
        ({"functions": [{"name": "f", "parameters": {"type": "array"}}]}, "functions[0].parameters.type"),
        ({"functions": [CLOCK["function"]], "function_call": {"name": "g"}}, "function_call.name"),
        ({"function_call": "maybe"}, "function_call"),
        ({"functions": None, "function_call": {"name": "clock"}}, "function_call.name"),
        (
            {
                "functions": [{"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}],
                "function_call": {"name": "f"},
            },
            "functions",
        ),
    ],
    ids=lambda value: str(value)[:70],
)
def test_functions_that_cannot_be_used_are_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "Hello", **FUNCTIONS | fields)
    assert error.value.param == param


def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI) -> None:
    written = call("hermes", "get_weather", PARIS)
    none = ask(client, say(written), tool_choice="none")
    assert (none.choices[0].message.content, none.choices[0].finish_reason) == (written, "stop")
    without = ask(client, say(written), tools=None)
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    unknown = ask(client, say(written), tools=[CLOCK])
    assert (unknown.choices[0].message.content, unknown.choices[0].message.tool_calls) == (written, None)


def test_strict_tools_keep_to_their_schema_of_the_models_own_accord(client: openai.OpenAI) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    wrong = say(f"Let me see. {call('hermes', 'get_weather', {'city': 'Rome', 'days': 'two'})}")
    assert calls_of(ask(client, wrong).choices[0].message) == [("get_weather", {"city": "Rome", "days": "two"})]
    answer = ask(client, wrong, tools=[strict]).choices[0]
    assert answer.message.content.startswith("Let me see.")
    name, arguments = answer.message.tool_calls[0].function.name, answer.message.tool_calls[0].function.arguments
    assert name == "get_weather"
    assert arguments.startswith(('{"city": "Paris", "days": ', '{"city": "Berlin", "days": '))


def test_an_answer_is_calls_or_content_of_the_form_that_was_sent(client: openai.OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    called = ask(client, say(call("hermes", "get_weather", PARIS)), response_format=form).choices[0]
    assert calls_of(called.message) == [("get_weather", PARIS)]
    written = ask(client, say('{"a": 7}'), response_format=form).choices[0]
    assert (written.message.content, written.message.tool_calls) == ('{"a": 7}', None)


class GetWeather(BaseModel):
    """Tells the weather."""

    city: str
    days: int


def test_the_clients_helpers_work(client: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
    prompt = say(f"Let me see.\n{call('hermes', 'get_weather', PARIS)}")
    fields: Any = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "tools": tools}
    parsed = client.chat.completions.parse(**fields)
    (one,) = parsed.choices[0].message.tool_calls or []
    assert one.function.parsed_arguments == GetWeather(**PARIS)
    pieces = []
    with client.chat.completions.stream(**fields) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
            if event.type == "tool_calls.function.arguments.done":
                assert event.parsed_arguments == GetWeather(**PARIS)
        final = stream.get_final_completion()
    assert json.loads("".join(pieces)) == PARIS
    assert len(pieces) > 2
    assert final.choices[0].message.tool_calls[0].function.arguments == one.function.arguments  # type: ignore[index]


def test_reasoning_is_split_off(clients: Clients) -> None:
    client = clients("qwen3")
    prompt = say(f"<think>\nIs 1 < 2?\n</think>\n\nYes.\n{call('qwen3', 'clock', {})}")
    answer = ask(client, prompt).choices[0]
    extra = answer.message.model_extra
    assert extra["reasoning_content"] == extra["reasoning"] == "Is 1 < 2?"
    assert (answer.message.content, calls_of(answer.message)) == ("Yes.", [("clock", {})])
    chunks = list(ask(client, prompt, stream=True))
    assert put_together(chunks) == ("Yes.", "Is 1 < 2?", [("clock", {})], "tool_calls")
    hidden = ask(client, prompt, extra_body={"include_reasoning": False}).choices[0].message
    assert "reasoning_content" not in hidden.model_extra
    assert hidden.content == "Yes."
    for opened in (ask(clients("thinking"), say("So.\n</think>\n\nHi"), tools=None).choices[0].message,):
        assert (opened.content, opened.model_extra["reasoning_content"]) == ("Hi", "So.")


def test_thinking_is_switched_as_templates_have_it(clients: Clients) -> None:
    client = clients("qwen3")
    switches: dict[str, dict[str, Any]] = {
        "default": {},
        "off": {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        "on": {"extra_body": {"chat_template_kwargs": {"enable_thinking": True, "unknown": 1}}},
        "none": {"reasoning_effort": "none"},
        "high": {"reasoning_effort": "high"},
        "both": {"reasoning_effort": "none", "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    }
    tokens = {
        name: ask(client, say("Hi"), tools=None, **fields).usage.prompt_tokens for name, fields in switches.items()
    }
    assert tokens["off"] == tokens["none"] > tokens["default"] == tokens["on"] == tokens["high"] == tokens["both"]


def test_the_model_may_think_before_what_is_forced(clients: Clients) -> None:
    form: Any = {"type": "json_object"}
    for kind, thought in (("qwen3", "<think>\nSo {\n</think>\n\n"), ("thinking", "So {\n</think>\n\n"), ("qwen3", "")):
        answer = ask(clients(kind), say(thought + '{"a": 1}'), tools=None, response_format=form).choices[0]
        assert answer.message.content == '{"a": 1}'
        assert answer.message.model_extra.get("reasoning_content") == ("So {" if thought else None)
        called = ask(clients(kind), say(thought + call("qwen3", "clock", {})), tool_choice="required").choices[0]
        assert calls_of(called.message) == [("clock", {})]
        assert called.message.model_extra.get("reasoning_content") == ("So {" if thought else None)


def test_an_answer_continues_the_last_message(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": say("It is a red circle.")}, {"role": "assistant", "content": "It is a"}]
    answer = ask(client, messages, tools=None, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == " red circle."
    bare = ask(client, messages[:1], tools=None, extra_body={"add_generation_prompt": False}, max_tokens=1)
    assert bare.usage.prompt_tokens < ask(client, messages[:1], tools=None, max_tokens=1).usage.prompt_tokens


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | function}


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"tools": [WEATHER, 7]}, "tools[1]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
    ({"tools": [tool(name=None)]}, "tools[0].function.name"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
    ({"tools": [tool(description=7)]}, "tools[0].function.description"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [tool(name=f"f{number}") for number in range(129)]}, "tools"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tools": None, "tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tool_choice": 7}, "tool_choice"),
    ({"tools": [tool(parameters={"properties": {"a": {"$ref": "http://x"}}})], "tool_choice": "required"}, "tools"),
    ({"extra_body": {"chat_template_kwargs": []}}, "chat_template_kwargs"),
    (
        {"extra_body": {"continue_final_message": True, "add_generation_prompt": True}},
        "continue_final_message",
    ),
    ({"extra_body": {"continue_final_message": True}}, None),
    ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_done_is_refused_by_its_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None
) -> None:
    if param is None:  # a user's message may be continued, too
        assert ask(client, "It is", **fields).choices
        return
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "Hello", **fields)
    assert refused.value.param == param
    assert param in str(refused.value)


def test_too_many_bytes_of_tools_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, "Hello", tools=[tool(description="x" * 140_000)])
    assert (refused.value.status_code, refused.value.param) == (413, "tools")
