"""What client libraries send is accepted as it comes. tests/clients/ recorded it, and checks that it still is so."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.unknown_fields import HEADER
from tests.clients import bodies
from tests.service.server import Server

FEW_TOKENS = 12
LIMITS = {"/v1/responses": "max_output_tokens"}
RECORDED = [(library, request) for library, requests in bodies.read().items() for request in requests]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One with a chat template for tools, which the fake engine has not. Agents' prompts have thousands of tokens."""
    settings = {"engine": "tests.service.scripted_engine:load", "max_model_len": 8192}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"kind": "hermes"}, settings, wait=False)
        server.wait(lambda: server.http.get("/readyz").status_code == 200, 240)  # it makes its checkpoint first
        yield server
        assert server.close() == 0, server.log_text()


def image() -> str:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_bodies_of_every_library_are_recorded() -> None:
    libraries = {"openai", "anthropic", "langchain", "litellm", "instructor", "pydantic_ai", "smolagents"}
    assert {library for library, _ in RECORDED} >= libraries
    for library in libraries:
        texts = [str(request["body"]) for name, request in RECORDED if name == library]
        assert any("IMAGE" in text for text in texts), f"{library} sends no image"


@pytest.mark.parametrize(
    ("library", "sent"), [pytest.param(*one, id=f"{one[0]}-{index}") for index, one in enumerate(RECORDED)]
)
def test_no_field_that_a_library_sends_is_refused(server: Server, library: str, sent: dict[str, Any]) -> None:
    body = bodies.restored(sent["body"], image())
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"} & set(body)
    body |= dict.fromkeys(limits or {LIMITS.get(sent["path"], "max_tokens")}, FEW_TOKENS)
    answer = server.http.post(sent["path"], json=body)
    assert answer.status_code == 200, f"{library}: {answer.text}"
    assert HEADER not in answer.headers, f"{library}: {answer.headers[HEADER]}"
    if body.get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert '"error":{' not in answer.text
