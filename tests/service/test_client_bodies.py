"""What client libraries send is accepted as it comes. tests/clients/ recorded it, and checks that it still is so."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.clients import bodies
from tests.service.server import Server

RECORDED = [(library, request) for library, requests in bodies.read().items() for request in requests]


def image() -> str:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_bodies_of_every_library_are_recorded() -> None:
    libraries = {"openai", "langchain", "litellm", "pydantic_ai", "smolagents"}
    assert {library for library, _ in RECORDED} >= libraries
    for library in libraries:
        texts = [str(request["body"]) for name, request in RECORDED if name == library]
        assert any("IMAGE" in text for text in texts), f"{library} sends no image"


@pytest.mark.parametrize(
    ("library", "sent"), [pytest.param(*one, id=f"{one[0]}-{index}") for index, one in enumerate(RECORDED)]
)
def test_no_field_that_a_library_sends_is_refused(server: Server, library: str, sent: dict[str, Any]) -> None:
    body = bodies.restored(sent["body"], image())
    answer = server.http.post(sent["path"], json=body)
    assert answer.status_code == 200, f"{library}: {answer.text}"
    if body.get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert '"error"' not in answer.text
