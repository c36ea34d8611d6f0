"""One streamed answer as its client sees it: when it began to speak, when it ended, and whether it ended well.

Knows the events of OpenAI's chat API, and neither sockets nor clocks: lines come in with the moment they arrived.

An event may carry several tokens, since a verify step accepts several: tokens are those of `usage`, never events.
"""

from __future__ import annotations

import msgspec

from loadtest.plan import Record

PREFIX = b"data: "


class Malformed(ValueError):
    """A line that no such stream may hold, or not there."""


class Details(msgspec.Struct):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int = 0
    completion_tokens_details: Details | None = None


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: object = None


_decoder = msgspec.json.Decoder(Chunk)


class Stream:
    """Give it every line. All moments are those of the clock that `line` is given."""

    def __init__(self) -> None:
        self.opened = False  # whether it got as far as a 200
        self.first: float | None = None  # the first text
        self.last: float | None = None  # the last event, [DONE] included
        self.longest_gap = 0.0  # between two events, from the first text on
        self.num_events = 0  # with text
        self.usage: Usage | None = None
        self.error: object = None
        self.done = False

    def line(self, line: bytes, now: float) -> None:
        line = line.strip()
        if not line or line.startswith(b":"):  # between events, and comments that keep connections open
            return
        if self.done or not line.startswith(PREFIX):
            raise Malformed(f"not an event, or not there: {line[:80]!r}")
        if self.first is not None and self.last is not None:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        data = line[len(PREFIX) :]
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise Malformed(f"{error}: {data[:80]!r}") from None
        self.usage = chunk.usage or self.usage
        self.error = self.error or chunk.error
        if any(choice.delta is not None and choice.delta.content for choice in chunk.choices):
            self.num_events += 1
            if self.first is None:
                self.first = now

    @property
    def failure(self) -> str | None:
        """What is wrong with it, now that no more lines come; None where it ended as it should."""
        if self.error is not None:
            return "error event"
        if not self.done:
            return "dropped"
        return "no usage" if self.usage is None else None

    def fill(self, record: Record) -> None:
        record.first, record.longest_gap, record.num_events = self.first, self.longest_gap, self.num_events
        if self.error is not None and not record.detail:
            record.detail = str(self.error)[:200]
        if self.usage is not None:
            record.tokens, record.prompt_tokens = self.usage.completion_tokens, self.usage.prompt_tokens
            details = self.usage.completion_tokens_details or Details()
            record.accepted = details.accepted_prediction_tokens or 0
            record.rejected = details.rejected_prediction_tokens or 0
