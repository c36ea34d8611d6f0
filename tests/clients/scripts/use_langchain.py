# mypy: ignore-errors
"""LangChain's ChatOpenAI and ChatAnthropic: images, `with_structured_output`, `bind_tools`, streams."""

from __future__ import annotations

from typing import Any, Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from rounds import IMAGE_BASE64, IMAGE_URI, QUESTION, SCRIPTED_URL, TOOL_PROMPT, URL, a_round, run

KEY: Any = "none"
OPENAI: dict[str, Any] = {"model": "demo", "api_key": KEY, "max_retries": 0}
model = ChatOpenAI(base_url=f"{URL}/v1", temperature=0, **OPENAI)
scripted = ChatOpenAI(base_url=f"{SCRIPTED_URL}/v1", **OPENAI)
claude = ChatAnthropic(base_url=URL, temperature=0, model_name="demo", api_key=KEY, max_retries=0)
scripted_claude = ChatAnthropic(base_url=SCRIPTED_URL, model_name="demo", api_key=KEY, max_retries=0)


class Thing(BaseModel):
    """What there is in the picture."""

    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


@tool
def area(width: int, height: int) -> int:
    """Return the area of a rectangle."""
    return width * height


def question(text: str = QUESTION) -> HumanMessage:
    """Ask with an image in OpenAI's form."""
    image = {"type": "image_url", "image_url": {"url": IMAGE_URI}}
    return HumanMessage([image, {"type": "text", "text": text}])


def standard(text: str = QUESTION) -> HumanMessage:
    """Ask with an image in LangChain's own form."""
    image = {"type": "image", "base64": IMAGE_BASE64, "mime_type": "image/png"}
    return HumanMessage([image, {"type": "text", "text": text}])


def tool_turns(chat: Any) -> Any:
    bound = chat.bind_tools([area])
    history: list[Any] = [question(TOOL_PROMPT)]
    first = bound.invoke(history)
    (call,) = first.tool_calls
    result = area.invoke(call)
    assert isinstance(result, ToolMessage)
    last = bound.invoke([*history, first, result])
    return [call["name"], call["args"], last.text]


@a_round
def caption() -> Any:
    return model.invoke([SystemMessage("You describe pictures."), question()]).text


@a_round
def caption_standard() -> Any:
    return model.invoke([SystemMessage("You describe pictures."), standard()]).text


@a_round
def caption_streamed() -> Any:
    chunks = list(model.stream([SystemMessage("You describe pictures."), question()], stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 9
    return whole.text


@a_round
def thing() -> Any:
    return model.with_structured_output(Thing).invoke([question("What is there?")]).model_dump()


@a_round
def thing_by_function() -> Any:
    chain = model.with_structured_output(Thing, method="function_calling")
    return chain.invoke([question("What is there?")]).model_dump()


@a_round
def thing_strict() -> Any:
    chain = model.with_structured_output(Thing, method="json_schema", strict=True, include_raw=True)
    answer = chain.invoke([question("What is there?")])
    assert answer["parsing_error"] is None
    return answer["parsed"].model_dump()


@a_round
def thing_by_json() -> Any:
    """JSON of no particular form: a scripted model has to say the right one."""
    chain = scripted.with_structured_output(Thing, method="json_mode")
    text = 'What is there? Answer as JSON. say<<<{"center": "a medium orange dotted diamond"}>>>'
    return chain.invoke([question(text)]).model_dump()


@a_round
def tools() -> Any:
    return tool_turns(scripted)


@a_round
def tools_streamed() -> Any:
    whole: Any = None
    for chunk in scripted.bind_tools([area]).stream([question(TOOL_PROMPT)]):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    return [call["name"], call["args"], "The area is 42."]


@a_round
def tool_required() -> Any:
    (call, *_) = model.bind_tools([Thing], tool_choice="any").invoke([question()]).tool_calls
    return call["args"]


@a_round
def tool_named() -> Any:
    (call,) = model.bind_tools([area, Thing], tool_choice="Thing", strict=True).invoke([question()]).tool_calls
    return call["args"]


@a_round
def response() -> Any:
    own = ChatOpenAI(base_url=f"{URL}/v1", temperature=0, use_responses_api=True, **OPENAI)
    return own.invoke([SystemMessage("You describe pictures."), question()]).text


@a_round
def response_tools() -> Any:
    return tool_turns(ChatOpenAI(base_url=f"{SCRIPTED_URL}/v1", use_responses_api=True, **OPENAI))


@a_round
def claude_caption() -> Any:
    return claude.invoke([SystemMessage("You describe pictures."), question()]).text


@a_round
def claude_caption_streamed() -> Any:
    return "".join(chunk.text for chunk in claude.stream([SystemMessage("You describe pictures."), question()]))


@a_round
def claude_thing() -> Any:
    return claude.with_structured_output(Thing).invoke([question("What is there?")]).model_dump()


@a_round
def claude_tools() -> Any:
    return tool_turns(scripted_claude)


run()
