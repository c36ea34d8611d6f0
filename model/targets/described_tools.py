"""Describes tools in words, and writes calls and results as text, for chat templates that know none.

In the words of Qwen2.5's and Hermes' templates, which many models have read in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from model.request import Medium, Message

BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>"
)
BEHIND = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class Markup(str):
    """A text that is not the user's: in it, special tokens are what they are."""


def with_described_tools(messages: Sequence[Message], tools: Sequence[Any], *, takes_system: bool) -> list[Message]:
    """Return the messages with tools in the system message, or in the first one where the template takes none, with
    calls as text, and with results as the user's messages."""
    described: list[Message] = []
    for are_results, group in groupby(messages, key=lambda message: message.role == "tool"):
        if are_results:
            results = [part for message in group for part in (Markup("\n"), *_result(message))]
            described.append(Message("user", tuple(results[1:])))
        else:
            described += [replace(each, content=_with_calls(each), tool_calls=()) for each in group]
    if not tools:
        return described
    lines = (part for tool in tools for part in (Markup("\n"), json.dumps(tool, ensure_ascii=False)))
    text: tuple[str | Medium, ...] = (Markup(BEFORE), *lines, Markup(BEHIND))
    first = described[0]
    if first.role == "system":
        return [replace(first, content=(*first.content, Markup("\n\n"), *text)), *described[1:]]
    if takes_system:
        return [Message("system", text), *described]
    return [replace(first, content=(*text, Markup("\n\n"), *first.content)), *described[1:]]


def _with_calls(message: Message) -> tuple[str | Medium, ...]:
    """Return the content of a message, followed by its calls."""
    content = list(message.content)
    for call in message.tool_calls:
        gap = "\n" if any(content) else ""
        content += [
            *(Markup(f'{gap}<tool_call>\n{{"name": '), json.dumps(call.name, ensure_ascii=False)),
            *(Markup(', "arguments": '), call.arguments, Markup("}\n</tool_call>")),
        ]
    return tuple(content)


def _result(message: Message) -> tuple[str | Medium, ...]:
    return (Markup("<tool_response>\n"), *message.content, Markup("\n</tool_response>"))
