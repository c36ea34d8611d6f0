"""The pieces of an answer that a client sees, and the answer that they make up. Knows no format of any model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from model.request import ToolCall


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the reasoning before the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow. index: counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of a call's arguments, which are JSON text."""

    index: int
    text: str


Delta = TextDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join pieces of one kind that follow each other."""
    result: list[Delta] = []
    for delta in deltas:
        match result[-1] if result else None, delta:
            case (TextDelta(before), TextDelta(text)):
                result[-1] = TextDelta(before + text)
            case (ReasoningDelta(before), ReasoningDelta(text)):
                result[-1] = ReasoningDelta(before + text)
            case (ArgumentsDelta(index, before), ArgumentsDelta(same, text)) if index == same:
                result[-1] = ArgumentsDelta(index, before + text)
            case _:
                result.append(delta)
    return result


@dataclass
class Answer:
    """What has arrived of an answer."""

    _texts: list[str] = field(default_factory=list)
    _thoughts: list[str] = field(default_factory=list)
    _calls: list[tuple[ToolCallStart, list[str]]] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Append what the parser found next."""
        for delta in deltas:
            match delta:
                case TextDelta():
                    self._texts.append(delta.text)
                case ReasoningDelta():
                    self._thoughts.append(delta.text)
                case ToolCallStart():
                    self._calls.append((delta, []))
                case ArgumentsDelta():
                    self._calls[delta.index][1].append(delta.text)

    @property
    def content(self) -> str | None:
        """The content; None beside tool calls or reasoning alone, as OpenAI has it."""
        text = "".join(self._texts)
        return text if text or not (self._calls or self._thoughts) else None

    @property
    def reasoning(self) -> str | None:
        return "".join(self._thoughts) or None

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [ToolCall(start.id, start.name, "".join(pieces)) for start, pieces in self._calls]
