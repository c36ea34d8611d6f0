"""Comments keep a silent stream's connection alive."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loadtest.client import Answer, Question, Variant, ask
from tests.service.conftest import StartServer
from tests.service.server import Server, chat_body
from tests.service.streams import kill_worker, streaming, text_of


def lines_of(
    server: Server, path: str, body: dict[str, Any], after: Callable[[int], None] = lambda _: None
) -> list[str]:
    """A stream's lines that are not empty; `after` is called with each one's number as it comes."""
    sent = {"json": body} if path.endswith("completions") else {"data": body}
    lines: list[str] = []
    with server.http.stream("POST", path, **sent) as response:  # type: ignore[arg-type]
        assert response.status_code == 200, response.read()
        for line in filter(None, response.iter_lines()):
            lines.append(line)
            after(len(lines))
    return lines


@pytest.fixture(scope="module")
def quiet_server() -> Iterator[Server]:
    """Its steps, and above all its workers' starts, take longer than a stream may be silent."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"sse_keepalive_seconds": 0.1, "max_num_seqs": 1}
        server = Server(Path(folder), {"delay": 0.15, "load_delay": 0.6}, settings)
        yield server
        assert server.close() == 0
        assert "Traceback" not in server.log_text()


PATHS = {
    "/v1/chat/completions": chat_body("go on", stream=True, max_tokens=13),
    "/v1/generate": {"prompt": "go on", "stream": "true", "max_tokens": 13},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_silent_stream_gets_comments_between_its_events(quiet_server: Server, path: str) -> None:
    lines = lines_of(quiet_server, path, PATHS[path])
    comments = [number for number, line in enumerate(lines) if line == ": keep-alive"]
    events = [line for line in lines if line != ": keep-alive"]
    assert len(comments) >= 3, "a step takes longer than the silence"
    assert all(line.startswith("data: ") for line in events), "whole lines, whatever comes between them"
    assert not lines[-1].startswith(":"), "nothing comes after the end"
    said = [json.loads(line[6:]) for line in events if line != "data: [DONE]"]
    tokens = {
        "choices": text_of(said),
        "type": "".join(one.get("text", "") for one in said if one.get("type") == "token"),
    }
    whole = quiet_server.chat("go on", max_tokens=13).json()["choices"][0]["message"]["content"]
    assert whole in tokens.values()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_survives_its_worker_is_not_silent_meanwhile(quiet_server: Server, path: str) -> None:
    """Proxies and clients hung up on streams that would have gone on."""
    whole = [line for line in lines_of(quiet_server, path, PATHS[path]) if line.startswith("data: ")]
    lines = lines_of(quiet_server, path, PATHS[path], lambda number: kill_worker(quiet_server) if number == 2 else None)
    assert sum(line == ": keep-alive" for line in lines) >= 5, "the new worker takes 0.6 s and more to load"
    events = [line for line in lines if line.startswith("data: ")]
    assert len(events) == len(whole), "not one token lost, doubled or changed"
    quiet_server.wait_ready()


@pytest.mark.parametrize("n", [1, 2])
def test_openais_client_passes_over_comments(quiet_server: Server, n: int) -> None:
    """With one sequence at a time the second choice waits for the first: its stream has comments, too."""
    client = openai.OpenAI(base_url=f"{quiet_server.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 9, "n": n}
    messages: Any = [{"role": "user", "content": "go on"}]
    whole = client.chat.completions.create(messages=messages, **asked)
    texts = [""] * n
    asked["stream_options"] = {"include_usage": True}
    for chunk in client.chat.completions.create(messages=messages, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunk.usage == whole.usage


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_the_load_generators_parser_passes_over_comments(quiet_server: Server, route: Any) -> None:
    async def asked() -> list[Answer]:
        async with httpx.AsyncClient(base_url=quiet_server.url, timeout=30) as client:
            question = Question("go on", (), {"max_tokens": 9})
            return [await ask(client, question, Variant(route, stream=stream)) for stream in (True, False)]

    streamed, whole = asyncio.run(asked())
    assert (streamed.status, streamed.error) == (200, {})
    assert streamed.texts == whole.texts


def test_comments_can_be_turned_off(start_server: StartServer) -> None:
    server = start_server({"delay": 0.2}, sse_keepalive_seconds=0)
    for path, body in PATHS.items():
        assert all(line.startswith("data: ") for line in lines_of(server, path, body))


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_goes_on_has_no_comments(server: Server, path: str) -> None:
    assert all(line.startswith("data: ") for line in lines_of(server, path, PATHS[path]))


def test_a_refusal_comes_before_any_comment(quiet_server: Server) -> None:
    """What waits for its first token has no status yet: it may still be refused."""
    with streaming(quiet_server, "another", max_tokens=9) as stream:
        next(stream)
        late = quiet_server.chat("FAIL AT 0", stream=True)
        assert (late.status_code, late.json()["error"]["code"]) == (500, "engine_failure")
