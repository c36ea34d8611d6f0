"""Structured output over HTTP: what clients ask for in every server's words, streams that outlive their worker, and
grammars that are wrong or made to be expensive."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.model.scripted import say
from tests.schemas.documents import cases
from tests.service.server import Server, chat_body
from tests.service.streams import kill_worker, streaming, text_of

ENGINE = {"engine": "tests.service.scripted_engine:load", "max_num_seqs": 16}
CHATTY = "Sure! Here is what you asked for:\n```json\n"  # what models say before a document, if they may
KINDS = ("person", "invoice", "detections", "tree", "shapes", "receipt")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, ENGINE)
        yield server
        assert server.close() == 0, server.log_text()
        assert "Traceback" not in server.log_text()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def named(schema: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": json.loads(schema)}}


# -- the ways to ask


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_schema_gets_its_document(server: Server, name: str, stream: bool) -> None:
    """What the model says is a document already, with words before it that must not come."""
    case = cases()[name]
    for script, exact in ((case.samples[0], True), (CHATTY + case.samples[0], False)):
        fields: dict[str, Any] = {"response_format": named(case.schema), "max_tokens": 600}
        if stream:
            with streaming(server, say(script), **fields) as events:
                text = text_of(list(events))
        else:
            choice = server.chat(say(script), **fields).json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            assert reason == "stop"
        assert case.faults(text) == []
        assert (text == script) == exact


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json_object": ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    "guided_json": (
        {"guided_json": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 4}},
        r"\[.*\]",
    ),
    "guided_regex": ({"guided_regex": "[A-Z]{3}-[0-9]{2}"}, "[A-Z]{3}-[0-9]{2}"),
    "guided_choice": ({"guided_choice": ["circle", "square", "red circle"]}, "circle|square|red circle"),
    "guided_grammar": ({"guided_grammar": 'root ::= "yes" | "no" ("!")*'}, "yes|no!*"),
    "structured_outputs": ({"structured_outputs": {"regex": "(ab)+c"}}, "(ab)+c"),
    "structured_outputs.json": ({"structured_outputs": {"json": {"const": {"a": 1}}}}, r'\{"a": 1\}'),
    "structured_outputs.grammar": ({"structured_outputs": {"grammar": 'start: "x" ("," "x"){2}'}}, "x,x,x"),
}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", FORMS)
def test_every_way_to_ask_binds_the_answer(server: Server, name: str, temperature: float) -> None:
    fields, pattern = FORMS[name]
    response = server.chat(say("red circle"), max_tokens=400, temperature=temperature, seed=3, n=2, **fields)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert len(choices) == 2
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["message"]["content"], re.DOTALL)


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    explanation: Annotated[str, Field(max_length=60)]
    result: float


class Solution(BaseModel):
    """As in OpenAI's own guide, with a union and a list."""

    model_config = ConfigDict(extra="forbid")
    steps: Annotated[list[Step], Field(min_length=1, max_length=3)]
    kind: Literal["number", "none"]
    answer: Annotated[int, Field(ge=0, le=100)] | None


@pytest.mark.parametrize("answer", [42, 101])
def test_the_official_client_parses_a_model(client: openai.OpenAI, answer: int) -> None:
    """What the model would say is a document, or one with a number out of bounds."""
    script = json.dumps({"steps": [{"explanation": "6 * 7", "result": 42.0}], "kind": "number", "answer": answer})
    completion = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": say(script)}],
        response_format=Solution,
        max_tokens=400,
        temperature=0,
        n=2,
    )
    for choice in completion.choices:
        assert isinstance(choice.message.parsed, Solution)
        assert choice.message.parsed.steps[0].result == 42.0
        assert (choice.message.parsed.answer == answer) == (answer == 42)


def test_the_official_client_streams_a_model(client: openai.OpenAI) -> None:
    script = json.dumps({"steps": [{"explanation": "two", "result": 1.5}], "kind": "none", "answer": None})
    with client.chat.completions.stream(
        model="demo", messages=[{"role": "user", "content": say(script)}], response_format=Solution, max_tokens=400
    ) as stream:
        partial = [event.parsed for event in stream if event.type == "content.delta"]
    assert stream.get_final_completion().choices[0].message.parsed == Solution.model_validate_json(script)
    assert len(partial) > 3


# -- a worker that dies


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bound_stream_outlives_its_worker(temperature: float) -> None:
    """The model leaves its script at once, so that only the same masks and draws lead to the same answer."""
    case = cases()["ocr_page"]
    fields: dict[str, Any] = {"response_format": named(case.schema), "max_tokens": 500, "temperature": temperature}
    prompt = say(CHATTY)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"step": 0.01}, ENGINE)
        whole = server.chat(prompt, seed=4, **fields).json()["choices"][0]
        with streaming(server, prompt, seed=4, **fields) as stream:
            events = [next(stream) for _ in range(6)]
            kill_worker(server)
            events += list(stream)
        assert text_of(events) == whole["message"]["content"]
        assert case.faults(text_of(events)) == []
        assert server.metric("flash_worker_restarts_total") == 1
        assert server.close() == 0


# -- wrong ones, and expensive ones

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a reference to nowhere": (named('{"$ref": "#/$defs/missing"}'), "missing"),
    "an unknown type": (named('{"type": "object", "properties": {"a": {"type": "strin"}}}'), "strin"),
    "a keyword that is not supported": (named('{"type": "array", "uniqueItems": true}'), "uniqueItems"),
    "a pattern with a look-ahead": (named('{"type": "string", "pattern": "^(?=a)b"}'), "look-ahead"),
    "a pattern that is none": (named('{"type": "string", "pattern": "("}'), "unclosed"),
    "bounds that exclude everything": (named('{"type": "integer", "minimum": 5, "maximum": 4}'), "minimum"),
    "a schema of another server": (named('{"$ref": "https://example.com/schema.json"}'), "example.com"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_cannot_be_compiled_is_refused_and_says_where(server: Server, name: str) -> None:
    wanted, reason = WRONG[name]
    response = server.chat("hello", response_format=wanted)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith("response_format")
    assert reason in error["message"]


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


RECURSIVE = {
    "$defs": {
        "a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}, {"$ref": "#/$defs/b"}, {"type": "string"}]},
        "b": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/b"}}, {"$ref": "#/$defs/a"}, {"type": "null"}]},
    },
    "$ref": "#/$defs/a",
}
EXPENSIVE: dict[str, dict[str, Any]] = {
    "deep": {"guided_json": _nested(25)},
    "far too deep": {"guided_json": _nested(400)},
    "a huge enum": {"guided_json": {"enum": [f"value number {number} {number**3}" for number in range(2500)]}},
    "an exponential regex": {"guided_regex": "(a*)*(a|aa)*(a*)*b"},
    "a regex with an exponential automaton": {"guided_regex": "(.*)(a|b)*a(a|b){24}"},
    "repetitions of repetitions": {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    "a large repetition": {"guided_json": {"type": "string", "pattern": "^(a?){2000}a{2000}$"}},
    "a long string": {"guided_json": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}},
    "unions that refer to each other": {"guided_json": RECURSIVE},
    "a schema that is itself": {"guided_json": {"$ref": "#"}},
    "many optional properties": {
        "guided_json": {
            "type": "object",
            "properties": {f"key{i}": {} for i in range(900)},
            "additionalProperties": False,
        }
    },
    "unions multiplied": {
        "guided_json": {
            "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(4)]} for i in range(8)]
        }
    },
    "a multiple of a large number": {"guided_json": {"type": "integer", "multipleOf": 49_999}},
    "an ambiguous grammar": {"guided_grammar": "start: s\ns: s s s | s s | /[a-z ]/ |"},
}


def test_expensive_grammars_hold_nobody_up(server: Server) -> None:
    """All are sent at once while a stream runs. Each is refused or ends within a bound, and the stream goes on."""
    ends: dict[str, tuple[int, str]] = {}

    def send(name: str) -> None:
        response = server.http.post(
            "/v1/chat/completions", json=chat_body(f"hello {name}", max_tokens=40, **EXPENSIVE[name]), timeout=120
        )
        body = response.json()
        ends[name] = response.status_code, body["error"]["message"] if "error" in body else "stop"

    text = " ".join(f"word {number}," for number in range(250))
    with ThreadPoolExecutor(len(EXPENSIVE)) as pool, streaming(server, say(text), max_tokens=2000) as stream:
        events = [next(stream)]
        for name in EXPENSIVE:
            pool.submit(send, name)
        gaps, before = [], time.monotonic()
        for event in stream:
            events.append(event)
            gaps.append(time.monotonic() - before)
            before = time.monotonic()
    assert text_of(events) == text, "the other stream is whole"
    assert ends.keys() == EXPENSIVE.keys()
    assert {status for status, _ in ends.values()} <= {200, 400, 413, 500}, ends
    print({name: (status, message[:60]) for name, (status, message) in ends.items()}, f"longest gap {max(gaps):.2f} s")
    assert server.chat(say("still here"), max_tokens=9).json()["choices"][0]["message"]["content"] == "still here"
