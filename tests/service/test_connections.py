"""Crowds of connections: whoever waits for its client makes room, whoever is served stays, and probes are answered."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.connections import MAX_DESCRIPTORS, Connections, raise_descriptor_limit
from service.server import BoundedHttpProtocol
from tests.service.conftest import StartServer
from tests.service.refusals import connected
from tests.service.server import Server, chat_body

MOST = 24
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LONG: dict[str, Any] = {"stream": True, "max_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"delay": 0.02}, {"max_connections": MOST, "max_num_seqs": 64})
        yield server
        assert server.close() == 0, server.log_text()
        assert "Traceback" not in server.log_text()


def newcomer(server: Server, path: str = "/livez") -> httpx.Response:
    return httpx.get(server.url + path, timeout=5)


def test_connections_that_wait_for_their_clients_make_room(small: Server) -> None:
    """At 1,024 descriptors every new one was reset, probes too, and the log said nothing."""
    heads = (
        b"",
        b"GET /livez HTTP/1.1\r\nX: ",
        b"POST /v1/generate HTTP/1.1\r\nContent-Length: 9\r\n",
        GET,
        GET + b"GET /",
    )
    with small.http.stream("POST", "/v1/chat/completions", json=chat_body(**LONG)) as running, ExitStack() as stack:
        lines = running.iter_lines()
        next(lines)
        crowd = []
        for number in range(3 * MOST):
            sock = stack.enter_context(connected(small))
            sock.sendall(begun := heads[number % len(heads)])
            if begun.startswith(GET):
                said = b""
                while not said.endswith(b"}"):
                    said += sock.recv(4096)
            crowd.append(sock)
            if number % 8 == 0:
                assert newcomer(small).status_code == 200
        assert newcomer(small, "/readyz").status_code == 200
        for sock in crowd[:MOST]:  # their wait, the longest, has ended
            with suppress(ConnectionResetError):
                assert sock.recv(4096) == b""
        for sock in crowd[-MOST // 2 :]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(4096)
        tail = list(lines)
    assert tail[-2] == "data: [DONE]", "an answer that is read is not cut"


def test_the_log_tells_of_it_once_in_a_while(small: Server) -> None:
    with ExitStack() as stack:
        for _ in range(3 * MOST):
            stack.enter_context(connected(small))
        small.wait(lambda: "--max-connections" in small.log_text())
    lines = [line for line in small.log_text().splitlines() if "--max-connections" in line]
    assert f"there are {MOST} connections" in lines[0]
    assert len(lines) < MOST


def test_where_all_are_served_a_newcomer_is_refused_in_words(small: Server) -> None:
    with ExitStack() as stack:
        body = json.dumps(chat_body(**LONG)).encode()
        for _ in range(MOST):
            sock = stack.enter_context(connected(small))
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            sock.sendall(body)
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        with connected(small) as sock:
            said = b""
            while more := sock.recv(4096):
                said += more
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert re.search(rb"(?i)\r\nretry-after: \d+", head)
    assert json.loads(body)["error"]["code"] == "too_many_connections"
    small.wait(lambda: newcomer(small).status_code == 200)


def test_it_opens_as_many_files_as_it_may(start_server: StartServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        server = start_server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    now, _ = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert now == min(hard, MAX_DESCRIPTORS)
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(server))
        assert newcomer(server).status_code == 200
        assert server.chat(max_tokens=1).status_code == 200


# -- without a server


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "set_to", "fit"),
    [
        (1024, 20_000, 4096, 20_000, 4096),
        (1024, 1024, 4096, None, 768),
        (1024, 2048, 4096, 2048, 1792),
        (256, 300, 4096, 300, 150),
        (1024, resource.RLIM_INFINITY, 4096, MAX_DESCRIPTORS, 4096),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4096, None, 4096),
        (1024, 1_048_576, 100_000, MAX_DESCRIPTORS, MAX_DESCRIPTORS - 256),
        (1_048_576, 1_048_576, 100_000, None, 100_000),
    ],
)
def test_as_many_connections_as_fit_into_the_limit_on_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, set_to: int | None, fit: int
) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert raise_descriptor_limit(wanted) == fit
    assert limits == ([] if set_to is None else [(set_to, hard)])


class FakeTransport:
    def __init__(self) -> None:
        self.end: str | None = None
        self.unread = 0
        self.sent = b""

    def get_extra_info(self, _: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.end is not None

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.end = "closed"

    def abort(self) -> None:
        self.end = "aborted"


async def serve(_: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


class Crowd:
    """Connections to a server of our own, without sockets."""

    def __init__(self, most: int) -> None:
        self.connection_limit = Connections(most)
        self.protocol: Any = type("Protocol", (BoundedHttpProtocol,), {"connection_limit": self.connection_limit})
        self.config, self.state = uvicorn.Config(serve, log_config=None), ServerState()
        self.transports: list[FakeTransport] = []

    def connect(self) -> tuple[BoundedHttpProtocol, FakeTransport]:
        protocol, transport = self.protocol(self.config, self.state, {}), FakeTransport()
        protocol.connection_made(transport)
        self.transports.append(transport)
        return protocol, transport

    async def leave(self) -> None:
        """All at once; whoever is served then ends."""
        for one in tuple(self.state.connections):
            one.connection_lost(None)
        await asyncio.gather(*self.state.tasks, return_exceptions=True)
        assert not self.connection_limit.make_room(self.protocol(self.config, self.state, {}))


def test_the_longest_wait_ends_first_and_whoever_goes_on_is_left_alone() -> None:
    async def test() -> None:
        crowd = Crowd(5)
        connect, transports = crowd.connect, crowd.transports
        asking, silent, answered, unread, reading = (connect() for _ in range(5))
        asking[0].data_received(b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n")  # its body is to come
        answered[0].data_received(GET)
        for protocol, transport in (unread, reading):
            protocol.data_received(b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n")
            protocol.pause_writing()
            transport.unread = 1
        reading[0].resume_writing()
        await asyncio.sleep(0.01)  # the one answer is sent, and then waits for another request
        for _ in range(5):
            connect()
        ends = [transport.end for transport in transports]
        assert ends == [None, "closed", "closed", "aborted", None, "closed", "closed", None, None, None]
        connect()
        asking[0].data_received(b"x")
        await asyncio.sleep(0.01)
        assert asking[0].timeout_keep_alive_task is not None
        await crowd.leave()

    asyncio.run(test())


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"


@pytest.mark.parametrize(
    ("head", "later"),
    [
        (POST + b"\r\n", b"x" + GET),  # the next request's head is read, while the answer to this one is not
        (POST + b"\r\n", b"x" + GET + GET[:20]),
        (POST + b"Connection: close\r\n\r\n", b"x"),
        (POST + b"\r\n", b"xG?T"),
    ],
)
def test_who_does_not_read_makes_room_whatever_else_it_sends(head: bytes, later: bytes) -> None:
    """A second head ended the wait of a client that read no answer, and so did the end of the connection: of both there
    could be as many as connections, for ever."""

    async def test() -> None:
        crowd = Crowd(2)
        protocol, transport = crowd.connect()
        protocol.data_received(head)
        await asyncio.sleep(0.01)
        transport.unread = 1
        if b"close" not in head:
            protocol.pause_writing()
        protocol.data_received(later)
        await asyncio.sleep(0.01)
        for _ in range(2):
            crowd.connect()
        assert transport.end == "aborted"
        await crowd.leave()

    asyncio.run(test())


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nX: ",
        GET + b"GET / HTTP/1.1\r\nX: ",
        CHUNKED + b"0\r\nX: ",
        CHUNKED + b"0\r\n",
        CHUNKED + b"1;",
        CHUNKED + b"3\r\nabc\r\n0\r\na: b\r\nX: ",
    ],
)
@pytest.mark.parametrize("size", [1000, 50_000])
def test_what_the_parser_keeps_to_itself_is_bounded(begun: bytes, size: int) -> None:
    """A trailer without an end, which nobody counted, grew in memory as fast as a client could send it."""

    async def test() -> None:
        crowd = Crowd(2)
        protocol, transport = crowd.connect()
        protocol.data_received(begun)
        await asyncio.sleep(0)
        sent = 0
        while transport.end is None:
            protocol.data_received(b"a" * size)
            sent += size
            assert sent <= protocol.max_head_bytes + size
        assert b"head_too_large" in transport.sent
        await crowd.leave()

    asyncio.run(test())


@pytest.mark.parametrize("size", [100, 1460, 20_000, 100_000])
@pytest.mark.parametrize("body", [b"", b"x" * 50_000])
def test_a_head_counts_once_however_it_is_cut(size: int, body: bytes) -> None:
    """One of 20,000 bytes that came in packets counted twice, and was refused."""

    async def test() -> None:
        crowd = Crowd(2)
        protocol, transport = crowd.connect()
        lines = (b"POST / HTTP/1.1", b"Host: x", b"Cookie: " + b"c" * 30_000, b"Content-Length: %d" % len(body))
        data = b"\r\n".join([*lines, b"", body])
        for _ in range(2):
            for at in range(0, len(data), size):
                assert transport.end is None
                protocol.data_received(data[at : at + size])
            await asyncio.sleep(0.01)
        assert transport.sent.count(b"HTTP/1.1 200 ") == 2
        await crowd.leave()

    asyncio.run(test())
