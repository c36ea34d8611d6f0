"""Workers killed under running streams, and a server told to stop: clients see one unbroken answer."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest import media
from loadtest.client import Question, parts
from tests.e2e.conftest import StartServer
from tests.e2e.server import EngineServer
from tests.model import tiny

# Long enough that it is still running when the blow falls.
LONG: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True, "speculation": "off"}
SEEDED = {"temperature": 1.0, "seed": 9}
QUESTION = Question("Describe the image.", (media.image(30),))


class Stream(threading.Thread):
    """Reads one streamed answer in the background."""

    def __init__(self, server: EngineServer, **fields: Any) -> None:
        super().__init__()
        body = {"messages": [{"role": "user", "content": parts(QUESTION)}], "temperature": 0, "stream": True}
        self.server, self.body = server, body | LONG | {"stream_options": {"include_usage": True}} | fields
        self.text, self.events = "", 0
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        for event in self._events():
            self.events += 1
            self.error = event.get("error", self.error)
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices", ()):
                self.text += choice["delta"].get("content", "")

    def _events(self) -> Iterator[dict[str, Any]]:
        with self.server.http.stream("POST", "/v1/chat/completions", json=self.body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def whole(self) -> str:
        self.join(120)
        assert not self.is_alive(), "the stream never ended"
        assert not self.error
        assert self.usage["completion_tokens"] == LONG["max_tokens"]
        return self.text


def wait_under_way(server: EngineServer, *streams: Stream) -> None:
    server.wait(lambda: all(stream.events > 20 for stream in streams))


def kill_busy_workers(server: EngineServer) -> int:
    busy = [worker for worker in server.health()["workers"] if worker["requests"]]
    for worker in busy:
        os.kill(worker["pid"], signal.SIGKILL)
    return len(busy)


def wait_replaced(server: EngineServer, killed: int) -> None:
    """All that were ever killed have been replaced, and no other had to be."""
    restarts = "flash_worker_restarts_total"
    server.wait(lambda: server.metric("flash_worker_up") == 2 and server.metric(restarts) >= killed, 60)
    assert server.metric(restarts) == killed


@pytest.fixture
def two_workers(start_server: StartServer, tmp_path: Path) -> EngineServer:
    """Of a model that knows as many positions as such answers take."""
    target = tiny.save_checkpoint(tmp_path / "target", positions=4096)
    draft = tiny.save_draft(tmp_path / "draft", target)
    server = start_server(workers=2, drain_timeout=60, model=target, draft=draft)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    return server


def test_streams_outlive_their_workers_word_for_word(two_workers: EngineServer) -> None:
    """One worker dies: the other goes on with its request. Both die: the answers wait for new workers, and go on."""
    server = two_workers
    undisturbed = [Stream(server).whole(), Stream(server, **SEEDED).whole()]
    assert undisturbed[0] != undisturbed[1]

    killed = 0
    for fields, whole in zip(({}, SEEDED), undisturbed, strict=True):
        stream = Stream(server, **fields)
        wait_under_way(server, stream)
        assert kill_busy_workers(server) == 1
        assert stream.whole() == whole
        killed += 1
        wait_replaced(server, killed)

    streams = [Stream(server), Stream(server, **SEEDED)]
    wait_under_way(server, *streams)
    assert kill_busy_workers(server) == 2
    server.wait(lambda: server.http.get("/readyz").json()["status"] == "no_worker")
    assert [stream.whole() for stream in streams] == undisturbed
    wait_replaced(server, killed + 2)
    server.wait_idle()
    assert server.metric("flash_kv_cache_usage_ratio") == 0

    # Told to stop: what runs is finished, nothing new is taken.
    streams = [Stream(server), Stream(server, **SEEDED)]
    wait_under_way(server, *streams)
    server.terminate()
    server.wait(lambda: server.http.get("/readyz").status_code == 503)
    refused = server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert [stream.whole() for stream in streams] == undisturbed
    assert server.process.wait(20) == 0
