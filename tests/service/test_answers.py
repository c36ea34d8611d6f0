"""Test what an answer's text is taken for: content, reasoning and calls, in every notation, however it is split."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from model.request import ChatFormat
from service.answers.events import Answer, ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart
from service.answers.parser import TRIGGERS, AnswerParser

THINK = ("<think>", "</think>")
TOOLS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "o": {}}},
    "g": {},
    "get-weather.v2": {"properties": {"city": {"type": ["string", "null"]}}},
}
Calls = list[tuple[str, Any]]
Parsed = tuple[str | None, str | None, Calls]

F1: tuple[str, Any] = ("f", {"a": 1})
G: tuple[str, Any] = ("g", {})
ODD = {"s": 'a "quoted" \\ {brace] </tool_call>, \n \U0001f680 \u4f60'}
HERMES_F1 = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HERMES_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
XML_F1 = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"

# format, text -> content, reasoning, calls
CASES: dict[str, tuple[str, str, Parsed]] = {
    "plain": ("hermes", "a < b <tool < tool_call> \n\n ", ("a < b <tool < tool_call> \n\n ", None, [])),
    "empty": ("hermes", "", ("", None, [])),
    "one call": ("hermes", HERMES_F1, (None, None, [F1])),
    "calls between texts": (
        "hermes",
        f"Let me see.\n\n{HERMES_F1}\n{HERMES_G}\nDone. ",
        ("Let me see.\nDone. ", None, [F1, G]),
    ),
    "odd characters": (
        "hermes",
        f'<tool_call>{{"name":"f","arguments":{json.dumps(ODD, ensure_ascii=False)}}}</tool_call>',
        (None, None, [("f", ODD)]),
    ),
    "nested": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"o": {"o": [{"o": {}}, []]}}}</tool_call>',
        (None, None, [("f", {"o": {"o": [{"o": {}}, []]}})]),
    ),
    "a dotted name": (
        "hermes",
        '<tool_call>{"name": "get-weather.v2", "arguments": {"city": null}}</tool_call>',
        (None, None, [("get-weather.v2", {"city": None})]),
    ),
    "another order": ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', (None, None, [F1])),
    "openai's own form": (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}</tool_call>',
        (None, None, [F1]),
    ),
    "json in json": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        (None, None, [F1]),
    ),
    "further fields": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "}"}</tool_call>.',
        (".", None, [F1]),
    ),
    "no arguments": ("hermes", '<tool_call>{"name": "g"}</tool_call>', (None, None, [G])),
    "an unknown name": (
        "hermes",
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        ('<tool_call>{"name": "h", "arguments": {}}</tool_call>', None, []),
    ),
    "no call but the next": (
        "hermes",
        f"<tool_call>oh <tool_call> {HERMES_F1}",
        ("<tool_call>oh <tool_call>", None, [F1]),
    ),
    "no end tag": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', (None, None, [F1])),
    "arguments no object": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    ),
    "cut in the name": ("hermes", 'Hm <tool_call>{"name": "f', ('Hm <tool_call>{"name": "f', None, [])),
    "cut in the tag": ("hermes", "Hm <tool_c", ("Hm <tool_c", None, [])),
    "reasoning": ("hermes", "<think>\nSo.\n\nYes.\n</think>\n\nHello.\n", ("Hello.\n", "So.\n\nYes.", [])),
    "reasoning alone": ("hermes", "<think>\nSo", (None, "So", [])),
    "a call in the reasoning": (
        "hermes",
        f"<think>I write {HERMES_G}</think>{HERMES_F1}",
        (None, f"I write {HERMES_G}", [F1]),
    ),
    "a thought later": ("hermes", "a <think>b</think>", ("a <think>b</think>", None, [])),
    "xml": (
        "qwen3_coder",
        f"Ok.\n{XML_F1}\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        ("Ok.", None, [F1, G]),
    ),
    "xml's values": (
        "qwen3_coder",
        "<function=f><parameter=s>1</parameter><parameter=a>1</parameter><parameter=o>[1, </parameter></function>",
        (None, None, [("f", {"s": "1", "a": 1, "o": "[1, "})]),
    ),
    "xml with lines": (
        "qwen3_coder",
        '<tool_call>\n<function=f>\n<parameter=s>\n\n if "a" < 1:\n\n</parameter>\n</function>\n</tool_call>',
        (None, None, [("f", {"s": '\n if "a" < 1:\n'})]),
    ),
    "xml without a number": (
        "qwen3_coder",
        "<function=f><parameter=a>NaN</parameter><parameter=o>1e999</parameter></function>",
        (None, None, [("f", {"a": "NaN", "o": "1e999"})]),
    ),
    "half a surrogate pair": (
        "qwen3_coder",
        '<function=f><parameter=o>"\\ud83d"</parameter></function>',
        (None, None, [("f", {"o": "\ud83d"})]),
    ),
    "keys and values": (
        "glm45",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
        (None, None, [F1, G]),
    ),
    "llama": (
        "llama3_json",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        (None, None, [F1, G]),
    ),
    "llama's tag": ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', (None, None, [F1])),
    "llama's text": (
        "llama3_json",
        'So {"name": "f", "parameters": {"a": 1}}\n  {"name": "f", "parameters": {"a": 1}}',
        ('So {"name": "f", "parameters": {"a": 1}}', None, [F1]),
    ),
    "json that is no call": (
        "llama3_json",
        '{"name": "John", "age": 7}; {"type": "x"}',
        ('{"name": "John", "age": 7}; {"type": "x"}', None, []),
    ),
    "a tag without json": ("llama3_json", "<|python_tag|>import os", ("<|python_tag|>import os", None, [])),
    "a tail": (
        "llama3_json",
        '{"name": "f", "parameters": {"a": 1}}; {"b": 1}',
        ('; {"b": 1}', None, [F1]),
    ),
    "pythonic": (
        "pythonic",
        "[f(a=1, s='x, )\"y', o=[true, None, {'k': (1, 2)}]), g()]",
        (None, None, [("f", {"a": 1, "s": 'x, )"y', "o": [True, None, {"k": [1, 2]}]}), G]),
    ),
    "a list that is no call": ("pythonic", "[1, 2]\n[f(a=b)]\n[f(1)]", ("[1, 2]\n[f(a=b)]\n[f(1)]", None, [])),
    "no value of json's": ("pythonic", "[f(a={1, 2}), f(a=1e999)]", ("[f(a={1, 2}), f(a=1e999)]", None, [])),
    "mistral": (
        "mistral",
        'Sure. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        ("Sure.", None, [F1, G]),
    ),
    "mistral's newer one": (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}',
        (None, None, [F1, G]),
    ),
    "mistral's text": ("mistral", "[TOOL_CALLS]what [TOOL_CALLS", ("[TOOL_CALLS]what [TOOL_CALLS", None, [])),
}


def parse(kind: str, pieces: Sequence[str], *, thinking: bool = False) -> tuple[list[Delta], Answer]:
    parser = AnswerParser(ChatFormat(calls=kind, reasoning=THINK), TOOLS, thinking=thinking, id="a")
    answer, deltas = Answer(), []
    for found in [*map(parser.feed, pieces), parser.finish()]:
        answer.add(found)
        deltas += found
    return deltas, answer


def parsed(answer: Answer) -> Parsed:
    return answer.content, answer.reasoning, [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_content_reasoning_and_calls_are_told_apart(name: str) -> None:
    kind, text, expected = CASES[name]
    assert parsed(parse(kind, [text])[1]) == expected


@pytest.mark.parametrize("name", CASES)
def test_however_the_text_is_split_its_pieces_add_up_to_the_same(name: str) -> None:
    kind, text, _ = CASES[name]
    whole = parse(kind, [text])[1]
    rng = random.Random(name)
    splits = [[cut] for cut in range(len(text))] + [list(range(1, len(text)))]
    splits += [sorted(rng.sample(range(len(text)), rng.randrange(len(text)))) for _ in range(20 * bool(text))]
    for cuts in splits:
        deltas, answer = parse(kind, pieces_of(text, cuts))
        assert parsed(answer) == parsed(whole), cuts
        assert [call.id for call in answer.tool_calls] == [call.id for call in whole.tool_calls]
        check_order(deltas)


def check_order(deltas: Sequence[Delta]) -> None:
    """A call's arguments follow its start, before the next one's; reasoning comes before all else; nothing is empty."""
    started = -1
    answering = False
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            started += 1
            assert delta.index == started
        elif isinstance(delta, ArgumentsDelta):
            assert delta.index == started
            assert delta.text
        else:
            assert delta.text
            assert not (isinstance(delta, ReasoningDelta) and answering)
        answering |= not isinstance(delta, ReasoningDelta)


def test_any_mixture_of_markup_and_text_is_parsed_the_same_however_it_is_split() -> None:
    """Nothing is lost where nothing is a call."""
    shards = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "',
        "f",
        '", "arguments": ',
        "{",
        "}",
        '"',
        "\\",
        "[",
        "]",
        "(",
        ")",
    ]
    shards += [
        "<think>",
        "</think>",
        "a=",
        "1",
        ", ",
        ";",
        "\n",
        " ",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<function=",
        "<parameter=",
    ]
    shards += [
        ">",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "<|python_tag|>",
        HERMES_F1,
        "\U0001f680",
        '{"type":',
        "<",
    ]
    for seed in range(300):
        rng = random.Random(seed)
        kind = rng.choice(list(TRIGGERS))
        text = "".join(rng.choices(shards, k=rng.randrange(1, 14)))
        whole = parse(kind, [text])[1]
        for cuts in (range(1, len(text)), sorted(rng.sample(range(len(text)), len(text) // 3))):
            deltas, answer = parse(kind, pieces_of(text, list(cuts)))
            assert (answer.content, answer.reasoning, answer.tool_calls) == (
                *(whole.content, whole.reasoning, whole.tool_calls),
            ), (kind, text)
            check_order(deltas)
        if not whole.tool_calls and not whole.reasoning and not text.lstrip().startswith("<think>"):
            assert whole.content == text, kind


def test_arguments_stream_as_they_are_written() -> None:
    """A long argument is not held back until its end."""
    written = f'{{"s": "{"word " * 50}"}}'
    head = '<tool_call>\n{"name": "f", "arguments": '
    parser = AnswerParser(ChatFormat(calls="hermes"), TOOLS)
    assert [type(delta) for piece in pieces_of(head, range(1, len(head))) for delta in parser.feed(piece)] == []
    (start, first) = parser.feed("{")
    assert isinstance(start, ToolCallStart)
    assert first == ArgumentsDelta(0, "{")
    for character in written[1:]:
        assert parser.feed(character) == [ArgumentsDelta(0, character)]
    assert parser.feed("}\n</tool_call>") == parser.finish() == []


def test_text_streams_at_once_but_for_what_may_begin_a_call() -> None:
    parser = AnswerParser(ChatFormat(calls="hermes"), TOOLS)
    assert parser.feed("Hello wor") == [TextDelta("Hello wor")]
    assert parser.feed("ld <") == [TextDelta("ld")]
    assert parser.feed("b") == [TextDelta(" <b")]
    assert parser.feed("<tool_call") == []
    assert parser.feed("s") == [TextDelta("<tool_calls")]
    plain = AnswerParser(ChatFormat(calls="hermes"))  # a request without tools
    for piece in ("Hello ", "\n", HERMES_F1, " <tool", " "):
        assert plain.feed(piece) == [TextDelta(piece)]


def test_a_call_that_is_cut_keeps_its_arguments_as_far_as_they_came() -> None:
    for text, arguments, content in (
        ('<tool_call>{"name": "f", "arguments": {"s": "ab', '{"s": "ab', None),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', '{"a": 1', None),
        ('<tool_call>{"name": "f", "arguments": {"a": 1, oh', '{"a": 1, ', "oh"),
        ("<tool_call><function=f><parameter=s>\na", '{"s": "a', None),
        ("<tool_call><function=f><parameter=a>\n12", '{"a": 12', None),
    ):
        _, answer = parse("qwen3_coder", [text])
        assert [call.arguments for call in answer.tool_calls] == [arguments]
        assert answer.content == content


def test_where_the_prompt_opened_the_reasoning_the_answer_begins_within_it() -> None:
    for text, expected in (
        ("\nSo </th\n</think>\n\nHi", ("Hi", "So </th", [])),
        ("<think>So</think>Hi", ("Hi", "So", [])),
        (f"So\n</think>\n{HERMES_F1}", (None, "So", [F1])),
        ("So", (None, "So", [])),
    ):
        for pieces in ([text], list(text)):
            assert parsed(parse("hermes", pieces, thinking=True)[1]) == expected
