"""Reads a text that arrives in pieces, as if it were there at once: each read is a generator that waits for more text.

What a read returns depends on the text alone, never on where it was split into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

T = TypeVar("T")
Read = Generator[None, None, T]  # yields where more text is needed

NAME = re.compile(r"[A-Za-z0-9_.-]+")
OUTSIDE_STRINGS = frozenset("{}[]:,+-.0123456789 \t\r\n" + "eE" + "true" + "false" + "null")
QUOTES = frozenset("\"'")


class Scanner:
    """The text of an answer, as far as it has arrived and has not been consumed."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # how much is consumed
        self.ended = False

    def forget(self) -> None:
        """Drop consumed text; positions before are void."""
        if self.at:
            self.text, self.at = self.text[self.at :], 0

    def peek(self, literal: str) -> Read[bool]:
        """Return whether the literal comes next."""
        while True:
            rest = self.text[self.at : self.at + len(literal)]
            if rest == literal or self.ended or not literal.startswith(rest):
                return rest == literal
            yield

    def take(self, literal: str) -> Read[bool]:
        """Consume the literal if it comes next."""
        found = yield from self.peek(literal)
        self.at += len(literal) * found
        return found

    def space(self) -> Read[None]:
        """Consume white space."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return
            yield

    def literals(self, *literals: str) -> Read[bool]:
        """Consume literals with any white space before each; False at the first that does not come."""
        for literal in literals:
            yield from self.space()
            if not (yield from self.take(literal)):
                return False
        return True

    def name(self) -> Read[str]:
        """Consume a name; "" if none comes next."""
        start = self.at
        while True:
            found = NAME.match(self.text, start)
            end = found.end() if found else start
            if end < len(self.text) or self.ended:
                self.at = end
                return self.text[start:end]
            yield

    def until(self, literal: str) -> Read[str | None]:
        """Consume up to the literal and the literal; return the text before. None, with nothing consumed, where it
        never comes."""
        start = searched = self.at
        while (found := self.text.find(literal, searched)) < 0:
            if self.ended:
                return None
            searched = max(start, len(self.text) - len(literal) + 1)
            yield
        self.at = found + len(literal)
        return self.text[start:found]

    def rest(self) -> Read[str]:
        """Consume everything up to the end of the answer."""
        while not self.ended:
            yield
        found, self.at = self.text[self.at :], len(self.text)
        return found

    def stream(self, stops: Collection[str], emit: Callable[[str], None]) -> Read[str]:
        """Consume and emit text up to one of the literals, which is not consumed; return it, or "" at the end."""
        pattern = re.compile("|".join(re.escape(stop) for stop in stops))
        while True:
            if found := pattern.search(self.text, self.at):
                emit(self.text[self.at : found.start()])
                self.at = found.start()
                return found[0]
            # The literals differ in their beginnings: the first that is complete is also the first that began.
            end = len(self.text) - (0 if self.ended else self._begun(stops))
            emit(self.text[self.at : end])
            self.at = end
            if self.ended:
                return ""
            yield

    def _begun(self, stops: Collection[str]) -> int:
        """Return the length of the longest end of the text with which a literal may begin."""
        rest = self.text[self.at :]
        return max((n for stop in stops for n in range(1, len(stop)) if rest.endswith(stop[:n])), default=0)

    def json(self, emit: Callable[[str], None], *, depth: int = 0) -> Read[bool]:
        """Consume and emit JSON up to the end of an object or array; False where it is cut, or no JSON goes on.

        depth: how many brackets are open already.
        """
        quoted = escaped = False
        while True:
            start, end = self.at, len(self.text)
            while self.at < end:
                character = self.text[self.at]
                if quoted:
                    quoted = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                elif character == '"':
                    quoted = True
                elif character not in OUTSIDE_STRINGS:
                    emit(self.text[start : self.at])
                    return False
                else:
                    depth += (character in "{[") - (character in "}]")
                self.at += 1
                if not depth:
                    emit(self.text[start : self.at])
                    return True
            emit(self.text[start:end])
            if self.ended:
                return False
            yield

    def python_value(self) -> Read[str | None]:
        """Consume the value of a Python argument, up to the comma or parenthesis behind it; None where it is cut."""
        start, depth, quote, escaped = self.at, 0, "", False
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if quote:
                    quote = quote if escaped or character != quote else ""
                    escaped = character == "\\" and not escaped
                elif character in QUOTES:
                    quote = character
                elif character in ",)" and not depth:
                    return self.text[start : self.at]
                else:
                    depth += (character in "{[(") - (character in "}])")
                self.at += 1
            if self.ended:
                return None
            yield
