# mypy: ignore-errors
"""The official `anthropic` client: messages, streaming helpers, `parse`, tools."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
from pydantic import BaseModel
from rounds import ANSWER, IMAGE_BASE64, QUESTION, SCRIPTED_URL, TOOL_PROMPT, URL, a_round, run

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
scripted = anthropic.Anthropic(base_url=SCRIPTED_URL, api_key="none", max_retries=0)
GREEDY = {"temperature": 0}
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE_BASE64}}
TOOL: Any = {
    "name": "area",
    "description": "Return the area of a rectangle.",
    "input_schema": {
        "type": "object",
        "properties": {"width": {"type": "integer"}, "height": {"type": "integer"}},
        "required": ["width", "height"],
    },
}


class Thing(BaseModel):
    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


THING: Any = {"name": "Thing", "input_schema": Thing.model_json_schema()}


def messages(text: str = QUESTION) -> Any:
    return [{"role": "user", "content": [IMAGE, {"type": "text", "text": text}]}]


def prompt_tokens(usage: Any) -> int:
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@a_round
def caption() -> Any:
    answer = client.messages.create(
        model="demo", max_tokens=200, extra_body=GREEDY, system="You describe pictures.", messages=messages()
    )
    assert answer.stop_reason == "end_turn"
    assert prompt_tokens(answer.usage) > 20
    return text_of(answer)


@a_round
def caption_streamed() -> Any:
    with client.messages.stream(
        model="demo",
        max_tokens=200,
        extra_body=GREEDY,
        system=[{"type": "text", "text": "You describe pictures.", "cache_control": {"type": "ephemeral"}}],
        messages=messages(),
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text_of(final) == text
    assert final.usage.output_tokens > 9
    return text


@a_round
def count_tokens() -> Any:
    count = client.messages.count_tokens(model="demo", messages=messages()).input_tokens
    answer = client.messages.create(model="demo", max_tokens=1, messages=messages())
    return count == prompt_tokens(answer.usage)


@a_round
def thing() -> Any:
    answer = client.messages.parse(
        model="demo", max_tokens=200, extra_body=GREEDY, messages=messages("What is there?"), output_format=Thing
    )
    assert isinstance(answer.parsed_output, Thing)
    return answer.parsed_output.model_dump()


@a_round
def tools() -> Any:
    history = messages(TOOL_PROMPT)
    first = scripted.messages.create(model="demo", max_tokens=200, messages=history, tools=[TOOL])
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = [{"type": "text", "text": str(call.input["width"] * call.input["height"])}]
    history += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": result}]},
    ]
    last = scripted.messages.create(model="demo", max_tokens=200, messages=history, tools=[TOOL])
    return [call.name, call.input, text_of(last)]


@a_round
def tools_streamed() -> Any:
    with scripted.messages.stream(model="demo", max_tokens=200, messages=messages(TOOL_PROMPT), tools=[TOOL]) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (call,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert pieces
    return [call.name, call.input, ANSWER]


@a_round
def tool_runner() -> Any:
    calls: list[dict[str, int]] = []

    @anthropic.beta_tool
    def area(width: int, height: int) -> str:
        """Return the area of a rectangle.

        Args:
            width: Its width.
            height: Its height.
        """
        calls.append({"width": width, "height": height})
        return str(width * height)

    runner = scripted.beta.messages.tool_runner(
        model="demo", max_tokens=200, messages=messages(TOOL_PROMPT), tools=[area]
    )
    last = runner.until_done()
    return ["area", *calls, text_of(last)]


def forced_tool(tool_choice: Any, tools: Any) -> Any:
    answer = client.messages.create(
        model="demo",
        max_tokens=200,
        extra_body=GREEDY,
        messages=messages(),
        tools=tools,
        tool_choice=tool_choice,
    )
    assert answer.stop_reason == "tool_use"
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    return call.input


@a_round
def tool_required() -> Any:
    return forced_tool({"type": "any", "disable_parallel_tool_use": True}, [THING])


@a_round
def tool_named() -> Any:
    return forced_tool({"type": "tool", "name": "Thing"}, [TOOL, THING])


@a_round
def error() -> Any:
    try:
        client.messages.create(model="demo", max_tokens=0, messages=messages())
    except anthropic.BadRequestError as refused:
        return refused.body["error"]["type"]
    return None


run()
