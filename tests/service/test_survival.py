"""Workers that die: streams survive, and a request that kills workers fails alone."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from model.request import SamplingParams
from service.metrics import Metrics
from service.pool.generation import Generation
from service.pool.messages import Submit
from service.pool.pool import Pool
from service.pool.supervisor import Death, WorkerConfig
from tests.service.conftest import StartServer
from tests.service.server import chat_body
from tests.service.streams import LONG, kill_worker, read_stream, streaming, text_of


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
