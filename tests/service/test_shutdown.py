"""Servers that are stopped: while they drain, load, or cannot listen at all."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.conftest import StartServer
from tests.service.server import chat_body
from tests.service.streams import LONG, streaming, text_of, unread


def test_a_drain_lets_answers_finish_and_takes_nothing_new(start_server: StartServer) -> None:
    server = start_server({"delay": 0.02}, drain_timeout=20)
    whole = server.chat("last one", max_tokens=300, ignore_eos=True).json()["choices"][0]["message"]["content"]
    with streaming(server, "last one", max_tokens=300, ignore_eos=True) as stream:
        events = [next(stream)]
        server.terminate()
        server.wait(lambda: server.http.get("/readyz").status_code == 503)
        assert server.http.get("/readyz").json() == {"status": "draining"}
        assert server.http.get("/livez").status_code == 200
        refused = server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        events += list(stream)
    assert text_of(events) == whole
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log_text()


def test_what_outlasts_the_drain_is_told(start_server: StartServer) -> None:
    server = start_server({"delay": 0.05}, drain_timeout=0.5)
    with streaming(server, **LONG) as stream:
        next(stream)
        server.terminate()
        assert list(stream)[-1]["error"]["code"] == "draining"
    assert server.process.wait(10) == 0


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_second_signal_ends_the_drain_and_everybody_is_told(start_server: StartServer, pause: float) -> None:
    """Whatever a request waits for: clients got a bare 499 or 500, streams just stopped, and the log had tracebacks."""
    server = start_server({"delay": 0.05}, drain_timeout=60)
    host, port = server.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(1) as pool, socket.create_connection((host, int(port)), timeout=5) as sending:
        sending.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        whole = pool.submit(server.chat, **LONG)
        body = chat_body(stream=True, **LONG)
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.wait(lambda: (server.health()["requests"], server.health()["uploads"]) == (2, 1))
            server.terminate()
            time.sleep(pause)
            server.terminate(signal.SIGINT)
            *_, error, _, done, _ = lines
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "draining")
        said = b""
        while more := sending.recv(4096):
            said += more
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"draining"' in said
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log_text()


def test_a_client_that_does_not_read_does_not_hold_up_the_end(start_server: StartServer) -> None:
    server = start_server({"delay": 0.0}, drain_timeout=0.5, max_new_tokens=10**5)
    with unread(server):
        server.wait(lambda: server.metric("flash_generation_tokens_total") > 100_000)
        server.terminate()
        assert server.process.wait(10) == 0
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::1"])
def test_a_port_in_use_is_said_in_one_line_before_anything_is_loaded(tmp_path: Path, host: str) -> None:
    taken = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    with taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "service.cli", "serve", "--host", host, "--port", str(port)]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 3
    (line,) = run.stderr.splitlines()
    assert f"cannot listen on {host} port {port}: Address already in use; choose another --port or --host" in line


def test_it_can_be_stopped_while_it_loads(start_server: StartServer) -> None:
    server = start_server({"load_delay": 60}, wait=False)
    server.wait(lambda: server.http.get("/livez").status_code == 200)
    assert server.http.get("/readyz").json() == {"status": "loading"}
    refused = server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    server.terminate()
    assert server.process.wait(5) == 0
