"""How many tokens of an answer are reasoning."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from model.request import RequestOutput, Token
from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart
from service.answers.reasoning import ReasoningCounter

Step = tuple[Sequence[str], Sequence[Delta]]  # the tokens of a step, and what the parser found in them
CALL: list[Delta] = [ToolCallStart(0, "c", "f"), ArgumentsDelta(0, "{}")]
CASES: dict[str, tuple[Sequence[Step], int]] = {
    "text alone": ([(["a", "b"], [TextDelta("ab")]), (["c"], [TextDelta("c")])], 0),
    "text that was kept at first": ([(["<"], []), (["b"], [TextDelta("<b")])], 0),
    "one step each": ([(["<think>", "a"], [ReasoningDelta("a")]), (["</think>"], []), (["b"], [TextDelta("b")])], 3),
    "all in one step": ([(["<think>", "a", "</think>", "b", "c"], [ReasoningDelta("a"), TextDelta("bc")])], 3),
    "a call at once": ([(["a", "</think>", "{}"], [ReasoningDelta("a"), *CALL])], 2),
    "cut while it thinks": ([(["a"], [ReasoningDelta("a")]), (["b", "c"], [ReasoningDelta("bc")])], 3),
    "nothing": ([([], [])], 0),
}


@pytest.mark.parametrize(("steps", "expected"), CASES.values(), ids=CASES)
def test_tokens_up_to_the_end_of_the_reasoning_count(steps: Sequence[Step], expected: int) -> None:
    counter = ReasoningCounter()
    for texts, deltas in steps:
        counter.add(deltas, RequestOutput("r", "", tuple(Token(1, text, "target") for text in texts)))
    assert counter.tokens == expected
