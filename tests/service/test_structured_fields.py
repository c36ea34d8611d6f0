"""The fields that bind an answer to a form become one grammar, by whichever server's names they come."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from model.request import Grammar
from service.body import Form
from service.errors import BadRequest, ServiceError, TooLarge
from service.schemas import generate
from service.schemas.openai import ChatRequest
from service.schemas.sampling import sampling_params
from service.schemas.structured import COMPACT
from service.settings import Settings

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b", "a"]}
CLOSED = {**SCHEMA, "additionalProperties": False}  # objects have no properties but those that are named
TEXT = json.dumps(CLOSED, separators=(",", ":"))
LARK = 'start: "a" | %json {"type": "integer"}  // ::= stands in a comment'
GBNF = '# a comment\nroot ::= "a" | [0-9]+'


def grammar(fields: dict[str, Any], **settings: Any) -> Grammar | None:
    """What the engine gets for these fields of a chat."""
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields})
    request = msgspec.json.decode(body, type=ChatRequest)
    return sampling_params(request, Settings(**settings), default_temperature=0.0).grammar


def of_form(**fields: str) -> Grammar | None:
    request, _ = generate.read(Form(fields=[("prompt", "x"), *fields.items()]), Settings())
    return sampling_params(request, Settings(), default_temperature=0.0).grammar


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar("json_schema", TEXT, "response_format.json_schema.schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"description": "y", "schema": SCHEMA}}},
            Grammar("json_schema", TEXT, "response_format.json_schema.schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "schema": SCHEMA}},
            Grammar("json_schema", TEXT, "response_format.schema"),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Grammar("json_schema", TEXT, "response_format.schema"),
        ),
        (
            {"response_format": {"type": "json", "value": SCHEMA}},
            Grammar("json_schema", TEXT, "response_format.value"),
        ),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "", "response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
            Grammar("json_object", "", "response_format"),
        ),
        ({"response_format": {"type": "regex", "value": "a+"}}, Grammar("regex", "a+", "response_format.value")),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, Grammar("regex", "a+", "response_format.pattern")),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, Grammar("gbnf", GBNF, "response_format.grammar")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"json": TEXT}}, Grammar("json_schema", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"regex": "a|b"}}, Grammar("regex", "a|b", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["yes", "no", "yes"]}},
            Grammar("choice", '["yes","no"]', "structured_outputs.choice"),
        ),
        ({"structured_outputs": {"grammar": LARK}}, Grammar("lark", LARK, "structured_outputs.grammar")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "", "structured_outputs.json_object")),
        ({"guided_json": SCHEMA}, Grammar("json_schema", TEXT, "guided_json")),
        ({"guided_json": json.dumps(SCHEMA)}, Grammar("json_schema", TEXT, "guided_json")),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, Grammar("json_schema", TEXT, "guided_json")),
        ({"guided_regex": r"\d{4}-\d\d"}, Grammar("regex", r"\d{4}-\d\d", "guided_regex")),
        ({"guided_choice": ["ä", "b"]}, Grammar("choice", '["ä","b"]', "guided_choice")),
        ({"guided_grammar": LARK}, Grammar("lark", LARK, "guided_grammar")),
        ({"guided_grammar": GBNF}, Grammar("gbnf", GBNF, "guided_grammar")),
        ({"grammar": GBNF}, Grammar("gbnf", GBNF, "grammar")),
        ({"json_schema": SCHEMA}, Grammar("json_schema", TEXT, "json_schema")),
        ({"json_schema": TEXT}, Grammar("json_schema", TEXT, "json_schema")),
        ({"regex": "a"}, Grammar("regex", "a", "regex")),
        ({"ebnf": GBNF}, Grammar("gbnf", GBNF, "ebnf")),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_each_way_to_ask_for_a_form_is_one_grammar(fields: dict[str, Any], expected: Grammar) -> None:
    assert grammar(fields) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "disable_any_whitespace": True}},
        {"guided_json": None, "guided_choice": None, "guided_decoding_backend": "guidance"},
        {"guided_regex": "", "grammar": "", "json_schema": ""},
    ],
    ids=str,
)
def test_what_asks_for_nothing_leaves_the_answer_free(fields: dict[str, Any]) -> None:
    assert grammar(fields) is None


def test_the_order_of_properties_is_kept() -> None:
    """Answers have their keys in the schema's order, which a model relies on to think before it concludes."""
    found = grammar({"guided_json": SCHEMA})
    assert found is not None
    assert list(json.loads(found.source)["properties"]) == ["b", "a"]


def test_white_space_and_further_properties_are_governed_through_the_schema() -> None:

    def pattern(spaces: str) -> dict[str, Any]:
        return COMPACT | {"whitespace_flexible": True, "whitespace_pattern": spaces}

    nested = {"type": "object", "properties": {"a": {"items": [{"properties": {}}, {"additionalProperties": True}]}}}
    found = grammar({"structured_outputs": {"json": nested, "disable_additional_properties": True}})
    assert found is not None
    closed = json.loads(found.source)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["items"] == [
        {"properties": {}, "additionalProperties": False},
        {"additionalProperties": True},
    ]
    for fields, options in (
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, COMPACT),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, pattern(" ?")),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]"}, pattern("[ ]")),
        (
            {"guided_json": {**SCHEMA, "x-guidance": {"lenient": True}}, "guided_whitespace_pattern": "[ ]"},
            {"lenient": True} | pattern("[ ]"),
        ),
    ):
        found = grammar(fields)
        assert found is not None
        assert json.loads(found.source) == {**CLOSED, "x-guidance": options}


TAG = {"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f="]}},
        {"structured_outputs": {"structural_tag": {"structures": [TAG], "triggers": ["<x", "<f="]}}},
        {"structured_outputs": {"structural_tag": json.dumps({"structures": [TAG], "triggers": ["<f="]})}},
    ],
    ids=str,
)
def test_a_structural_tag_is_free_text_with_schemas_in_it(fields: dict[str, Any]) -> None:
    found = grammar(fields)
    assert found is not None
    assert found.kind == "lark"
    assert "%json" in found.source
    assert '"</f>"' in found.source


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"items": {"anyOf": [DEEP]}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}, "grammar": "start: /a/"}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "schema": SCHEMA, "json_schema": {"schema": SCHEMA}}},
            "response_format.schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern"),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value"),
        ({"response_format": {"type": "regex", "value": {"a": 1}}}, "response_format.value"),
        ({"response_format": {"type": "grammar"}}, "response_format.grammar"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format"),
        (
            {"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<y", ""]}},
            "response_format.structures[0].begin",
        ),
        ({"structured_outputs": {"structural_tag": {"structures": 3}}}, "structured_outputs.structural_tag"),
        ({"guided_json": "{nope"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"json_schema": "[" * 5000}, "json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_json": DEEP}, "guided_json"),
        ({"guided_json": json.dumps(DEEP)}, "guided_json"),
        ({"response_format": {"type": "json_schema", "schema": DEEP}}, "response_format.schema"),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as error:
        grammar(fields)
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "ä" * 100},
        {"guided_choice": ["x" * 150]},
        {"grammar": "root ::= " + '"a" ' * 50},
        {"response_format": {"type": "json_schema", "schema": {"description": "x" * 200}}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_grammar_is_bounded_in_bytes(fields: dict[str, Any]) -> None:
    with pytest.raises(TooLarge) as error:
        grammar(fields, max_grammar_bytes=150)
    assert error.value.code == "grammar_too_large"
    assert (error.value.param or "").split(".")[0] == next(iter(fields))
    assert grammar(fields, max_grammar_bytes=400) is not None


def test_a_form_takes_the_same_fields_as_text() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    expected = Grammar("json_schema", TEXT, "response_format.json_schema.schema")
    assert of_form(response_format=json.dumps(wanted)) == expected
    assert of_form(structured_outputs='{"regex": "a"}') == Grammar("regex", "a", "structured_outputs.regex")
    assert of_form(guided_json=TEXT) == Grammar("json_schema", TEXT, "guided_json")
    assert of_form(guided_choice='["a","b"]') == Grammar("choice", '["a","b"]', "guided_choice")
    assert of_form(guided_regex="[0-9]+") == Grammar("regex", "[0-9]+", "guided_regex")
    assert of_form(guided_grammar=GBNF) == Grammar("gbnf", GBNF, "guided_grammar")
    assert of_form(guided_json="", response_format="") is None
    for wrong in ({"guided_choice": "a, b"}, {"response_format": "json"}, {"guided_json": "{"}):
        with pytest.raises(ServiceError) as error:
            of_form(**wrong)
        assert error.value.param == next(iter(wrong))
