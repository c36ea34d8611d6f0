# mypy: ignore-errors
"""The official `openai` client: chat, streaming helpers, `parse`, tools, responses."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field
from rounds import ANSWER, IMAGE_URI, QUESTION, SCRIPTED_URL, TOOL_PROMPT, URL, a_round, run, say

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
scripted = openai.OpenAI(base_url=f"{SCRIPTED_URL}/v1", api_key="none", max_retries=0)
IMAGE = {"type": "image_url", "image_url": {"url": IMAGE_URI}}


class Thing(BaseModel):
    """What there is in the picture."""

    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


class Scene(BaseModel):
    thing: Thing
    count: int = Field(ge=0, le=9)


class Area(BaseModel):
    """Return the area of a rectangle."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)


TOOL = openai.pydantic_function_tool(Area, name="area")
THING = openai.pydantic_function_tool(Thing)
RESPONSE_TOOL: Any = {"type": "function", "strict": True, **TOOL["function"]}


def messages(text: str = QUESTION) -> Any:
    return [
        {"role": "system", "content": "You describe pictures."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": text}]},
    ]


def response_input(text: str = QUESTION) -> Any:
    image = {"type": "input_image", "image_url": IMAGE_URI, "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


@a_round
def models() -> Any:
    return [model.id for model in client.models.list()]


@a_round
def caption() -> Any:
    answer = client.chat.completions.create(model="demo", temperature=0, messages=messages())
    return answer.choices[0].message.content


@a_round
def caption_streamed() -> Any:
    stream = client.chat.completions.create(
        model="demo", temperature=0, messages=messages(), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 9
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])


@a_round
def caption_helper() -> Any:
    with client.chat.completions.stream(model="demo", temperature=0, messages=messages()) as stream:
        kinds = {event.type for event in stream}
        assert kinds == {"chunk", "content.delta", "content.done"}, kinds
        return stream.get_final_completion().choices[0].message.content


@a_round
async def caption_async() -> Any:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as own:
        answer = await own.chat.completions.create(model="demo", temperature=0, messages=messages())
        return answer.choices[0].message.content


@a_round
def caption_of_a_plain_url() -> Any:
    """As Ollama documents it: the URL in place of the object with it."""
    content: Any = [{"type": "image_url", "image_url": IMAGE_URI}, {"type": "text", "text": QUESTION}]
    history = [messages()[0], {"role": "user", "content": content}]
    answer = client.chat.completions.create(model="demo", temperature=0, messages=history)
    return answer.choices[0].message.content


@a_round
def caption_again_after_history() -> Any:
    first = client.chat.completions.create(model="demo", temperature=0, messages=messages())
    history = [*messages(), first.choices[0].message, {"role": "user", "content": "How many objects are there?"}]
    again = client.chat.completions.create(model="demo", temperature=0, messages=history)
    return again.choices[0].message.content


@a_round
def error() -> Any:
    try:
        client.chat.completions.create(model="demo", messages=messages(), max_completion_tokens=0)
    except openai.BadRequestError as refused:
        return refused.param
    return None


@a_round
def scene() -> Any:
    answer = client.chat.completions.parse(
        model="demo", temperature=0, messages=messages("What is there?"), response_format=Scene
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Scene)
    return parsed.thing.model_dump()


@a_round
def scene_streamed() -> Any:
    with client.chat.completions.stream(
        model="demo", temperature=0, messages=messages("What is there?"), response_format=Scene
    ) as stream:
        snapshots = [event.parsed for event in stream if event.type == "content.delta"]
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert len(snapshots) > 1
    assert isinstance(parsed, Scene)
    return parsed.thing.model_dump()


@a_round
def json_object() -> Any:
    """JSON of no particular form: a scripted model has to say some."""
    prompt = "Answer as JSON. " + say('{"center": "blue"}')
    answer = scripted.chat.completions.create(
        model="demo", messages=messages(prompt), response_format={"type": "json_object"}
    )
    return json.loads(answer.choices[0].message.content)


def tool_turns(parallel: bool) -> Any:
    history = messages(TOOL_PROMPT)
    first = scripted.chat.completions.parse(model="demo", messages=history, tools=[TOOL])
    assert first.choices[0].finish_reason == "tool_calls", first
    (call,) = first.choices[0].message.tool_calls
    area = call.function.parsed_arguments
    assert isinstance(area, Area)
    history += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": str(area.width * area.height)},
    ]
    last = scripted.chat.completions.create(model="demo", messages=history, tools=[TOOL], parallel_tool_calls=parallel)
    assert last.choices[0].finish_reason == "stop"
    return [call.function.name, json.loads(call.function.arguments), last.choices[0].message.content]


@a_round
def tools() -> Any:
    return tool_turns(True)


@a_round
def tools_one_at_a_time() -> Any:
    return tool_turns(False)


@a_round
def tools_streamed() -> Any:
    with scripted.chat.completions.stream(model="demo", messages=messages(TOOL_PROMPT), tools=[TOOL]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [event.name for event in done] == ["area"]
    (call,) = message.tool_calls
    return [call.function.name, json.loads(call.function.arguments), ANSWER]


def forced_tool(tool_choice: Any) -> Any:
    """The bundled model has never seen a tool: the call is made since it must be, and says what is in the picture."""
    answer = client.chat.completions.parse(
        model="demo", temperature=0, messages=messages(), tools=[TOOL, THING], tool_choice=tool_choice
    )
    (call,) = answer.choices[0].message.tool_calls
    arguments = call.function.parsed_arguments
    assert isinstance(arguments, (Thing, Area))
    return arguments.model_dump()


@a_round
def tool_required() -> Any:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "Thing"}}]}
    return forced_tool({"type": "allowed_tools", "allowed_tools": allowed})


@a_round
def tool_named() -> Any:
    return forced_tool({"type": "function", "function": {"name": "Thing"}})


@a_round
def completion() -> Any:
    answer = client.completions.create(model="demo", prompt="The image shows", max_tokens=5, temperature=0)
    return answer.choices[0].text


@a_round
def response() -> Any:
    answer = client.responses.create(model="demo", temperature=0, input=response_input())
    assert answer.status == "completed"
    return answer.output_text


@a_round
def response_streamed() -> Any:
    with client.responses.stream(model="demo", temperature=0, input=response_input()) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text
    return text


@a_round
def response_scene() -> Any:
    answer = client.responses.parse(
        model="demo", temperature=0, input=response_input("What is there?"), text_format=Scene
    )
    assert isinstance(answer.output_parsed, Scene)
    return answer.output_parsed.thing.model_dump()


@a_round
def response_tools() -> Any:
    history = response_input(TOOL_PROMPT)
    first = scripted.responses.create(model="demo", input=history, tools=[RESPONSE_TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    area = Area.model_validate_json(call.arguments)
    history += [
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": str(area.width * area.height)},
    ]
    last = scripted.responses.create(model="demo", input=history, tools=[RESPONSE_TOOL])
    return [call.name, json.loads(call.arguments), last.output_text]


@a_round
def response_tools_streamed() -> Any:
    with scripted.responses.stream(
        model="demo", input=response_input(TOOL_PROMPT), tools=[openai.pydantic_function_tool(Area, name="area")]
    ) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        (call,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert [event.arguments for event in done] == [call.arguments]
    return [call.name, json.loads(call.arguments), ANSWER]


run()
