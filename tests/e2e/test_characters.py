"""Characters spread over several tokens arrive whole, streamed or not, and their bytes are those of the text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.server import EngineServer
from tests.model.scripted import say
from tests.service.server import Server
from tests.service.streams import streaming

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
TEXTS = {
    "family": f"a {FAMILY} b",
    "flag": "to \U0001f1e9\U0001f1ea and \U0001f1fa\U0001f1f8",
    "skin": "\U0001f44d\U0001f3fd\U0001f44d\U0001f3ff",
    "new emoji": "\U0001fae0\U0001f979",
    "rare": "龜龘𠮷",
    "Hangul": "안녕하세요 세계",
    "combining": "e\u0301 n\u0303 \u0e01\u0e34\u0e48",
    "repeated": "龜 🫠 龜 🫠 龜 🫠 龜 🫠 龜 🫠",  # which drafts copy, up to the middle of a character
}


@pytest.fixture
def server(scripted_server: EngineServer) -> EngineServer:
    return scripted_server


def whole(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    response = server.chat(say(text), **{"max_tokens": 200, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(server: Server, text: str, **fields: Any) -> list[str]:
    with streaming(server, say(text), **{"max_tokens": 200, **fields}) as stream:
        return [chunk["choices"][0]["delta"].get("content") or "" for chunk in stream]


@pytest.mark.parametrize("speculation", ["auto", "off"])
@pytest.mark.parametrize("name", TEXTS)
def test_no_character_is_split(server: Server, name: str, speculation: str) -> None:
    text = TEXTS[name]
    assert whole(server, text, speculation=speculation)["message"]["content"] == text
    pieces = streamed(server, text, speculation=speculation)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TEXTS)
def test_bytes_of_the_tokens_are_those_of_the_text(server: Server, name: str) -> None:
    choice = whole(server, TEXTS[name], logprobs=True)
    tokens = [bytes(token["bytes"]) for token in choice["logprobs"]["content"]]
    assert b"".join(tokens).startswith(TEXTS[name].encode()), "only the end token follows"
    assert any(len(token) < 3 for token in tokens), "no character was spread"
    with streaming(server, say(TEXTS[name]), max_tokens=200, logprobs=True) as stream:
        entries = [chunk["choices"][0]["logprobs"] for chunk in stream]
    streamed = [bytes(token["bytes"]) for entry in entries if entry for token in entry["content"]]
    assert streamed == tokens


@pytest.mark.parametrize("name", ["family", "rare", "new emoji", "Hangul"])
def test_only_an_end_by_length_may_cut_a_character(server: Server, name: str) -> None:
    text, cut = TEXTS[name], 0
    for most in range(1, 12):
        choice = whole(server, text, max_tokens=most)
        content, reason = choice["message"]["content"], choice["finish_reason"]
        kept = content.rstrip("\ufffd")
        assert text.startswith(kept)
        assert kept == content or reason == "length"
        assert "".join(streamed(server, text, max_tokens=most)) == content
        cut += kept != content
    assert cut, "none was cut: nothing was tried"


@pytest.mark.parametrize(
    ("name", "stop", "kept"),
    [
        ("family", "\u200d", "a \U0001f468"),
        ("family", "\U0001f469\u200d", "a \U0001f468\u200d"),
        ("flag", "\U0001f1ea", "to \U0001f1e9"),
        ("skin", "\U0001f3ff", "\U0001f44d\U0001f3fd\U0001f44d"),
        ("combining", "\u0301", "e"),
        ("rare", "龘", "龜"),
    ],
)
def test_a_stop_string_may_be_a_part_of_what_looks_like_one(server: Server, name: str, stop: str, kept: str) -> None:
    choice = whole(server, TEXTS[name], stop=stop)
    assert (choice["message"]["content"], choice["finish_reason"]) == (kept, "stop")
    assert "".join(streamed(server, TEXTS[name], stop=[stop, "never"])) == kept
