"""Bodies that come slowly, in crowds, or too many bytes at once: nobody else waits for them, and each is told why."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import random
import socket
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.requests import Request

from service.errors import NoCapacity, ServiceError
from service.settings import Settings
from service.uploads import PERIOD, Uploads, client_of
from tests.service.conftest import StartServer
from tests.service.refusals import MULTIPART, URLENCODED, connected, image, png, refusal
from tests.service.server import Server

MIB = 1 << 20
KEY = {"Authorization": "Bearer key"}
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
GENERATE = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
SLOW = {
    "chat": CHAT + b"Content-Length: 1000\r\n\r\n{",
    "chunked": CHAT + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    "form": GENERATE + b"Content-Length: 1000\r\nContent-Type: " + MULTIPART.encode() + b"\r\n\r\n-",
    "not even one byte": GENERATE + b"Content-Length: 1000\r\nContent-Type: " + URLENCODED.encode() + b"\r\n\r\n",
}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    """Asks for a key, and is impatient with uploads."""
    settings = {"api_key": "key", "upload_grace": 1, "min_upload_rate": 100, "body_timeout": 5}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, settings)
        server.http.headers.update(KEY)
        yield server
        assert server.close() == 0, server.log_text()


def answer_of(sock: socket.socket) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return response, json.loads(response.read())


@contextmanager
def crowd(server: Server, kinds: list[str]) -> Iterator[list[socket.socket]]:
    """One connection for each, that has begun such an upload."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(connected(server)) for _ in kinds]
        for sock, kind in zip(sockets, kinds, strict=True):
            sock.sendall(SLOW[kind])
        server.wait(lambda: server.health()["uploads"] == len(kinds))
        yield sockets


def picture() -> dict[str, Any]:
    return {**image("data:image/png;base64," + base64.b64encode(png()).decode()), "max_tokens": 2}


# -- time


def test_beside_68_uploads_of_one_byte_a_picture_is_served(start_server: StartServer) -> None:
    """They held every slot there is, and everybody else got a 503."""
    server = start_server(max_num_seqs=4)
    with crowd(server, [list(SLOW)[number % 4] for number in range(68)]):
        for _ in range(3):
            assert server.http.post("/v1/chat/completions", json=picture()).status_code == 200
            form = {"prompt": "x", "max_tokens": "2"}
            assert server.http.post("/v1/generate", data=form, files={"media": png()}).status_code == 200
            time.sleep(PERIOD)  # of one client, with us, there are too many: not we are to go
        assert server.metric("flash_requests_rejected_total", reason="too_many_uploads") == 4
        assert server.health()["requests"] == 0


@pytest.mark.parametrize("dribble", [False, True])
@pytest.mark.parametrize("kind", list(SLOW))
def test_an_upload_below_the_least_rate_is_ended(keyed: Server, kind: str, dribble: bool) -> None:
    with crowd(keyed, [kind]) as (slow,):
        with suppress(BrokenPipeError, ConnectionResetError):
            while dribble and keyed.health()["uploads"]:
                slow.sendall(b" " if kind != "chunked" else b"1\r\n \r\n")
                time.sleep(0.2)
        response, body = answer_of(slow)
        assert (response.status, body["error"]["code"]) == (408, "upload_too_slow"), body
        assert "100 bytes/s" in body["error"]["message"]
        assert response.headers["connection"] == "close"
    assert keyed.health()["uploads"] == 0


def test_a_body_that_never_ends_is_ended(start_server: StartServer) -> None:
    server = start_server(body_timeout=0.5)
    with crowd(server, list(SLOW)) as sockets:
        for slow in sockets:
            response, body = answer_of(slow)
            assert (response.status, body["error"]["code"]) == (408, "body_timeout")
            assert response.headers["connection"] == "close"
            assert slow.recv(1) == b""
        assert server.health()["uploads"] == 0
    assert server.health()["requests"] == 0


def test_the_end_of_the_service_waits_for_an_upload(start_server: StartServer) -> None:
    """It was let in before: it is not sent away with its picture."""
    server = start_server(drain_timeout=20)
    body = json.dumps(picture()).encode()
    with connected(server) as sock:
        sock.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % len(body) + body[:100])
        server.wait(lambda: server.health()["uploads"] == 1)
        server.terminate()
        server.wait(lambda: server.http.get("/readyz").status_code == 503)
        sock.sendall(body[100:])
        response, answer = answer_of(sock)
        assert (response.status, len(answer["choices"])) == (200, 1)
    assert server.process.wait(10) == 0


def test_clients_that_leave_their_uploads_leave_nothing_behind(server: Server) -> None:
    with crowd(server, list(SLOW) * 3):
        pass
    server.wait(lambda: server.health()["uploads"] == 0)
    assert server.health()["requests"] == 0
    assert server.chat(max_tokens=1).status_code == 200


# -- memory


def test_the_bytes_of_all_bodies_have_one_bound(start_server: StartServer) -> None:
    """Eighty of the largest were five gigabytes."""
    server = start_server({"delay": 0.05}, max_body_bytes=8 * MIB, max_bodies_bytes=10 * MIB)
    with connected(server) as first, connected(server) as second, connected(server) as third:
        first.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % (8 * MIB) + b" " * (7 * MIB))
        time.sleep(0.5)  # it is there
        second.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % (8 * MIB))  # it says what it will be
        with suppress(BrokenPipeError, ConnectionResetError):
            third.sendall(CHAT + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (8 * MIB) + b" " * (8 * MIB))
        for refused in (second, third):
            response, body = answer_of(refused)
            assert (response.status, body["error"]["code"]) == (503, "bodies_full")
            assert int(response.headers["retry-after"]) >= 1
        assert server.http.post("/v1/chat/completions", json=picture()).status_code == 200, "there is room for it"
        first.sendall(b" " * MIB)
        assert answer_of(first)[1]["error"]["code"] == "too_much_text"
    large = picture() | {"user": "data:" + "x" * (7 * MIB), "stream": True, "max_tokens": 2000, "ignore_eos": True}
    with ExitStack() as running:
        for _ in range(3):  # a body counts until its media are decoded, not while its answer runs
            stream = running.enter_context(server.http.stream("POST", "/v1/chat/completions", json=large))
            assert stream.status_code == 200, stream.read()
            next(stream.iter_lines())
            files = {"media": ("x.png", b"x" * (7 * MIB))}
            refusal(server.http.post("/v1/generate", data={"prompt": "x"}, files=files), 415)


def test_the_memory_of_large_bodies_is_given_back(server: Server) -> None:
    """A third of it stayed, and what had been the most once stayed for ever."""
    process = psutil.Process(server.process.pid)
    file = random.Random(0).randbytes(12 * MIB)
    uri = "data:image/png;base64," + base64.b64encode(file).decode()
    before = process.memory_info().rss
    for _ in range(2):
        files = [("media", ("x.png", file))] * 4
        refusal(server.http.post("/v1/generate", data={"prompt": "x"}, files=files), 415)
        parts = [{"type": "image_url", "image_url": {"url": uri}}] * 3
        chat = {"messages": [{"role": "user", "content": parts}]}
        refusal(server.http.post("/v1/chat/completions", json=chat), 415)
    for _ in range(10):  # what refers to itself goes with the next collection
        server.chat(max_tokens=1)
    assert process.memory_info().rss - before < 16 * MIB


@pytest.mark.parametrize("head", [b"Content-Length: 60000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/generate", "/v1/models", "/nothing", "/livez"])
def test_a_large_body_that_nobody_reads_ends_the_connection(keyed: Server, path: str, head: bytes) -> None:
    """The 401 came at once, and the connection stayed open and read on."""
    with connected(keyed) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\n" % path.encode() + head)
        response, body = answer_of(sock)
        assert response.status in (401, 404, 405), body
        assert response.headers["connection"] == "close"
        assert sock.recv(1) == b""


def test_a_client_that_is_refused_while_it_sends_has_the_answer_and_the_connection_where_little_is_left(
    keyed: Server,
) -> None:
    sent = keyed.http.post("/v1/generate", content=b"x" * (16 * MIB), headers={"Authorization": "Bearer wrong"})
    assert refusal(sent, 401)["code"] == "invalid_api_key"
    with connected(keyed) as sock:
        for _ in range(2):
            sock.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
            response, _ = answer_of(sock)
            assert (response.status, response.headers["connection"]) == (401, None)


# -- who goes, without a server


class Client:
    """Sends one body to `uploads`, as many bytes as it is told to."""

    def __init__(
        self, uploads: Uploads, address: str = "192.0.2.1", *, key: str | None = None, limit: int = 10**9
    ) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "client": (address, 1), "headers": [], "state": {}}
        self.body = bytearray()
        self._upload = uploads.open(Request(scope, self._messages.get), key)
        self._reading = asyncio.ensure_future(self._upload.read(limit, self.body.extend))

    async def send(self, num_bytes: int, *, last: bool = False) -> None:
        self._messages.put_nowait({"type": "http.request", "body": b"x" * num_bytes, "more_body": not last})
        await settled()

    def refusal(self) -> str | None:
        if not self._reading.done():
            return None
        error = self._reading.exception()
        assert isinstance(error, ServiceError)
        return error.code

    def leave(self) -> None:
        self._reading.cancel()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def look(uploads: Uploads, times: int = 1) -> None:
    for _ in range(times):
        uploads.check()
        await settled()


def in_a_loop(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_those_furthest_behind_go_first_and_then_the_youngest() -> None:
    async def test() -> None:
        uploads = Uploads(Settings(max_uploads=4, max_uploads_per_client=100, min_upload_rate=100, upload_grace=9))
        first, slow, stalled, second = (Client(uploads) for _ in range(4))
        await settled()
        for _ in range(5):
            for client, num_bytes in ((first, 100), (slow, 30), (stalled, 0), (second, 5000)):
                await client.send(num_bytes)
            await look(uploads)
        third, fourth = Client(uploads), Client(uploads)
        await settled()
        await look(uploads)
        assert len(uploads) == 6, "in their first second nobody goes for them"
        for client in (first, second, third, fourth):
            await client.send(200)
        await look(uploads)
        assert [client.refusal() for client in (stalled, slow)] == ["uploads_full"] * 2
        fifth = Client(uploads)
        await settled()
        for _ in range(2):
            for client in (first, second, third, fourth, fifth):
                await client.send(200)
            await look(uploads)
        assert fifth.refusal() == "uploads_full"
        assert len(uploads) == 4
        for client in (first, second, third, fourth):
            await client.send(1, last=True)
        assert len(uploads) == 0

    in_a_loop(test())


def test_an_upload_may_pause_but_what_it_sent_before_buys_no_long_silence() -> None:
    async def test() -> None:
        uploads = Uploads(Settings(min_upload_rate=100, upload_grace=3))
        client = Client(uploads)
        await settled()
        await look(uploads)
        for num_bytes in (100, 0, 0, 0, 300, 0, 10**6, 0, 0, 0):
            await client.send(num_bytes)
            await look(uploads)
        assert client.refusal() is None
        await look(uploads)
        assert client.refusal() == "upload_too_slow"

    in_a_loop(test())


@pytest.mark.parametrize("by", ["address", "key"])
def test_one_clients_bound_does_not_touch_another(by: str) -> None:
    async def test() -> None:
        uploads = Uploads(Settings(max_uploads=100, max_uploads_per_client=2))

        def begin(client: int) -> Client:
            if by == "key":
                return Client(uploads, key=f"key {client}")
            return Client(uploads, address=f"192.0.2.{client}")

        clients = [begin(number) for number in (1, 1, 2, 1, 2, 3)]
        await settled()
        await look(uploads, 2)
        gone = [client.refusal() for client in clients]
        assert gone == [None, None, None, "too_many_uploads", None, None]
        for client in clients:
            client.leave()

    in_a_loop(test())


def test_the_bytes_of_bodies_that_are_gone_are_off_the_account() -> None:
    """However they end: whole and used, cut, left, over the bound."""

    async def test() -> None:
        uploads = Uploads(Settings(max_body_bytes=1024, max_bodies_bytes=5000, upload_grace=3))

        async def take(client: Client, *, last: bool) -> None:
            with client._upload, suppress(ServiceError):
                await client.send(2000, last=last)
                if last:
                    client._upload.close()
                    assert uploads.num_bytes == 0
                    return
                await look(uploads, 5)
                assert client.refusal() == "upload_too_slow"

        over = Client(uploads, limit=100)
        with over._upload:
            await over.send(101)
            assert over.refusal() == "body_too_large"
        assert uploads.num_bytes == 0
        for last in (True, False, True):
            await take(Client(uploads), last=last)
            assert uploads.num_bytes == 0
        first, second = Client(uploads), Client(uploads)
        with first._upload, second._upload:
            await first.send(3000)
            await second.send(3000)
            assert (first.refusal(), second.refusal()) == (None, "bodies_full")
            first.leave()
        await settled()
        assert (uploads.num_bytes, len(uploads)) == (0, 0)
        with pytest.raises(NoCapacity):
            uploads.check_room(5001)
        uploads.check_room(5000)

    in_a_loop(test())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        (None, None, True),
        ("a socket", "192.0.2.1", False),
    ],
)
def test_who_is_one_client(one: str | None, other: str | None, same: bool) -> None:
    requests = [
        Request({"type": "http", "client": address and (address, 1), "headers": []}) for address in (one, other)
    ]
    first, second = (client_of(request, None) for request in requests)
    assert (first == second) == same
    assert {client_of(request, "key") for request in requests} == {"key"}


def test_behind_a_proxy_that_is_named_each_client_has_its_own_bound(start_server: StartServer) -> None:
    server = start_server(max_uploads_per_client=1, trusted_proxies="127.0.0.0/8")
    with ExitStack() as stack:
        sockets = [stack.enter_context(connected(server)) for _ in range(4)]
        for sock, address in zip(sockets, ("192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.1"), strict=True):
            sock.sendall(SLOW["chat"].replace(b"Host: x", b"Host: x\r\nX-Forwarded-For: " + address.encode()))
        response, body = answer_of(sockets[3])
        assert (response.status, body["error"]["code"]) == (429, "too_many_uploads")
        assert server.health()["uploads"] == 3
