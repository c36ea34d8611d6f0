# mypy: ignore-errors
"""smolagents: agents that call tools and that write code, with a picture."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image
from rounds import ANSWER, IMAGE, QUESTION, SCRIPTED_URL, TOOL_CALL, URL, a_round, run, say
from smolagents import ChatMessage, CodeAgent, MessageRole, OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel("demo", api_base=f"{URL}/v1", api_key="none", temperature=0)
scripted = OpenAIModel("demo", api_base=f"{SCRIPTED_URL}/v1", api_key="none")
picture = Image.open(IMAGE)
calls: list[Any] = []


@tool
def area(width: int, height: int) -> int:
    """Return the area of a rectangle.

    Args:
        width: Its width.
        height: Its height.
    """
    calls[:] = ["area", {"width": width, "height": height}]
    return width * height


def messages() -> list[ChatMessage]:
    content: Any = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    system: Any = [{"type": "text", "text": "You describe pictures."}]
    return [ChatMessage(MessageRole.SYSTEM, system), ChatMessage(MessageRole.USER, content)]


@a_round
def caption() -> Any:
    return model.generate(messages()).content


@a_round
def caption_streamed() -> Any:
    return "".join(delta.content or "" for delta in model.generate_stream(messages()))


@a_round
def tools() -> Any:
    final = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "' + ANSWER + '"}}\n</tool_call>'
    agent = ToolCallingAgent([area], scripted, max_steps=3, verbosity_level=0)
    answer = agent.run(f"How large is it? {say(TOOL_CALL, final)}", images=[picture])
    return [*calls, answer]


@a_round
def tools_streamed() -> Any:
    final = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "' + ANSWER + '"}}\n</tool_call>'
    agent = ToolCallingAgent([area], scripted, max_steps=3, verbosity_level=0, stream_outputs=True)
    answer = agent.run(f"How large is it? {say(TOOL_CALL, final)}", images=[picture])
    return [*calls, answer]


@a_round
def code() -> Any:
    text = f"Thought: compute.\n<code>\nprint(area(6, 7))\nfinal_answer('{ANSWER}')\n</code>"
    agent = CodeAgent([area], scripted, max_steps=2, verbosity_level=0)
    answer = agent.run(f"How large is it? {say(text)}", images=[picture])
    return [*calls, answer]


@a_round
def code_as_json() -> Any:
    """Its structured output: a thought and code, by a schema."""
    text = json.dumps({"thought": "compute", "code": f"area(6, 7)\nfinal_answer('{ANSWER}')"})
    agent = CodeAgent([area], scripted, max_steps=2, verbosity_level=0, use_structured_outputs_internally=True)
    answer = agent.run(f"How large is it? {say(text)}", images=[picture])
    return [*calls, answer]


run()
