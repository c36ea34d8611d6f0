"""A real server with the scripted target says what the messages write down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.scripted import say
from tests.service.server import Server
from tests.service.streams import streaming, text_of

ENGINE = "tests.service.scripted_engine:load"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"says": "Good day."}, {"engine": ENGINE})
        yield server
        assert server.close() == 0, server.log_text()


@pytest.mark.parametrize("text", ['{"a": [1, 2, {"b": "ü"}]}', "Two\n\nlines", "x"])
def test_it_answers_with_the_script(server: Server, text: str) -> None:
    whole = server.chat(say(text), max_tokens=99).json()
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["choices"][0]["finish_reason"] == "stop"
    with streaming(server, say(text), max_tokens=99) as stream:
        assert text_of(list(stream)) == text


def test_it_answers_without_a_script(server: Server) -> None:
    assert json.loads(server.chat("hello", max_tokens=9).text)["choices"][0]["message"]["content"] == "Good day."
