# mypy: ignore-errors
"""LiteLLM: its OpenAI-compatible providers, structured output, tools, responses, messages."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
from pydantic import BaseModel
from rounds import IMAGE_URI, QUESTION, SCRIPTED_URL, TOOL_PROMPT, URL, a_round, run

DEMO: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": "none"}
SCRIPTED: dict[str, Any] = {"api_base": f"{SCRIPTED_URL}/v1", "api_key": "none"}
TOOL = {
    "type": "function",
    "function": {
        "name": "area",
        "description": "Return the area of a rectangle.",
        "parameters": {
            "type": "object",
            "properties": {"width": {"type": "integer"}, "height": {"type": "integer"}},
            "required": ["width", "height"],
        },
    },
}


class Thing(BaseModel):
    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


def messages(text: str = QUESTION) -> Any:
    image = {"type": "image_url", "image_url": {"url": IMAGE_URI, "format": "image/png"}}
    return [
        {"role": "system", "content": "You describe pictures."},
        {"role": "user", "content": [image, {"type": "text", "text": text}]},
    ]


@a_round
def caption() -> Any:
    answer = litellm.completion("openai/demo", temperature=0, messages=messages(), **DEMO)
    return answer.choices[0].message.content


@a_round
def caption_vllm() -> Any:
    answer = litellm.completion("hosted_vllm/demo", temperature=0, messages=messages(), **DEMO)
    return answer.choices[0].message.content


@a_round
def caption_streamed() -> Any:
    options = {"include_usage": True}
    chunks = list(
        litellm.completion(
            "openai/demo", temperature=0, messages=messages(), stream=True, stream_options=options, **DEMO
        )
    )
    assert chunks[-1].usage.completion_tokens > 9
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@a_round
def thing() -> Any:
    answer = litellm.completion(
        "openai/demo", temperature=0, messages=messages("What is there?"), response_format=Thing, **DEMO
    )
    return Thing.model_validate_json(answer.choices[0].message.content).model_dump()


@a_round
def thing_vllm() -> Any:
    answer = litellm.completion(
        "hosted_vllm/demo", temperature=0, messages=messages("What is there?"), response_format=Thing, **DEMO
    )
    return Thing.model_validate_json(answer.choices[0].message.content).model_dump()


@a_round
def tools() -> Any:
    history = messages(TOOL_PROMPT)
    first = litellm.completion("openai/demo", messages=history, tools=[TOOL], **SCRIPTED)
    (call,) = first.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    history += [
        first.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "name": "area", "content": str(arguments["width"] * 7)},
    ]
    last = litellm.completion("openai/demo", messages=history, tools=[TOOL], **SCRIPTED)
    return [call.function.name, arguments, last.choices[0].message.content]


@a_round
def tools_streamed() -> Any:
    stream = litellm.completion("openai/demo", messages=messages(TOOL_PROMPT), tools=[TOOL], stream=True, **SCRIPTED)
    whole = litellm.stream_chunk_builder(list(stream))
    (call,) = whole.choices[0].message.tool_calls
    return [call.function.name, json.loads(call.function.arguments), "The area is 42."]


@a_round
def tool_required() -> Any:
    tool = {"type": "function", "function": {"name": "Thing", "parameters": Thing.model_json_schema()}}
    answer = litellm.completion(
        "hosted_vllm/demo", temperature=0, messages=messages(), tools=[tool], tool_choice="required", **DEMO
    )
    (call, *_) = answer.choices[0].message.tool_calls
    return json.loads(call.function.arguments)


@a_round
def response() -> Any:
    image = {"type": "input_image", "image_url": IMAGE_URI}
    content = [image, {"type": "input_text", "text": QUESTION}]
    answer = litellm.responses(model="openai/demo", temperature=0, input=[{"role": "user", "content": content}], **DEMO)
    (item,) = answer.output
    return item.content[0].text


@a_round
def error() -> Any:
    try:
        litellm.completion("openai/demo", messages=messages("hello " * 4800), **DEMO)
    except litellm.ContextWindowExceededError:
        return "context window"
    return None


run()
