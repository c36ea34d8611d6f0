# mypy: ignore-errors
"""pydantic-ai: agents with a picture, tools and each kind of structured output, on three APIs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from rounds import IMAGE, QUESTION, SCRIPTED_URL, TOOL_PROMPT, URL, a_round, run, say

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
scripted_provider = OpenAIProvider(base_url=f"{SCRIPTED_URL}/v1", api_key="none")
model = OpenAIChatModel("demo", provider=provider)
scripted = OpenAIChatModel("demo", provider=scripted_provider)
claude = AnthropicModel("demo", provider=AnthropicProvider(base_url=URL, api_key="none"))
scripted_claude = AnthropicModel("demo", provider=AnthropicProvider(base_url=SCRIPTED_URL, api_key="none"))
PICTURE = BinaryContent(IMAGE.read_bytes(), media_type="image/png")
GREEDY: Any = {"temperature": 0}


class Thing(BaseModel):
    """What there is in the picture."""

    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


async def describe(with_model: Any) -> Any:
    agent = Agent(with_model, instructions="You describe pictures.", model_settings=GREEDY)
    return (await agent.run([PICTURE, QUESTION])).output


async def thing_from(output_type: Any, with_model: Any = model, text: str = "What is there?") -> Any:
    agent = Agent(with_model, output_type=output_type, model_settings=GREEDY)
    return (await agent.run([text, PICTURE])).output.model_dump()


async def tool_turns(with_model: Any) -> Any:
    calls: list[Any] = []
    agent = Agent(with_model)

    @agent.tool_plain
    def area(width: int, height: int) -> int:
        """Return the area of a rectangle."""
        calls.extend(["area", {"width": width, "height": height}])
        return width * height

    result = await agent.run([TOOL_PROMPT, PICTURE])
    return [*calls, result.output]


@a_round
async def caption() -> Any:
    return await describe(model)


@a_round
async def caption_streamed() -> Any:
    agent = Agent(model, instructions="You describe pictures.", model_settings=GREEDY)
    async with agent.run_stream([PICTURE, QUESTION]) as result:
        return "".join([text async for text in result.stream_text(delta=True)])


@a_round
async def thing() -> Any:
    return await thing_from(Thing)


@a_round
async def thing_native() -> Any:
    return await thing_from(NativeOutput(Thing))


@a_round
async def thing_prompted() -> Any:
    text = "What is there? " + say('{"center": "a medium orange dotted diamond"}')
    return await thing_from(PromptedOutput(Thing), scripted, text)


@a_round
async def tools() -> Any:
    return await tool_turns(scripted)


@a_round
async def response() -> Any:
    return await describe(OpenAIResponsesModel("demo", provider=provider))


@a_round
async def response_tools() -> Any:
    return await tool_turns(OpenAIResponsesModel("demo", provider=scripted_provider))


@a_round
async def response_thing() -> Any:
    return await thing_from(Thing, OpenAIResponsesModel("demo", provider=provider))


@a_round
async def claude_caption() -> Any:
    return await describe(claude)


@a_round
async def claude_thing() -> Any:
    return await thing_from(Thing, claude)


@a_round
async def claude_tools() -> Any:
    return await tool_turns(scripted_claude)


run()
