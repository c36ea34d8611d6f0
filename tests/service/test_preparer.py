"""Requests are prepared one at a time; aborts and small requests pass those that take long."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.request import Medium, Message, Request, RequestError, SamplingParams, TemplateOptions, VideoMetadata
from service.pool import messages as m
from service.pool.preparer import PIXELS_PER_PLACE, PreparedRequest, Preparer
from tests.service.server import Server, chat_body
from tests.service.streams import LONG, engine_is_idle, streaming

SECONDS = 20.0


class SlowEngine:
    """Prepares requests of the text "wait" only when `go` is released, and writes down what it did."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.busy = threading.Lock()

    def prepare(self, request: Request) -> str:
        with one_at_a_time(self.busy):
            self.begun.put(request.request_id)
            texts = [part for message in request.messages for part in message.content]
            if texts[0] == "wait":
                assert self.go.acquire(timeout=SECONDS)
            if texts[0] == "refuse":
                raise RequestError("too long", param="messages", code="too_long")
            if texts[0] == "break":
                raise KeyError("a template's own trouble")
            return f"prepared {request.request_id}"

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        return None if fps else list(range(num_frames or 0))

    def tokenize(self, request: Request) -> list[int]:
        return [len(part) for message in request.messages for part in message.content if isinstance(part, str)]

    def token_names(self, ids: Any) -> list[str]:
        return [str(token) for token in ids]

    def detokenize(self, ids: Any) -> str:
        return " ".join(map(str, ids))


class one_at_a_time:  # noqa: N801
    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        assert self.lock.acquire(blocking=False), "processors are not safe side by side"

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def results() -> queue.SimpleQueue[Any]:
    return queue.SimpleQueue()


@pytest.fixture
def preparer(engine: SlowEngine, results: queue.SimpleQueue[Any]) -> Preparer:
    preparer = Preparer(results.put)
    preparer.engine = engine
    return preparer


def submit(request_id: str, text: str = "", num_pixels: int = 0) -> m.Submit:
    medium = [Medium("image", np.zeros((1, 1, num_pixels, 3), np.uint8))] if num_pixels else []
    return m.Submit(request_id, (Message("user", (text, *medium)),), SamplingParams(), speculation=True)


def outcome(message: Any) -> tuple[str, str]:
    """The request, and what became of it."""
    match message:
        case PreparedRequest():
            assert message.sequence == f"prepared {message.request_id}"
            return message.request_id, "prepared"
        case m.Refused():
            return message.request_id, f"refused: {message.message}"
        case m.Outputs(outputs=(output,)):
            return output.request_id, str(output.finish_reason)
    raise AssertionError(message)


def drained(results: queue.SimpleQueue[Any], count: int) -> list[Any]:
    found = [results.get(timeout=SECONDS) for _ in range(count)]
    assert results.empty()
    return found


def test_each_request_and_question_has_one_result(preparer: Preparer, results: queue.SimpleQueue[Any]) -> None:
    for text in ("fine", "refuse", "break"):
        preparer.add(submit(text, text))
    preparer.add(m.Sample(1, VideoMetadata(3, None, None, 4, 4), 2, None))
    preparer.add(m.Tokenize(2, (Message("user", ("word",)),), TemplateOptions(), None))
    preparer.add(m.Detokenize(3, (4, 5)))
    *requests, sampled, tokenized, detokenized = drained(results, 6)
    assert [outcome(each) for each in requests] == [
        ("fine", "prepared"), ("refuse", "refused: too long"), ("break", "error")
    ]  # fmt: skip
    assert (sampled, tokenized) == (m.Sampled(1, (0, 1)), m.Tokenized(2, (4,), ("4",)))
    assert detokenized == m.Detokenized(3, "4 5")


def test_small_requests_and_questions_pass_large_ones_but_not_for_ever(
    preparer: Preparer, engine: SlowEngine, results: queue.SimpleQueue[Any]
) -> None:
    preparer.add(submit("first", "wait"))
    assert engine.begun.get(timeout=SECONDS) == "first"
    preparer.add(submit("large", num_pixels=3 * PIXELS_PER_PLACE))
    preparer.add(submit("small", num_pixels=PIXELS_PER_PLACE - 1))
    preparer.add(m.Detokenize(1, (7,)))
    for number in range(4):
        preparer.add(submit(f"text {number}"))
    engine.go.release()
    assert results.get(timeout=SECONDS) == PreparedRequest("first", "prepared first")
    order = [each.text if isinstance(each, m.Detokenized) else outcome(each)[0] for each in drained(results, 7)]
    assert order == ["small", "7", "large", "text 0", "text 1", "text 2", "text 3"]


def test_an_abort_passes_all_that_wait(preparer: Preparer, engine: SlowEngine, results: queue.SimpleQueue[Any]) -> None:
    for name, text in (("present", "wait"), ("waiting", "wait"), ("refused", "refuse"), ("other", "")):
        preparer.add(submit(name, text))
    assert engine.begun.get(timeout=SECONDS) == "present"
    assert [preparer.abort(name) for name in ("present", "waiting", "refused", "unknown")] == [True, True, True, False]
    engine.go.release()
    found = [outcome(each) for each in drained(results, 4)]
    assert found == [("present", "abort"), ("waiting", "abort"), ("refused", "abort"), ("other", "prepared")]
    assert engine.begun.get(timeout=SECONDS) == "other", "what was aborted before its turn is not prepared"
    assert not preparer.abort("other"), "from now on it is the engine's"


def test_aborts_at_any_moment_leave_each_request_one_result(
    preparer: Preparer, results: queue.SimpleQueue[Any]
) -> None:
    """Either it was aborted here, or the engine gets it and then its abort: never neither, both, or the other way."""

    def client(number: int) -> None:
        rng = random.Random(number)
        for each in range(100):
            name = f"{number}/{each}"
            preparer.add(submit(name))
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.0005)
            if not preparer.abort(name):
                results.put(m.Abort(name))  # as the link does

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    fates: dict[str, list[str]] = {}
    while len(fates) < 400 or not results.empty():
        result = results.get(timeout=SECONDS)
        name, what = (result.request_id, "to the engine") if isinstance(result, m.Abort) else outcome(result)
        fates.setdefault(name, []).append(what)
    assert {tuple(fate) for fate in fates.values()} == {("abort",), ("prepared", "to the engine")}


def test_an_abort_comes_after_the_delivery_that_it_meets(engine: SlowEngine, results: queue.SimpleQueue[Any]) -> None:
    """Or the engine would get first the abort of a request that it does not know, and then the request."""

    def abort() -> None:
        if not preparer.abort("met"):
            results.put(m.Abort("met"))  # as the link does

    def deliver(result: Any) -> None:
        threads.submit(abort)
        time.sleep(0.05)
        results.put(result)

    with ThreadPoolExecutor(1) as threads:
        preparer = Preparer(deliver)
        preparer.engine = engine
        preparer.add(submit("met"))
        assert drained(results, 2) == [PreparedRequest("met", "prepared met"), m.Abort("met")]


# -- in a service


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Prepares what has "PREPARE SLOWLY" in its text as soon as the folder has a file "go"."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow_engine.py").write_text(
        "import time, pathlib, fake_engine\n"
        f"go = pathlib.Path({str(folder / 'go')!r})\n"
        "class Engine(fake_engine.FakeEngine):\n"
        "    def prepare(self, request):\n"
        "        while 'PREPARE SLOWLY' in repr(request.messages) and not go.exists():\n"
        "            time.sleep(0.01)\n"
        "        return super().prepare(request)\n"
        "def load(options):\n"
        "    return Engine(options)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        server = Server(folder, {"delay": 0.01}, {"engine": "slow_engine:load"})
    yield server, folder / "go"
    assert server.close() == 0, server.log_text()


def test_streams_end_and_others_go_on_while_a_request_is_prepared(slow_server: tuple[Server, Path]) -> None:
    server, go = slow_server
    with ThreadPoolExecutor(2) as pool, streaming(server, "stays", **LONG) as stays:
        next(stays)
        with streaming(server, "leaves", **LONG) as leaves:
            next(leaves)
            slow = pool.submit(server.http.post, "/v1/chat/completions", json=chat_body("PREPARE SLOWLY", max_tokens=3))
            server.wait(lambda: server.health()["requests"] == 3 and server.metric("flash_requests_running") == 2)
        server.wait(lambda: server.metric("flash_requests_running") == 1)  # its abort was not held up
        assert json.loads(server.http.get("/health").text)["requests"] == 2
        assert len([next(stays) for _ in range(5)]) == 5
        assert not slow.done()
        go.touch()
        assert slow.result().json()["usage"]["completion_tokens"] == 3
    server.wait(lambda: engine_is_idle(server))
