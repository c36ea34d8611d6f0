"""Test which answers the grammars of tool calls and reasoning allow, for each notation, as the engine compiles them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import pytest

from model.decoding.grammar import Grammars, Guide
from model.demo import checkpoint as demo
from model.request import ChatFormat, Grammar
from model.targets.chat_template import ChatTemplate
from service.answers import grammars
from service.answers.events import ArgumentsDelta
from service.answers.parser import AnswerParser
from service.schemas import json_schema
from service.schemas.tools import Thinking, Tool, Tools
from tests.model import scripted, tiny
from tests.model.chat_templates import TEMPLATES, call

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
WEATHER, CLOCK = Tool("get_weather", None, CITY, strict=False), Tool("clock", "Tells.", NOTHING, strict=False)
STRICT = Tool("get_weather", None, CITY, strict=True)
FORM = Grammar(
    "json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
)
KINDS = {kind: kind for kind in ("hermes", "thinking", "llama3", "mistral", "pythonic")}
PARIS = {"city": "Paris"}


@cache
def engine_side(kind: str) -> tuple[Grammars, ChatFormat]:
    words = scripted.tokenizer(kind)
    processor = demo.processor(words, tiny.SIDE, tiny.PATCH)
    processor.chat_template = TEMPLATES[kind]
    compiler = Grammars(words, scripted.VOCABULARY, [words.eos_token_id], num_cached=99, max_symbols=100_000)
    return compiler, ChatTemplate(processor, words).format()


def allowed(kind: str, grammar: Grammar | None, text: str) -> bool:
    """Return whether an answer may be this text and end there."""
    assert grammar is not None
    compiler, _ = engine_side(kind)
    guide: Guide = compiler.begin(grammar)
    words = scripted.tokenizer(kind)
    tokens = words(text, add_special_tokens=False).input_ids
    for token in tokens:  # one by one, and not by masks: the text may be written with other tokens than forced text is
        if not guide.fitting([token]):
            return False
        guide.advance(token)
    assert guide.error is None
    return guide.allows(words.eos_token_id)


def of(kind: str, tools: Tools, form: Grammar | None = None, thinking: Thinking = "none") -> Grammar | None:
    return grammars.of_answer(engine_side(kind)[1], tools, form, thinking)


@pytest.mark.parametrize("kind", KINDS)
def test_required_calls_have_a_tools_name_and_arguments_of_its_schema(kind: str) -> None:
    grammar = of(kind, Tools((WEATHER, CLOCK), "required"))
    written = KINDS[kind]
    for right in (
        call(written, "get_weather", PARIS),
        call(written, "get_weather", {"city": 'a "b" } \\ <', "days": 2}),
        call(written, "clock", {}),
        call(written, "get_weather", PARIS, ("clock", {}), ("get_weather", PARIS)),
    ):
        assert allowed(kind, grammar, right), right
    for wrong in (
        "",
        "Let me see.",
        call(written, "get_time", {}),
        call(written, "get_weather", {}),
        call(written, "get_weather", {"city": 1}),
        call(written, "get_weather", {"city": "Paris", "days": 0}),
        call(written, "get_weather", {"city": "Paris", "country": "France"}),
        call(written, "clock", PARIS),
        call(written, "clock", {}) + " Done.",
        call(written, "clock", {})[:-1],
    ):
        assert not allowed(kind, grammar, wrong), wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_call_is_the_only_one(kind: str) -> None:
    grammar = of(kind, Tools((CLOCK,), "required", named=True, parallel=False))
    written = KINDS[kind]
    assert allowed(kind, grammar, call(written, "clock", {}))
    assert not allowed(kind, grammar, call(written, "clock", {}, ("clock", {})))
    assert not allowed(kind, grammar, call(written, "get_weather", PARIS))


@pytest.mark.parametrize("kind", KINDS)
def test_content_of_a_form_and_calls_are_alternatives(kind: str) -> None:
    grammar = of(kind, Tools((WEATHER,), "auto"), FORM)
    written = call(KINDS[kind], "get_weather", PARIS)
    assert allowed(kind, grammar, '{"a": 1}')
    assert allowed(kind, grammar, written)
    for wrong in ("x", '{"a": "1"}', written + '{"a": 1}', '{"a": 1}' + written, call(KINDS[kind], "clock", {})):
        assert not allowed(kind, grammar, wrong), wrong
    assert of(kind, Tools(choice="none"), FORM) is FORM


@pytest.mark.parametrize("kind", ["hermes", "llama3", "mistral", "pythonic"])
def test_strict_tools_bind_the_calls_that_a_model_makes_of_its_own_accord(kind: str) -> None:
    grammar = of(kind, Tools((STRICT, CLOCK), "auto"))
    good = call(kind, "get_weather", PARIS)
    bad = call(kind, "get_weather", {"town": "Paris"})
    for text in ("", "Just a < b.\n", good, call(kind, "clock", {}, ("get_weather", PARIS))):
        assert allowed(kind, grammar, text), text
    assert not allowed(kind, grammar, bad)
    if kind not in ("llama3", "pythonic"):
        assert allowed(kind, grammar, f"So:\n{good}")
        assert not allowed(kind, grammar, f"So:\n{bad}")
    one = of(kind, Tools((STRICT, CLOCK), "auto", parallel=False))
    assert allowed(kind, one, good)
    assert allowed(kind, one, "No.")
    assert not allowed(kind, one, call(kind, "clock", {}, ("get_weather", PARIS)))
    assert of(kind, Tools((WEATHER, CLOCK), "auto")) is None, "nothing is to be bound"


MANY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"$ref": "#/$defs/place"},
        "loud": {"type": "boolean"},
        "marks": {"type": "array", "items": {"enum": ["a", "b"]}},
        "size": {"type": "number"},
        "any": True,
        "word": {"type": "string", "description": "A word."},
        "colour": {"enum": ["red", "it's"]},
    },
    "required": ["loud", "size"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}


def test_pythonic_calls_have_the_arguments_of_their_schema() -> None:
    grammar = of("pythonic", Tools((Tool("draw", None, MANY, strict=False),), "required"))
    for right in (
        "[draw(loud=True, size=1.5)]",
        '[draw(place={"x": 1}, loud=False, marks=["a", "b"], size=-2)]',
        '[draw(loud=True, size=1, any={"b": [null]}), draw(loud=False, size=0)]',
        r"""[draw(loud=True, size=1, word='it\'s a "\\ b\n')]""",
        """[draw(loud=True, size=1, word="it's", colour="it's"), draw(loud=True, size=1, colour='red')]""",
    ):
        assert allowed("pythonic", grammar, right), right
        assert allowed("pythonic", grammar, right.replace(", size", ",  size")) is False
        parser = AnswerParser(engine_side("pythonic")[1], {"draw": MANY})
        calls = [delta for delta in [*parser.feed(right), *parser.finish()] if isinstance(delta, ArgumentsDelta)]
        for one in calls:
            jsonschema.validate(json.loads(one.text), MANY)
        assert len(calls) == right.count("draw")
    for wrong in (
        "[draw()]",
        "[draw(loud=True)]",
        "[draw(loud=True, size=1, )]",
        "[draw(, loud=True, size=1)]",
        "[draw(size=1, loud=True)]",
        '[draw(loud="True", size=1)]',
        '[draw(place={"x": 1.5}, loud=True, size=1)]',
        '[draw(loud=True, marks=["c"], size=1)]',
        "[draw(loud=True, size=1, more=2)]",
        "[draw(loud=True, size=1) draw(loud=True, size=1)]",
        "[draw(loud=True, size=1, colour='blue')]",
        "[draw(loud=True, size=1, word='it's')]",
        "[]",
    ):
        assert not allowed("pythonic", grammar, wrong), wrong


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a-b": {}}},
        {"type": "object", "properties": {"a": {}}, "minProperties": 1},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
        {"type": "object", "properties": {"a": {}}, "required": ["b"], "patternProperties": {"b": {}}},
    ],
    ids=str,
)
def test_schemas_that_python_cannot_write_are_forced_in_hermes_notation(schema: dict[str, Any]) -> None:
    tools = (Tool("f", None, schema, strict=False), CLOCK)
    assert allowed("pythonic", of("pythonic", Tools(tools, "required")), call("hermes", "clock", {}))


@pytest.mark.parametrize("kind", ["qwen3", "thinking"])
@pytest.mark.parametrize("as_token", [True, False])
def test_reasoning_comes_before_what_is_forced(kind: str, as_token: bool) -> None:
    _, chat = engine_side(kind)
    if not as_token:  # a vocabulary without tokens for the markers writes them in letters
        chat = ChatFormat(calls=chat.calls, reasoning=("<why>", "</why>"))
    begin, end = chat.reasoning or ("", "")
    forms = {
        "calls": (Tools((CLOCK,), "required"), None, call("hermes", "clock", {}) if as_token else None),
        "schema": (Tools(choice="none"), FORM, '{"a": 1}'),
        "object": (Tools(choice="none"), Grammar("json_object"), '{"a": {"b": []}}'),
        "choice": (Tools(choice="none"), Grammar("choice", '["yes", "no \\"/\\""]'), 'no "/"'),
        "regex": (Tools(choice="none"), Grammar("regex", r"[0-9]+/\d\n?"), "12/3"),
        "lark": (Tools(choice="none"), Grammar("lark", 'start: "x" other\nother: /y+/'), "xyy"),
        "gbnf": (Tools(choice="none"), Grammar("gbnf", 'root ::= "x" other\nother ::= "y" | "z"'), "xz"),
    }
    for name, (tools, form, text) in forms.items():
        if text is None:
            continue
        opened = grammars.of_answer(chat, tools, form, "open")
        possible = grammars.of_answer(chat, tools, form, "possible")
        thought = f'I think {{"a": {end[:-1]} so.\n'
        assert allowed(kind, opened, f"{thought}{end}\n\n{text}"), name
        assert allowed(kind, opened, f"{end}{text}"), name
        assert not allowed(kind, opened, text), name
        assert not allowed(kind, opened, f"{thought}{end}\n\n!"), name
        assert allowed(kind, possible, text), name
        assert allowed(kind, possible, f"{begin}{thought}{end}\n\n{text}"), name
        assert not allowed(kind, possible, "!"), name


def test_errors_name_the_field_at_fault() -> None:
    grammar = of("thinking", Tools(choice="none"), Grammar("regex", "a", "guided_regex"), "open")
    assert grammar is not None
    assert grammar.param == "guided_regex"
    both = of("hermes", Tools((WEATHER,), "auto"), FORM)
    assert both is not None
    assert both.param == "tools"


def test_objects_are_closed_only_where_that_is_safe() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"properties": {"b": {}}}},
            "c": {"allOf": [{"properties": {"d": {}}}, {"properties": {"e": {}}}]},
            "f": {"properties": {}, "additionalProperties": {"type": "integer"}},
            "g": {"type": "object"},
            "h": True,
        },
    }
    closed = json_schema.named_only(schema)
    assert closed["additionalProperties"] is False
    inner = closed["properties"]
    assert inner["a"]["items"]["additionalProperties"] is False
    assert [inner[name] for name in "cfgh"] == [schema["properties"][name] for name in "cfgh"]  # type: ignore[index]
