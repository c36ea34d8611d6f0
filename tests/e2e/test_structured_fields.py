"""Whichever field asks for a form, the answer has it; what cannot be compiled is refused by the field's name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.e2e.server import EngineServer
from tests.model.scripted import say

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TAG = {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}
# Each with a text that has it.
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, '{"n": 12}'),
    ({"response_format": {"type": "json_object"}}, '{"n": [1, {}]}'),
    ({"structured_outputs": {"json": SCHEMA}}, '{"n": 12}'),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"n":12}'),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ \\n]*"}}, '{ "n":\n 12}'),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, '{"n": 12 }'),
    ({"guided_json": json.dumps(SCHEMA)}, '{"n": 12}'),
    ({"guided_regex": "[a-c]{3}[0-9]"}, "abc7"),
    ({"guided_choice": ["yes", "no"]}, "no"),
    ({"guided_grammar": 'start: "a" ("," "a")*'}, "a,a,a"),
    ({"guided_grammar": 'root ::= "a" ("," "a")*'}, "a,a,a"),
    ({"grammar": 'root ::= [0-9]+ item\nitem ::= "x" | "y"'}, "17y"),
    ({"json_schema": SCHEMA}, '{"n": 12}'),
    ({"regex": "a|b"}, "b"),
    ({"ebnf": 'root ::= "up" | "down"'}, "down"),
    ({"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f"]}}, 'so <f>{"n": 1}</f>.'),
]


def ids(value: object) -> str:
    return json.dumps(value)[:60] if isinstance(value, dict) else ""


@pytest.mark.parametrize(("fields", "text"), FORMS, ids=ids)
def test_a_text_that_has_the_form_is_said_as_it_is(
    scripted_server: EngineServer, fields: dict[str, Any], text: str
) -> None:
    for speculation in ("auto", "off"):
        response = scripted_server.chat(say(text), max_tokens=60, speculation=speculation, **fields)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    answer = scripted_server.http.post("/v1/generate", data={"prompt": say(text), "max_tokens": "60", **form}).json()
    assert answer["text"] == text


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[a-c]{3}[0-9]"}, "[a-c]{3}[0-9]"),
        ({"ebnf": 'root ::= "up" | "down"'}, "up|down"),
        ({"grammar": 'start: "a" | "b"'}, "a|b"),
        ({"structured_outputs": {"json": {"enum": ["x", 5]}}}, '"x"|5'),
    ],
    ids=ids,
)
def test_a_text_that_has_not_is_bent_to_it(scripted_server: EngineServer, fields: dict[str, Any], pattern: str) -> None:
    choice = scripted_server.chat(say("Well, who knows?"), max_tokens=60, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(pattern, choice["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a("}, "guided_regex"),
        ({"regex": "[z-a]"}, "regex"),
        ({"grammar": "root ::= missing"}, "grammar"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"ebnf": 'root ::= "a" )'}, "ebnf"),
        ({"guided_json": {"type": "strange"}}, "guided_json"),
        ({"structured_outputs": {"json": {"$ref": "#/nowhere"}}}, "structured_outputs.json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format.json_schema.schema",
        ),
    ],
    ids=ids,
)
def test_what_cannot_be_compiled_is_refused_by_name(
    scripted_server: EngineServer, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        response = scripted_server.chat(say("x"), stream=stream, **fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_grammar")
        assert error["message"].startswith(f"{param}: ")
