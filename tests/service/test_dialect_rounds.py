"""Whole rounds at the Responses and Messages APIs: forms, tools and reasoning, by the official clients.

The target is scripted: it says what large models say.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.model.scripted import say
from tests.service import test_messages as messages
from tests.service import test_responses as responses
from tests.service.server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"engine": "tests.service.scripted_engine:load"}
        server = Server(Path(folder), {"kind": "qwen3", "says": "Good day."}, settings, wait=False)
        server.wait(lambda: server.http.get("/readyz").status_code == 200, 240)  # it makes its checkpoint first
        yield server
        assert server.close() == 0, server.log_text()


@pytest.fixture(scope="module")
def of_openai(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def of_anthropic(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


class Box(BaseModel):
    label: Literal["red", "blue"]
    left: int
    top: int


class Page(BaseModel):
    title: str
    boxes: list[Box]


PAGE = Page(title="Übersicht", boxes=[Box(label="red", left=1, top=22)])
# What the model says by itself, and whether its answer keeps to the form only since it must.
SAID = [json.dumps(PAGE.model_dump(), ensure_ascii=False), f"Sure! {PAGE.model_dump_json()}"]


@pytest.mark.parametrize("said", SAID, ids=["keeps to it", "would not"])
def test_a_response_is_parsed(of_openai: openai.OpenAI, said: str) -> None:
    content: Any = [responses.user(responses.image(), responses.text(say(said)))]
    fields: Any = {"model": "demo", "input": content, "temperature": 0, "max_output_tokens": 500}
    answer = of_openai.responses.parse(**fields, text_format=Page)
    assert answer.output_parsed is not None
    assert said != SAID[0] or answer.output_parsed == PAGE
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"
    with of_openai.responses.stream(**fields, text_format=Page) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert final.output_parsed == answer.output_parsed == done[0].parsed
    listed = of_openai.responses.create(**fields, text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(listed.output_text), dict)


@pytest.mark.parametrize("said", SAID, ids=["keeps to it", "would not"])
def test_a_message_is_parsed(of_anthropic: anthropic.Anthropic, server: Server, said: str) -> None:
    content: Any = [messages.user(messages.image(), messages.text(say(said)))]
    fields: Any = {"model": "demo", "messages": content, "max_tokens": 500, "extra_body": {"temperature": 0}}
    answer = of_anthropic.messages.parse(**fields, output_format=Page)
    assert answer.parsed_output is not None
    assert said != SAID[0] or answer.parsed_output == PAGE
    with of_anthropic.messages.stream(**fields, output_format=Page) as stream:
        final = stream.get_final_message()
    assert final.parsed_output == answer.parsed_output
    form = {"type": "json_schema", "schema": Page.model_json_schema()}
    body = {"messages": content, "max_tokens": 500, "temperature": 0}
    for place in ({"output_format": form}, {"output_config": {"format": form}}):
        whole = server.http.post("/v1/messages", json=body | place).json()
        Page.model_validate_json(whole["content"][0]["text"])


def test_a_form_that_cannot_be_compiled_is_named_as_it_was_sent(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    refused = server.http.post("/v1/responses", json={"input": "x", "text": {"format": form}})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith("text.format")
    assert "response_format" not in refused.text
    body = {"messages": [messages.user(messages.text("x"))], "max_tokens": 9}
    config = {"format": {"type": "json_schema", "schema": schema}}
    refused = server.http.post("/v1/messages", json=body | {"output_config": config})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("output_config.format")
    assert "response_format" not in refused.text
    both = {"text": {"format": form}, "guided_regex": "a"}
    assert server.http.post("/v1/responses", json={"input": "x", **both}).status_code == 400
