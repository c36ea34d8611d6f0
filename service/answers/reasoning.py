"""Counts the tokens of an answer that are reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from model.request import RequestOutput, Token
from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta


def num_last_tokens(tokens: Sequence[Token], num_chars: int) -> int:
    """Return how many of the last tokens hold so many characters."""
    number = 0
    while number < len(tokens) and num_chars > 0:
        number += 1
        num_chars -= len(tokens[-number].text)
    return number


class ReasoningCounter:
    """Counts tokens up to the end of the reasoning, its markers included.

    In a step's output that has the end of the reasoning and text behind it, the last tokens that hold so much text are
    not counted.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._reasons = self._ended = False

    @property
    def tokens(self) -> int:
        return self._num_tokens if self._reasons else 0

    def add(self, deltas: Sequence[Delta], output: RequestOutput) -> None:
        """Count the tokens of an output, in which the parser found these deltas."""
        if self._ended:
            return
        self._reasons |= any(isinstance(delta, ReasoningDelta) for delta in deltas)
        others = [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]
        num_tokens = len(output.tokens)
        if others:
            self._ended = True
            chars = sum(len(delta.text) for delta in others if isinstance(delta, TextDelta | ArgumentsDelta))
            num_tokens -= num_last_tokens(output.tokens, chars)
        self._num_tokens += num_tokens
