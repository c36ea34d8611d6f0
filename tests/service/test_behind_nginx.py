"""Behind an nginx that keeps requests and answers back, answers are whole and clients that leave are gone."""

from __future__ import annotations

import base64
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import httpx
import pytest
from PIL import Image

from loadtest.rolling import Nginx
from loadtest.service import Footprint, footprint
from tests.media.samples import encoded, video_bytes
from tests.service.server import Server, chat_body
from tests.service.streams import LONG, engine_is_idle, read_stream, text_of
from tests.service.test_clients import request_of

pytestmark = pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"),
    reason="needs nginx; on Debian: apt-get install nginx-light",
)
NUM_CHILDREN = 3
CHILD_BYTES = 110_000_000  # of an idle child; the largest picture takes 150 million more
GROWTH = 24_000_000  # bytes of the other processes: caches and the arenas of malloc
LARGEST_SIDE = 7071  # 50 million pixels


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, int]]:
    """A server, and the host and port of an nginx before it."""
    settings = {"max_num_seqs": 2, "media_workers": 2, "video_workers": 1}
    server = Server(tmp_path_factory.mktemp("behind"), {"delay": 0.01}, settings)
    try:
        nginx = Nginx(tmp_path_factory.mktemp("nginx"), [server.url.removeprefix("http://")], buffering=True)
        try:
            yield server, "127.0.0.1", nginx.port
        finally:
            nginx.stop()
    finally:
        assert server.close() == 0, server.log_text()
    assert "Traceback" not in server.log_text()


@cache
def media() -> dict[str, str]:
    """Data URIs of a clip of 64 frames and of the largest picture that is allowed, by the part that carries them."""
    image = encoded(Image.new("1", (LARGEST_SIDE, LARGEST_SIDE), 1), "PNG")
    clip = video_bytes("mp4", (160, 120), num_frames=64)
    return {
        "image_url": "data:image/png;base64," + base64.b64encode(image).decode(),
        "video_url": "data:video/mp4;base64," + base64.b64encode(clip).decode(),
    }


def test_answers_are_those_without_a_proxy(behind: tuple[Server, str, int]) -> None:
    server, host, port = behind
    for parts in (["video_url"], ["image_url", "video_url"]):
        content = [{"type": kind, kind: {"url": media()[kind]}} for kind in parts]
        body = chat_body(messages=[{"role": "user", "content": content}], max_tokens=20)
        expected = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as http:
            whole = http.post("/v1/chat/completions", json=body).json()
            assert whole["choices"][0]["message"]["content"] == expected
            with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
                assert text_of(list(read_stream(response))) == expected


def test_a_stream_is_passed_on_as_it_comes(behind: tuple[Server, str, int]) -> None:
    """It asks nginx for that itself (X-Accel-Buffering), whatever proxy_buffering says."""
    server, host, port = behind
    before = server.metric("flash_generation_tokens_total")
    with (
        httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, **LONG)) as response,
    ):
        events = read_stream(response)
        assert next(events)
        assert not engine_is_idle(server)
    server.wait(lambda: engine_is_idle(server))
    assert server.metric("flash_generation_tokens_total") - before < LONG["max_tokens"]


@pytest.mark.parametrize(
    ("number", "concurrency"), [(20, 8), pytest.param(200, 16, marks=pytest.mark.slow)], ids=["20", "200"]
)
def test_clients_that_leave_are_gone_and_memory_is_flat(
    behind: tuple[Server, str, int], number: int, concurrency: int
) -> None:
    """While nginx has their request, while their media are decoded, in the queue, in a stream and before an answer in
    one piece; some close one half of their connection first, and some come without nginx."""
    server, host, port = behind
    own_host, own_port = server.url.removeprefix("http://").split(":")
    rng = random.Random(0)

    def leave(index: int) -> None:
        path, kind = "generate" if index & 2 else "chat", "image_url" if index & 4 else "video_url"
        request = request_of(path, {kind: media()[kind]}, stream=bool(index & 1))
        address = (own_host, int(own_port)) if index % 5 == 0 else (host, port)
        with socket.create_connection(address, timeout=5) as sock:
            sock.sendall(request if index % 6 else request[: len(request) // 2])
            time.sleep(rng.choice((0.05, 0.5, 2.0)))
            if index % 7 == 0:
                sock.shutdown(socket.SHUT_WR)
                time.sleep(0.05)

    def settled() -> Footprint | None:
        """What it takes once every child that was killed has its successor."""
        found = footprint(server.http)
        return found if found and found.num_processes == 2 + NUM_CHILDREN else None

    takes, aborted = [], server.metric("flash_requests_total", outcome="abort")
    for _ in range(2):
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(leave, range(number)))
        server.wait(lambda: engine_is_idle(server) and not server.health()["uploads"], 20)
        assert server.metric("flash_requests_waiting") == 0
        assert server.metric("flash_kv_cache_usage_ratio") == 0
        assert [worker["requests"] for worker in server.health()["workers"]] == [0]
        takes.append(server.wait(settled))
    before, after = takes
    assert after.api + after.workers < before.api + before.workers + GROWTH, (before, after)
    assert after.media < NUM_CHILDREN * CHILD_BYTES, (before, after)
    assert after.num_files <= before.num_files + 4, (before, after)
    assert server.metric("flash_requests_total", outcome="abort") - aborted > number / 4
    assert server.metric("flash_requests_total", outcome="error") == 0
    assert server.chat(max_tokens=1).status_code == 200
