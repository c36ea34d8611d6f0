"""Clients that leave or do not read, requests that time out, queues that fill."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.media.samples import encoded, picture, video_bytes
from tests.service.conftest import StartServer
from tests.service.refusals import connected
from tests.service.server import chat_body
from tests.service.streams import LONG, engine_is_idle, kill_worker, streaming, unread


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
        responses = list(pool.map(lambda i: server.chat(f"number {i}", max_tokens=60), range(12)))
    refused = [response for response in responses if response.status_code == 503]
    served = [response.elapsed for response in responses if response.status_code == 200]
    assert len(refused) == 9, "one decoded, two waiting"
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        assert response.elapsed < min(served), "it waited for a place"
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


# -- clients that leave at any time


def request_of(path: str, parts: dict[str, str], **fields: Any) -> bytes:
    """A whole request with media, of either route."""
    if path == "generate":
        data = {"prompt": "x", "max_tokens": "2000", "ignore_eos": "true"} | {
            n: str(v).lower() for n, v in fields.items()
        }
        files = [("media", base64.b64decode(uri.partition(",")[2])) for uri in parts.values()]
        request = httpx.Request("POST", "http://x/v1/generate", data=data, files=files)
    else:
        content = [{"type": kind, kind: {"url": uri}} for kind, uri in parts.items()]
        body = chat_body(messages=[{"role": "user", "content": content}], **LONG, **fields)
        request = httpx.Request("POST", "http://x/v1/chat/completions", json=body)
    head = f"POST {request.url.path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in request.headers.items()
    )
    return head.encode() + b"\r\n" + request.read()


def test_clients_leave_at_any_time_and_nothing_is_left_of_them(start_server: StartServer) -> None:
    """While they upload, while their media are decoded, in the queue, in a stream, before an answer in one piece; some
    close one half of their connection first."""
    limits = {"max_num_seqs": 2, "max_decoded_bytes": 24_000_000, "media_workers": 2, "video_workers": 1}
    server = start_server({"delay": 0.01, "any_size": 1}, **limits)
    image = encoded(picture(1200, 900), "PNG")
    clip = video_bytes("mp4", (160, 120), num_frames=64)
    media = {
        "image_url": "data:image/png;base64," + base64.b64encode(image).decode(),
        "video_url": "data:video/mp4;base64," + base64.b64encode(clip).decode(),
    }
    rng = random.Random(0)

    def leave(number: int) -> None:
        stream, path = bool(number & 1), "generate" if number & 2 else "chat"
        parts = {name: media[name] for name in rng.sample(sorted(media), rng.choice((1, 1, 2)))}
        request = request_of(path, parts, stream=stream)
        with connected(server) as sock:
            sock.sendall(request if number % 5 else request[: len(request) // 2])
            time.sleep(rng.choice((0.0, 0.02, 0.1, 0.3, 0.6)))
            if number % 7 == 0:
                sock.shutdown(socket.SHUT_WR)
                time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(40)))
    server.wait(lambda: engine_is_idle(server) and not server.health()["uploads"], 20)
    assert server.metric("flash_requests_waiting") == 0
    assert [worker["requests"] for worker in server.health()["workers"]] == [0]
    assert server.metric("flash_requests_total", outcome="abort") > 10
    assert server.metric("flash_requests_total", outcome="error") == 0
    assert server.metric("flash_kv_cache_usage_ratio") == 0
    content = [{"type": "image_url", "image_url": media["image_url"]}] * 7  # 23 MB: no byte may still be counted
    served = server.http.post("/v1/chat/completions", json=chat_body(messages=[{"role": "user", "content": content}]))
    assert served.status_code == 200, served.text
    assert "Traceback" not in server.log_text()
