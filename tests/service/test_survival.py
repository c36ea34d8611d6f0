"""Workers that die, clients that leave, queues that fill, servers that are told to stop: with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from loadtest.asking import Answer, Question, Way, ask
from model.request import SamplingParams
from service.metrics import Metrics
from service.pool.generation import Generation
from service.pool.messages import Submit
from service.pool.pool import Pool
from service.pool.supervisor import Death, WorkerConfig
from service.settings import holds_keys
from tests.service.conftest import StartServer
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


# -- a worker dies


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_survives_the_death_of_its_worker(start_server: StartServer, workers: int, temperature: float) -> None:
    server = start_server({"delay": 0.01}, workers=workers)
    fields: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": temperature, "seed": 5}
    whole = server.chat("go on", **fields).json()
    with streaming(server, "go on", stream_options={"include_usage": True}, **fields) as stream:
        events = [next(stream) for _ in range(10)]
        kill_worker(server, next(w["worker"] for w in server.health()["workers"] if w["requests"]))
        events += list(stream)
    assert text_of(events) == whole["choices"][0]["message"]["content"], "not one token lost, doubled or changed"
    assert events[-1]["usage"] == whole["usage"]
    assert server.metric("flash_worker_restarts_total") == 1
    server.wait(lambda: server.metric("flash_worker_up") == workers)
    assert "died: exit code -9" in server.log_text()


def test_all_streams_survive_several_deaths(start_server: StartServer) -> None:
    server = start_server({"delay": 0.005}, workers=2)
    prompts = [f"number {i}" for i in range(8)]
    fields = {"max_tokens": 300, "ignore_eos": True}
    alone = [server.chat(prompt, **fields).json()["choices"][0]["message"]["content"] for prompt in prompts]

    def stream(prompt: str) -> str:
        with streaming(server, prompt, **fields) as events:
            return text_of(list(events))

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(stream, prompt) for prompt in prompts]
        for index in (0, 1):
            time.sleep(0.15)
            kill_worker(server, index)
        assert [answer.result() for answer in answers] == alone
    server.wait(lambda: server.health()["requests"] == 0)


def test_a_request_that_kills_its_workers_fails_and_takes_no_other_with_it(start_server: StartServer) -> None:
    server = start_server({"delay": 0.02}, max_request_retries=2)
    fields: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    prompts = [f"innocent {i}" for i in range(4)]
    alone = [server.chat(prompt, **fields).json()["choices"][0]["message"]["content"] for prompt in prompts]
    with ThreadPoolExecutor(5) as pool:
        innocent = [pool.submit(server.chat, prompt, **fields) for prompt in prompts]
        server.wait(lambda: server.metric("flash_requests_running") == 4)
        bad = pool.submit(server.chat, "ALWAYS CRASH").result()
        texts = [one.result().json()["choices"][0]["message"]["content"] for one in innocent]
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "worker_died")
    assert texts == alone
    assert server.metric("flash_requests_total", outcome="error") == 1
    assert "RuntimeError: the engine is broken" in server.log_text(), "why it died stands in the log"


def test_an_answer_that_a_second_worker_would_change_ends_with_an_error(start_server: StartServer) -> None:
    server = start_server({"delay": 0.02})
    with streaming(server, "DIVERGE", **LONG) as stream:
        events = [next(stream) for _ in range(4)]
        kill_worker(server)
        events += list(stream)
    assert events[-1]["error"]["code"] == "replay_diverged"


def test_a_worker_that_hangs_is_killed_and_replaced(start_server: StartServer) -> None:
    server = start_server(stall_timeout=0.5, max_request_retries=0)
    assert server.chat("HANG").json()["error"]["code"] == "worker_died"
    server.wait_ready()
    assert server.chat(max_tokens=2).status_code == 200


def test_without_a_worker_it_is_alive_but_not_ready(start_server: StartServer) -> None:
    server = start_server({"load_delay": 1})
    kill_worker(server)
    server.wait(lambda: server.http.get("/readyz").status_code == 503)
    assert server.http.get("/readyz").json() == {"status": "no_worker"}
    assert server.metric("flash_worker_up") == 0
    assert server.http.get("/livez").status_code == 200
    refused = server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
    server.wait_ready()
    assert server.chat(max_tokens=2).status_code == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_when_every_worker_is_given_up_all_are_told_and_the_process_ends(
    start_server: StartServer, workers: int
) -> None:
    """It stayed, refused everything, and whatever restarts processes that end badly had nothing to do."""
    server = start_server({"delay": 0.05}, workers=workers, max_worker_restarts=0)
    host, port = server.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(1) as pool, socket.create_connection((host, int(port)), timeout=10) as sending:
        sending.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        with streaming(server, **LONG) as stream:
            next(stream)
            whole = pool.submit(server.chat, **LONG)
            server.wait(lambda: server.metric("flash_requests_running") == 2)
            for pid in server.worker_pids():
                os.kill(pid, signal.SIGKILL)
            assert list(stream)[-1]["error"]["code"] == "no_worker"
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "no_worker")
        said = b""
        while more := sending.recv(4096):
            said += more
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"no_worker"' in said
    assert server.process.wait(10) == 1
    log = server.log_text()
    assert log.count("cannot serve: every worker was given up") == 1
    assert log.count("is given up after 1 deaths in a row") == workers
    assert "Traceback" not in log


def test_as_long_as_one_worker_is_left_it_serves(start_server: StartServer) -> None:
    server = start_server({"delay": 0.01}, workers=2, max_worker_restarts=0)
    kill_worker(server)
    server.wait(lambda: server.health()["workers"][0]["state"] == "given_up")
    assert server.chat(max_tokens=3).status_code == 200
    assert server.http.get("/livez").status_code == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_that_kill_workers_do_not_wear_them_out(start_server: StartServer, workers: int) -> None:
    """Three of them, and nothing else, gave the only worker up for good."""
    server = start_server(workers=workers, max_request_retries=1, max_worker_restarts=2)
    for number in range(4):
        bad = server.chat(f"ALWAYS CRASH {number}")
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "worker_died")
        server.wait_ready()
    assert server.metric("flash_worker_restarts_total") == 8
    assert server.chat(max_tokens=2).status_code == 200


def test_an_engine_that_is_broken_is_not_taken_for_bad_requests(start_server: StartServer) -> None:
    """Every request dies alone, as a bad one would: but the worker cannot answer one of our own either."""
    server = start_server({"broken": 1}, max_request_retries=1, max_worker_restarts=2)
    assert server.chat("innocent").json()["error"]["code"] == "worker_died"
    assert server.process.wait(20) == 1
    assert "cannot serve: every worker was given up" in server.log_text()


@pytest.mark.parametrize(("workers", "newcomer"), [(1, "ALWAYS CRASH"), (1, "CRASH AT 3"), (1, "hello"), (2, "hello")])
def test_nothing_is_sent_beside_a_suspect(start_server: StartServer, workers: int, newcomer: str) -> None:
    """It would be lost with a third death, whoever causes that one. Where there is another worker, others go there."""
    server = start_server({"delay": 0.02}, workers=workers)
    fields: dict[str, Any] = {"max_tokens": 160, "ignore_eos": True}
    whole = server.chat("suspect", **fields).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(1) as pool:
        with streaming(server, "suspect", speculation="off", **fields) as stream:
            events = [next(stream)]
            for deaths in (1, 2):
                events.append(next(stream))
                kill_worker(server, next(w["worker"] for w in server.health()["workers"] if w["requests"]))
                while server.metric("flash_worker_restarts_total") < deaths:
                    time.sleep(0.01)
                server.wait(lambda: server.metric("flash_worker_up") == workers)
            late = pool.submit(server.chat, newcomer, max_tokens=8)
            server.wait(lambda: server.health()["requests"] == 2 or late.done())
            assert "alone" in server.log_text()
            if workers == 2 and newcomer == "hello":
                assert late.result().status_code == 200, "at the other worker, meanwhile"
                assert server.health()["requests"] == 1
            events += list(stream)
        assert text_of(events) == whole
        assert late.result().status_code == (500 if newcomer == "ALWAYS CRASH" else 200)


@pytest.mark.parametrize(("workers", "retries"), [(1, 2), (2, 1)])
def test_two_that_kill_workers_take_no_innocent_stream_along(
    start_server: StartServer, workers: int, retries: int
) -> None:
    """One of eight was lost: suspected for two deaths, it ran alone but for the second bad one, sent beside it."""
    server = start_server({"delay": 0.02}, workers=workers, max_request_retries=retries, request_timeout=120)
    fields: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True}
    prompts = [f"innocent {i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(server.chat, prompt, **fields) for prompt in prompts]
        undisturbed = [one.result().json()["choices"][0]["message"]["content"] for one in whole]

    def stream(prompt: str) -> str:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=chat_body(prompt, stream=True, **fields), timeout=120
        ) as response:
            return text_of(list(read_stream(response)))

    def insist(prompt: str) -> httpx.Response:
        """As clients do that are told to come again: until it is taken."""
        while True:
            response = httpx.post(f"{server.url}/v1/chat/completions", json=chat_body(prompt), timeout=120)
            if response.status_code != 503:
                return response
            time.sleep(0.01)

    with ThreadPoolExecutor(11) as pool:
        innocent = [pool.submit(stream, prompt) for prompt in prompts]
        server.wait(lambda: server.metric("flash_requests_running") == 8)
        bad = [pool.submit(insist, f"ALWAYS CRASH {number}") for number in range(2)]
        server.wait(lambda: server.metric("flash_worker_restarts_total") >= 2, 30)
        bad.append(pool.submit(insist, "ALWAYS CRASH late"))
        assert [one.result().json()["error"]["code"] for one in bad] == ["worker_died"] * 3
        assert [one.result() for one in innocent] == undisturbed
    server.wait(lambda: server.metric("flash_worker_up") == workers)
    assert server.metric("flash_requests_total", outcome="error") == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(start_server: StartServer, workers: int) -> None:
    server = start_server({"fail_load": "model", "load_delay": 1}, wait=False, workers=workers)
    assert server.process.wait(15) == 1
    assert "cannot serve: ValueError: there is no checkpoint at this path" in server.log_text()
    assert server.log_text().count("Traceback") == workers, "it may be a bug"


def test_a_setting_that_cannot_be_used_is_told_without_tracebacks(start_server: StartServer) -> None:
    server = start_server({"fail_load": "setting", "load_delay": 1}, wait=False)
    assert server.process.wait(15) == 1
    assert "cannot serve: there is no checkpoint at this path" in server.log_text()
    assert "Traceback" not in server.log_text()


def test_one_load_that_fails_costs_no_worker_where_others_load(start_server: StartServer) -> None:
    """What another could load is no matter of settings: it is tried again."""
    server = start_server({"fail_load": "once"}, workers=2)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    assert server.metric("flash_worker_restarts_total") == 1


def test_workers_end_when_the_server_is_killed(start_server: StartServer) -> None:
    server = start_server(workers=2)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 3, "two workers and a media child"
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left


@pytest.mark.parametrize(
    ("settings", "fake", "stopped"),
    [
        ({}, {}, "worker"),
        ({"workers": 2}, {}, "all"),
        ({}, {"load_delay": 60}, "loading"),
        ({}, {}, "media child"),
    ],
)
def test_a_stopped_process_does_not_outlive_a_killed_server(
    start_server: StartServer, settings: dict[str, Any], fake: dict[str, Any], stopped: str
) -> None:
    """It cannot see that its socket closed: the kernel has to end it."""
    server = start_server(fake, wait=stopped != "loading", **settings)
    server.wait(lambda: all(server.worker_pids()))
    if stopped == "loading":
        server.wait(lambda: is_set_up(server.worker_pids()[0]))
    workers = set(server.worker_pids())
    children = psutil.Process(server.process.pid).children(recursive=True)
    for child in children:
        if stopped == "all" or (child.pid in workers) == (stopped != "media child"):
            child.suspend()
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    for child in left:
        child.kill()
    assert not left


def is_set_up(pid: int) -> bool:
    """Whether a worker runs our code: it ignores SIGTERM from then on."""
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return ignored is not None and bool(int(ignored[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_no_child_knows_the_keys(start_server: StartServer) -> None:
    """The API process alone checks them; children run models and strangers' files."""
    keys = {"api_key": "key-of-clients,another-key", "admin_key": "key-of-operators"}
    server = start_server(workers=2, **keys)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 3, "two workers and a media child"
    for child in children:
        known = Path(f"/proc/{child.pid}/environ").read_bytes() + " ".join(child.cmdline()).encode()
        assert b"key-of" not in known
        assert b"another-key" not in known


@pytest.mark.parametrize("name", ["FLASH_API_KEY", "FLASH_ADMIN_KEY", "flash_api_key", "Flash_Admin_Key"])
def test_variables_with_keys_are_known_however_they_are_written(name: str) -> None:
    assert holds_keys(name)
    assert not any(map(holds_keys, ("FLASH_MODEL", "PATH", "HF_TOKEN", "FLASH_API_KEYS", "API")))


# -- a stream is silent


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
            return [await ask(client, question, Way(route, stream=stream)) for stream in (True, False)]

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


# -- a client leaves


def engine_is_idle(server: Server) -> bool:
    health = server.health()
    return health["requests"] == 0 and server.metric("flash_requests_running") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(start_server: StartServer, stream: bool) -> None:
    server = start_server({"delay": 0.02})
    body = json.dumps(chat_body(stream=stream, **LONG)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        server.wait(lambda: server.metric("flash_requests_running") == 1)
    server.wait(lambda: engine_is_idle(server), 3)
    assert server.metric("flash_requests_total", outcome="abort") == 1
    assert server.metric("flash_generation_tokens_total") < 1000
    assert "Traceback" not in server.log_text()


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


def test_a_client_that_does_not_read_is_cut_off_in_the_end(start_server: StartServer) -> None:
    server = start_server({"delay": 0.0}, request_timeout=2, max_new_tokens=10**5)
    with unread(server):
        server.wait(lambda: server.metric("flash_requests_total", outcome="timeout"))
        server.wait(lambda: engine_is_idle(server))
    assert "Traceback" not in server.log_text()


def test_a_request_that_takes_too_long_times_out(start_server: StartServer) -> None:
    server = start_server({"delay": 0.05}, request_timeout=0.5)
    late = server.chat(**LONG)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with streaming(server, **LONG) as stream:
        assert list(stream)[-1]["error"]["code"] == "timeout"
    server.wait(lambda: engine_is_idle(server), 3)
    assert server.metric("flash_requests_total", outcome="timeout") == 2


# -- the queue is full


def test_a_full_queue_says_so_at_once_and_empties_again(start_server: StartServer) -> None:
    server = start_server({"delay": 0.05}, max_num_seqs=1, max_waiting=2)
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda i: server.chat(f"number {i}", max_tokens=40), range(12)))
    refused = [response for response in responses if response.status_code == 503]
    assert len(refused) == 9, "one decoded, two waiting"
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        assert response.elapsed.total_seconds() < 0.4
    assert server.metric("flash_requests_rejected_total", reason="queue_full") == 9
    assert server.chat(max_tokens=1).status_code == 200


def test_choices_count_and_no_slot_is_lost_when_they_do_not_fit(start_server: StartServer) -> None:
    server = start_server({"delay": 0.05}, max_num_seqs=1, max_waiting=2)
    assert server.chat(n=3, max_tokens=1).status_code == 200
    with streaming(server, **LONG) as stream:
        next(stream)
        assert server.chat(n=3, max_tokens=1).status_code == 503
        assert server.health()["requests"] == 1
    server.wait(lambda: server.health()["requests"] == 0)


def test_more_choices_than_there_are_places_are_not_asked_for_again(start_server: StartServer) -> None:
    """They were told to try again soon, for ever. A worker that comes back brings its places with it."""
    server = start_server({"load_delay": 1}, workers=2, max_num_seqs=2, max_waiting=1, max_n=16)
    refused = server.chat(n=6, max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "at most 5" in refused.json()["error"]["message"]
    assert server.chat(n=5, max_tokens=1).status_code == 200
    kill_worker(server)
    server.wait(lambda: server.metric("flash_worker_up") == 1)
    assert server.chat(n=5, max_tokens=1).json()["error"]["code"] == "queue_full"


def test_more_choices_than_a_key_may_have_are_not_asked_for_again(start_server: StartServer) -> None:
    server = start_server(api_key="key", max_requests_per_key=3)
    server.http.headers["Authorization"] = "Bearer key"
    refused = server.chat(n=4, max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert server.chat(n=3, max_tokens=1).status_code == 200


def test_the_slot_comes_before_the_body(start_server: StartServer) -> None:
    """Else a full server would still take in, parse and decode everything that it then refuses."""
    server = start_server({"delay": 0.05}, max_num_seqs=1, max_waiting=0)
    with streaming(server, **LONG) as stream:
        next(stream)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 503")


# -- told to stop


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


def test_nothing_is_left_after_many_requests_of_which_some_are_dropped(start_server: StartServer) -> None:
    server = start_server({"delay": 0.001}, workers=2)
    dropped = threading.Semaphore(0)

    def one(i: int) -> None:
        if i % 3:
            assert server.chat(f"number {i}", max_tokens=5 + i % 20, n=1 + i % 2).status_code == 200
            return
        with streaming(server, f"number {i}", **LONG) as stream:
            for _ in range(i % 5 + 1):
                next(stream)
        dropped.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(120)))
    server.wait(lambda: engine_is_idle(server), 5)
    server.wait(lambda: server.metric("flash_requests_total", outcome="abort") == 40, 5)
    assert all(worker["requests"] == 0 for worker in server.health()["workers"])
    assert server.metric("flash_kv_cache_usage_ratio") == 0
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("num_newcomers", [1, 2, 5])
def test_who_waits_for_a_suspect_that_leaves_goes_on_at_once(num_newcomers: int) -> None:
    plan = WorkerConfig("", {}, load_timeout=1, stall_timeout=1, max_restarts=1)
    pool = Pool([plan], max_request_retries=2, observer=Metrics("model"))
    (worker,) = pool.workers
    worker.state = "ready"

    def submit(name: str) -> Generation:
        return pool.submit(Submit(name, (), SamplingParams(), False), lambda _: None)

    submit("running")
    suspect = Generation(Submit("suspect", (), SamplingParams(), False), lambda _: None)
    suspect.deaths = {Death(0), Death(0)}
    pool._dispatch(suspect)
    for number in range(num_newcomers):
        submit(f"newcomer {number}")
    assert (pool.num_running_on(worker), pool.num_parked) == (1, 1 + num_newcomers)
    pool.abort(suspect)
    assert (pool.num_running_on(worker), pool.num_parked) == (1 + num_newcomers, 0)
