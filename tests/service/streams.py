"""What tests of streams share: read one, kill a worker under it, leave it unread."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.service.server import Server, chat_body

LONG: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True}


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event.get("choices"))


def read_stream(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextmanager
def streaming(server: Server, prompt: str = "hello", **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
    body = chat_body(prompt, stream=True, **fields)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        yield read_stream(response)


def kill_worker(server: Server, index: int = 0) -> None:
    os.kill(server.worker_pids()[index], signal.SIGKILL)


def engine_is_idle(server: Server) -> bool:
    health = server.health()
    return health["requests"] == 0 and server.metric("flash_requests_running") == 0


@contextmanager
def unread(server: Server) -> Iterator[None]:
    """A client asks for more than its connection holds, and reads nothing of it."""
    body = json.dumps(chat_body(stream=True, n=8, max_tokens=40_000, ignore_eos=True)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        yield


def read_events(body: str) -> list[dict[str, Any]]:
    """Read a stream of named events; each has its name as its type too."""
    events = []
    for block in body.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
