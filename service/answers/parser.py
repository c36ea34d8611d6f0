"""Splits the text of an answer, as it streams, into content, reasoning and tool calls."""

from __future__ import annotations

from service.answers.events import Delta, TextDelta


class AnswerParser:
    """Parses one answer. Feed its text in any pieces, and call `finish` once at the end."""

    def feed(self, text: str) -> list[Delta]:
        """Append text and return what is known now. Text that may yet turn out to be markup is kept until then."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """Return what was kept, at the end of the answer."""
        return []
