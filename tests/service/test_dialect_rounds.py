"""Whole rounds at the Responses and Messages APIs: forms, tools and reasoning, by the official clients.

The target is scripted: it says what large models say.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.model.chat_templates import call
from tests.model.scripted import say
from tests.service import test_messages as messages
from tests.service import test_responses as responses
from tests.service.server import Server
from tests.service.streams import read_events


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"engine": "tests.service.scripted_engine:load"}
        server = Server(Path(folder), {"kind": "qwen3", "says": "Good day."}, settings, wait=False)
        server.wait(lambda: server.http.get("/readyz").status_code == 200, 240)  # it makes its checkpoint first
        yield server
        assert server.close() == 0, server.log_text()


@pytest.fixture(scope="module")
def of_openai(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def of_anthropic(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


class Box(BaseModel):
    label: Literal["red", "blue"]
    left: int
    top: int


class Page(BaseModel):
    title: str
    boxes: list[Box]


PAGE = Page(title="Übersicht", boxes=[Box(label="red", left=1, top=22)])
# What the model says by itself, and whether its answer keeps to the form only since it must.
SAID = [json.dumps(PAGE.model_dump(), ensure_ascii=False), f"Sure! {PAGE.model_dump_json()}"]


@pytest.mark.parametrize("script", SAID, ids=["keeps to it", "would not"])
def test_a_response_is_parsed(of_openai: openai.OpenAI, script: str) -> None:
    content: Any = [responses.user(responses.image(), responses.text(say(script)))]
    fields: Any = {"model": "demo", "input": content, "temperature": 0, "max_output_tokens": 500}
    answer = of_openai.responses.parse(**fields, text_format=Page)
    assert answer.output_parsed is not None
    assert script != SAID[0] or answer.output_parsed == PAGE
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"
    with of_openai.responses.stream(**fields, text_format=Page) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert final.output_parsed == answer.output_parsed == done[0].parsed
    listed = of_openai.responses.create(**fields, text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(listed.output_text), dict)


@pytest.mark.parametrize("script", SAID, ids=["keeps to it", "would not"])
def test_a_message_is_parsed(of_anthropic: anthropic.Anthropic, server: Server, script: str) -> None:
    content: Any = [messages.user(messages.image(), messages.text(say(script)))]
    fields: Any = {"model": "demo", "messages": content, "max_tokens": 500, "extra_body": {"temperature": 0}}
    answer = of_anthropic.messages.parse(**fields, output_format=Page)
    assert answer.parsed_output is not None
    assert script != SAID[0] or answer.parsed_output == PAGE
    with of_anthropic.messages.stream(**fields, output_format=Page) as stream:
        final = stream.get_final_message()
    assert final.parsed_output == answer.parsed_output
    form = {"type": "json_schema", "schema": Page.model_json_schema()}
    body = {"messages": content, "max_tokens": 500, "temperature": 0}
    for place in ({"output_format": form}, {"output_config": {"format": form}}):
        whole = server.http.post("/v1/messages", json=body | place).json()
        Page.model_validate_json(whole["content"][0]["text"])


def test_a_form_that_cannot_be_compiled_is_named_as_it_was_sent(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    refused = server.http.post("/v1/responses", json={"input": "x", "text": {"format": form}})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith("text.format")
    assert "response_format" not in refused.text
    body = {"messages": [messages.user(messages.text("x"))], "max_tokens": 9}
    config = {"format": {"type": "json_schema", "schema": schema}}
    refused = server.http.post("/v1/messages", json=body | {"output_config": config})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("output_config.format")
    assert "response_format" not in refused.text
    both = {"text": {"format": form}, "guided_regex": "a"}
    assert server.http.post("/v1/responses", json={"input": "x", **both}).status_code == 400


# --- tools and reasoning

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}, "name": {"type": "string"}},
    "required": ["at", "name"],
    "additionalProperties": False,
}
LOOK: dict[str, Any] = {"name": "look", "description": "Looks at a place."}
FUNCTION = {"type": "function", **LOOK, "parameters": SCHEMA, "strict": True}
STOP = {"type": "function", "name": "stop", "description": "Stops.", "parameters": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [FUNCTION, STOP]
INPUT_TOOLS: list[Any] = [
    {**LOOK, "input_schema": SCHEMA},
    {"name": "stop", "description": "Stops.", "input_schema": {"type": "object", "properties": {}}},
]
ARGUMENTS = {"at": [1, 20], "name": 'the "U"'}
THOUGHT = "<think>\nI should look.\n</think>\n\n"
CALLS = call("qwen3", "look", ARGUMENTS, ("stop", {}))
ROUND = say(f"{THOUGHT}Let me look.\n{CALLS}", f"{THOUGHT}It is a dog.")


def test_a_round_of_responses_with_tools(of_openai: openai.OpenAI, server: Server) -> None:
    items: list[Any] = [responses.user(responses.image(), responses.text(ROUND))]
    fields: Any = {"model": "demo", "tools": TOOLS, "temperature": 0, "max_output_tokens": 300}
    answer = of_openai.responses.parse(**fields, input=items)
    whole: Any = answer.output
    assert [item.type for item in whole] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.status for item in whole] == ["completed"] * 4
    assert whole[0].content[0].text == "I should look."
    assert answer.output_text == "Let me look."
    assert (whole[2].name, json.loads(whole[2].arguments)) == ("look", ARGUMENTS)
    assert whole[2].parsed_arguments == ARGUMENTS
    assert (whole[3].name, json.loads(whole[3].arguments)) == ("stop", {})
    assert answer.usage is not None
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
    body = {**fields, "input": items, "stream": True}
    events = read_events(server.http.post("/v1/responses", json=body).text)
    responses.check_events(events)
    last = events[-1]["response"]
    assert [strip(item) for item in last["output"]] == [strip(item.to_dict()) for item in whole]
    details = last["usage"]["output_tokens_details"]
    assert details["reasoning_tokens"] == answer.usage.output_tokens_details.reasoning_tokens
    with of_openai.responses.stream(**fields, input=items) as stream:
        final: Any = stream.get_final_response()
    assert final.output[2].parsed_arguments == ARGUMENTS
    items += [item.to_dict() for item in answer.output]
    seen = [responses.image("blue"), responses.text("a picture of it")]
    items += [{"type": "function_call_output", "call_id": whole[2].call_id, "output": seen}]
    items += [{"type": "function_call_output", "call_id": whole[3].call_id, "output": "stopped"}]
    second = of_openai.responses.create(**fields, input=items)
    assert second.output_text == "It is a dog."
    assert [item.type for item in second.output] == ["reasoning", "message"]


def strip(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without its ids and what the client added."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id", "parsed_arguments")} | {
        "content": [
            {name: value for name, value in part.items() if name != "parsed"} for part in item.get("content", ())
        ]
    }


def test_a_round_of_messages_with_tools(of_anthropic: anthropic.Anthropic, server: Server) -> None:
    conversation: list[Any] = [messages.user(messages.image(), messages.text(ROUND))]
    body: Any = {"tools": INPUT_TOOLS, "max_tokens": 300}
    fields = {"model": "demo", **body, "extra_body": {"temperature": 0}}
    answer: Any = of_anthropic.messages.create(**fields, messages=conversation)
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (answer.content[0].thinking, answer.content[1].text) == ("I should look.", "Let me look.")
    assert (answer.content[2].name, answer.content[2].input) == ("look", ARGUMENTS)
    assert (answer.content[3].name, answer.content[3].input) == ("stop", {})
    assert answer.stop_reason == "tool_use"
    assert 0 < answer.usage.output_tokens_details.thinking_tokens < answer.usage.output_tokens
    streamed = {**body, "temperature": 0, "messages": conversation, "stream": True}
    message = messages.check_events(read_events(server.http.post("/v1/messages", json=streamed).text))
    assert [block.model_dump(exclude={"id"}) for block in message.content] == [
        block.model_dump(exclude={"id"}) for block in answer.content
    ]
    assert message.stop_reason == "tool_use"
    with of_anthropic.messages.stream(**fields, messages=conversation) as stream:
        final: Any = stream.get_final_message()
    assert final.content[2].input == ARGUMENTS
    seen = [messages.image("blue"), messages.text("a picture of it")]
    results = [{"type": "tool_result", "tool_use_id": answer.content[2].id, "content": seen}]
    results += [{"type": "tool_result", "tool_use_id": answer.content[3].id, "content": "stopped"}]
    conversation += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    second: Any = of_anthropic.messages.create(**fields, messages=conversation)
    assert [block.type for block in second.content] == ["thinking", "text"]
    assert (second.content[1].text, second.stop_reason) == ("It is a dog.", "end_turn")


@pytest.mark.parametrize("script", ["I would rather not.", call("qwen3", "stop", {}), THOUGHT + "No."])
def test_a_call_can_be_forced(of_openai: openai.OpenAI, of_anthropic: anthropic.Anthropic, script: str) -> None:
    """Whatever the model would say: the grammar binds it to the call and its arguments to their schema."""
    prompt = say(script)
    thinks = script.startswith(THOUGHT)
    fields: Any = {"model": "demo", "input": prompt, "tools": TOOLS, "temperature": 0, "max_output_tokens": 900}
    fields |= {} if thinks else {"reasoning": {"effort": "none"}}
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    named: Any = {"type": "function", "name": "look"}
    for choice in (named, allowed):
        answer = of_openai.responses.create(**fields, tool_choice=choice)
        (called,) = [item for item in answer.output if item.type == "function_call"]
        assert called.name == "look"
        jsonschema.validate(json.loads(called.arguments), SCHEMA)
    conversation: Any = [messages.user(messages.text(prompt))]
    tool: Any = {"type": "tool", "name": "look", "disable_parallel_tool_use": True}
    fields = {"model": "demo", "messages": conversation, "tools": INPUT_TOOLS, "max_tokens": 900}
    fields |= {"extra_body": {"temperature": 0}} | ({} if thinks else {"thinking": {"type": "disabled"}})
    message: Any = of_anthropic.messages.create(**fields, tool_choice=tool)
    (used,) = [block for block in message.content if block.type == "tool_use"]
    assert (used.name, message.stop_reason) == ("look", "tool_use")
    jsonschema.validate(used.input, SCHEMA)
    anything: Any = {"type": "any"}
    message = of_anthropic.messages.create(**fields, tool_choice=anything)
    assert [block.type for block in message.content][-1] == "tool_use"
    assert (message.content[0].type == "thinking") == thinks


def test_without_a_choice_for_tools_text_stays_text(of_openai: openai.OpenAI, server: Server) -> None:
    fields: Any = {"model": "demo", "input": say(CALLS), "temperature": 0, "max_output_tokens": 300}
    none_wanted: Any = {"tools": TOOLS, "tool_choice": "none"}
    choices: list[Any] = [{}, none_wanted]
    for tools in choices:
        assert of_openai.responses.create(**fields, **tools).output_text == CALLS
    one = of_openai.responses.create(**fields, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call"]
    body = {"messages": [messages.user(messages.text(say(CALLS)))], "max_tokens": 300, "temperature": 0}
    none = server.http.post("/v1/messages", json=body | {"tools": INPUT_TOOLS, "tool_choice": {"type": "none"}}).json()
    assert (none["content"][0]["text"], none["stop_reason"]) == (CALLS, "end_turn")


def test_a_call_that_was_cut_is_not_lost(server: Server) -> None:
    body = {"messages": [messages.user(messages.text(say(CALLS)))], "temperature": 0, "tools": INPUT_TOOLS}
    cut = server.http.post("/v1/messages", json=body | {"max_tokens": 22}).json()
    assert cut["stop_reason"] == "max_tokens"
    assert cut["content"][-1]["type"] == "tool_use"
    assert '"at"' in cut["content"][-1]["input"]["INVALID_JSON"]
    answer = server.http.post(
        "/v1/responses", json={"input": say(CALLS), "tools": TOOLS, "temperature": 0, "max_output_tokens": 22}
    ).json()
    assert (answer["status"], answer["output"][-1]["status"]) == ("incomplete", "incomplete")
    assert answer["output"][-1]["type"] == "function_call"


def test_thinking_can_be_switched(server: Server) -> None:
    conversation = [messages.user(messages.text(say(f"{THOUGHT}It is a dog.")))]
    body: dict[str, Any] = {"messages": conversation, "max_tokens": 300, "temperature": 0}

    def kinds(**fields: Any) -> list[str]:
        return [block["type"] for block in server.http.post("/v1/messages", json=body | fields).json()["content"]]

    assert kinds() == kinds(thinking={"type": "enabled", "budget_tokens": 1024}) == ["thinking", "text"]
    assert kinds(thinking={"type": "adaptive", "display": "omitted"}) == ["text"]

    def tokens(**fields: Any) -> int:
        counted = server.http.post("/v1/messages/count_tokens", json={"messages": conversation} | fields)
        return int(counted.json()["input_tokens"])

    assert tokens(thinking={"type": "disabled"}) > tokens() == tokens(thinking={"type": "adaptive"})
    assert tokens(tools=INPUT_TOOLS) > tokens() + 20


def test_an_answer_can_be_begun(server: Server) -> None:
    """Anthropic's clients put words into the assistant's mouth; the answer goes on from there."""
    conversation = [messages.user(messages.text(say("It is a dog."))), {"role": "assistant", "content": "It is"}]
    body = {"messages": conversation, "max_tokens": 30, "temperature": 0}
    more = {"continue_final_message": True, "add_generation_prompt": False}
    chat = server.http.post("/v1/chat/completions", json=body | more).json()
    answer = server.http.post("/v1/messages", json=body).json()
    assert answer["content"][-1]["text"] == chat["choices"][0]["message"]["content"]
    assert (
        answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    )


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ({"parameters": {"type": "array"}}, "parameters.type"),
        ({"parameters": {"type": "object", "properties": []}}, "parameters.properties"),
        ({"name": "no blanks"}, "name"),
        ({"name": ""}, "name"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_tool_is_named_as_it_was_sent(server: Server, tool: dict[str, Any], name: str) -> None:
    refused = server.http.post("/v1/responses", json={"input": "x", "tools": [STOP, FUNCTION | tool]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"tools[1].{name}")
    assert "function." not in refused.json()["error"]["message"]
    own = {"input_schema" if key == "parameters" else key: value for key, value in tool.items()}
    body = {"messages": [messages.user(messages.text("x"))], "tools": [INPUT_TOOLS[1], INPUT_TOOLS[0] | own]}
    refused = server.http.post("/v1/messages", json=body)
    param = f"tools[1].{name.replace('parameters', 'input_schema')}"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_choice_of_a_tool_that_is_not_there_is_named_as_it_was_sent(server: Server) -> None:
    choice: dict[str, Any] = {"type": "function", "name": "nothing"}
    refused = server.http.post("/v1/responses", json={"input": "x", "tools": TOOLS, "tool_choice": choice})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice.name")
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    refused = server.http.post("/v1/responses", json={"input": "x", "tools": TOOLS, "tool_choice": choice})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice.tools[0].name")
    body = {"messages": [messages.user(messages.text("x"))], "tools": INPUT_TOOLS}
    refused = server.http.post("/v1/messages", json=body | {"tool_choice": {"type": "tool", "name": "nothing"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice.name")
