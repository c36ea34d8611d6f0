"""Requests that are no proper HTTP: routes, heads, offers of other protocols."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import suppress
from typing import Any

import pytest

from tests.service.conftest import StartServer
from tests.service.refusals import connected, refusal
from tests.service.server import Server, chat_body


def test_unknown_routes_and_methods_have_the_envelope_too(server: Server) -> None:
    assert refusal(server.http.get("/v1/nothing"), 404)["code"] == "not_found"
    for path, method, allowed in (("/v1/chat/completions", "GET", {"POST"}), ("/v1/models", "POST", {"GET", "HEAD"})):
        response = server.http.request(method, path)
        assert refusal(response, 405)["code"] == "method_not_allowed"
        assert set(response.headers["allow"].split(", ")) == allowed
    for path in ("/v1/chat/completions/", "/v1/generate//", "/v1/models/", "/livez/", "/static/app.js/", "/nothing/"):
        method = "POST" if path[:5] in ("/v1/c", "/v1/g") else "GET"
        response = server.http.request(method, path, headers={"Host": "elsewhere"})
        error = refusal(response, 404)
        assert "location" not in response.headers, "a body, and a key with it, went to whatever host was named"
        assert (f"use {path.rstrip('/')} without" in error["message"]) == (path != "/nothing/")
    assert refusal(server.http.get("/static/../settings.py"), 404)["code"] == "not_found"
    assert refusal(server.http.get("/static/%2e%2e%2fsettings.py"), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 400_000,
        b"GET /" + b"a" * 400_000,
        b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    ],
    ids=["one header", "url", "many headers"],
)
def test_a_giant_head_is_cut_off(server: Server, head: bytes) -> None:
    with connected(server) as sock:
        try:
            sock.sendall(head)
            said = sock.recv(4096)
            assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"
        except (BrokenPipeError, ConnectionResetError):
            pass  # it did not even wait for the end
    assert server.http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET /v1/models\r\n\r\n",
        b"GET /livez HTTP/0.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/0.9\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
    ids=[
        "large head",
        "nonsense",
        "0.9",
        "0.9 named",
        "0.9 with a body",
        "2.0",
        "2.0 at once",
        "TLS",
        "CONNECT",
        "two lengths",
        "no chunk",
    ],
)
def test_what_is_no_http_has_the_envelope_too(server: Server, sent: bytes) -> None:
    with connected(server) as sock:
        sock.sendall(sent)
        response = http.client.HTTPResponse(sock)
        response.begin()
        error = json.loads(response.read())["error"]
        assert (response.status, response.headers["content-type"]) == (400, "application/json")
        assert error["code"] == ("head_too_large" if len(sent) > 10_000 else "invalid_http")
        assert sock.recv(1) == b""


def test_nothing_is_said_into_an_answer_that_is_under_way(server: Server) -> None:
    body = json.dumps(chat_body(stream=True, max_tokens=2000, ignore_eos=True)).encode()
    with connected(server) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        said = sock.recv(100)
        sock.sendall(b"nonsense\r\n\r\n")
        while more := sock.recv(1 << 16):
            said += more
    assert b"invalid_http" not in said
    assert said.count(b"HTTP/1.1") == 1


def test_a_head_that_never_ends_does_not_keep_its_connection(start_server: StartServer) -> None:
    """Thousands of them took every file descriptor that the process may have."""
    server = start_server({"delay": 0.02}, head_timeout=1)
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    for begun in (b"", b"GET /livez HTTP/1.1\r\nX: ", request, request + b"\r\n"):
        with connected(server) as sock:
            sock.sendall(begun)
            since = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):
                while time.monotonic() < since + 10:
                    if begun and begun != request:
                        sock.sendall(b"\r\n" if begun.startswith(request) else b"a")
                    sock.settimeout(0.1)
                    with suppress(TimeoutError):
                        if not sock.recv(4096):
                            break
            assert 0.5 < time.monotonic() - since < 6, begun
    # A request that takes longer than its head may is nobody's concern.
    assert server.chat(max_tokens=100, speculation="off", ignore_eos=True).elapsed.total_seconds() > 1.5


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pause", [False, True])
def test_an_offer_of_another_protocol_is_passed_over(server: Server, chunked: bool, pause: bool) -> None:
    """Java's HTTP client makes one to every server. The body was lost, or read as the next request."""
    body = json.dumps(chat_body("GET /version HTTP/1.1\r\n\r\n", max_tokens=3)).encode()
    length = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with connected(server) as sock:
        for _ in range(2):  # the connection stays
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + OFFER + length + b"\r\n")
            if pause:
                time.sleep(0.1)
            sock.sendall(sent)
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert response.status == 200, response.read()
            assert json.loads(response.read())["usage"]["completion_tokens"] == 3
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_many_offers_at_once_are_each_passed_over(server: Server) -> None:
    """And though it is more than one head may be."""
    count = 2000
    with connected(server) as sock:
        sock.sendall((b"GET /version HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n") * count)
        sock.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = b""
        while more := sock.recv(1 << 16):
            said += more
    assert said.count(b"HTTP/1.1 200 OK\r\n") == count
    assert said.count(b"HTTP/1.1 404 Not Found\r\n") == 1


@pytest.mark.parametrize("connection", ["", "Connection: keep-alive\r\n", "Connection: close\r\n"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"stream": True}),
        ("/v1/chat/completions", {"stream": True, "n": 3, "max_tokens": 50}),
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"temperature": -1}),
        ("/v1/nowhere", {}),
    ],
    ids=str,
)
def test_http_1_0_knows_no_chunks(server: Server, path: str, fields: dict[str, Any], connection: str) -> None:
    """What nginx speaks to its servers by default, and `ab`: a stream ends with the connection."""
    body = json.dumps(chat_body(**{"max_tokens": 5, **fields})).encode()
    answers = {}
    for version in ("1.0", "1.1"):
        close = connection if version == "1.0" else "Connection: close\r\n"
        start = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{close}"
        with connected(server) as sock:
            sock.sendall(f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            received = b"".join(iter(lambda: sock.recv(65536), b""))
        answers[version] = received
    head, _, content = answers["1.0"].partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if "stream" in fields:
        assert b"transfer-encoding: chunked" in answers["1.1"].lower()
        events = [line for line in content.split(b"\n\n") if line]
        assert all(event.startswith(b"data: ") for event in events)
        assert events[-1] == b"data: [DONE]"
        assert len(events) > 5 * fields.get("n", 1) // 4
    else:
        assert f"content-length: {len(content)}".encode() in head.lower()
        assert json.loads(content)
