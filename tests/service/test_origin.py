"""Web pages of elsewhere, names that strangers own, and bodies of kinds that are not read here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.origin import checks_hosts
from service.settings import Settings
from tests.service.conftest import StartServer
from tests.service.refusals import MULTIPART, URLENCODED, refusal
from tests.service.server import Server, chat_body

TEXT = json.dumps(chat_body(max_tokens=1)).encode()
EVIL = "https://evil.example"


@pytest.fixture(scope="module")
def allowing() -> Iterator[Server]:
    """Lets one web page in, and answers to one name more."""
    settings = {"allowed_origins": "https://app.example.com", "allowed_hosts": "vlm.example.com,*.example.net"}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, settings)
        yield server
        assert server.close() == 0, server.log_text()


def chat(server: Server, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.post("/v1/chat/completions", content=TEXT, headers={"content-type": "application/json"} | names)


def form(server: Server, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.post("/v1/generate", data={"prompt": "x", "max_tokens": "1"}, headers=names)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL, "Sec_Fetch_Site": "cross-site"},
        {"Origin": EVIL},  # to an address that is not loopback, without TLS, browsers say no more
        {"Origin": "null", "Sec_Fetch_Site": "cross-site"},  # a file, or a frame in a sandbox
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "https://other.example.com", "Host": "vlm.localhost", "Sec_Fetch_Site": "same-site"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Origin": "http://evil.example#127.0.0.1"},
        {"Origin": "http://[malformed"},
        {"Origin": EVIL, "content_type": "text/plain"},
        {"Origin": EVIL, "content_type": URLENCODED},
        {"Origin": EVIL, "Authorization": "Bearer any"},
    ],
)
def test_pages_of_elsewhere_cannot_make_it_work(server: Server, headers: dict[str, str]) -> None:
    for send in (chat, form):
        response = send(server, **headers)
        error = refusal(response, 403)
        assert (error["code"], error["type"]) == ("origin_not_allowed", "permission_error")
        assert "--allowed-origins" in error["message"]
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:8000", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://vlm.example.com", "Sec_Fetch_Site": "same-origin"},  # a proxy changed the Host
        {"Origin": "https://vlm.localhost", "Host": "vlm.localhost:8443"},
        {"Origin": "http://vlm", "Host": "VLM:80"},
        {"Origin": "http://[2001:db8::1]:80", "Host": "[2001:db8::1]:8000"},
        {"Origin": "http://localhost:5173", "Sec_Fetch_Site": "cross-site"},  # a page of one's own machine
        {"Sec_Fetch_Site": "none"},
    ],
)
def test_own_pages_and_what_is_no_browser_can(server: Server, headers: dict[str, str]) -> None:
    assert (chat(server, **headers).status_code, form(server, **headers).status_code) == (200, 200)


def test_with_a_key_the_page_does_not_matter(start_server: StartServer) -> None:
    """A browser sends none to another site without asking it first, and is told nothing."""
    server = start_server(api_key="key")
    headers = {"Origin": EVIL, "Sec_Fetch_Site": "cross-site"}
    assert chat(server, **headers, Authorization="Bearer key").status_code == 200
    assert refusal(chat(server, **headers), 401)["code"] == "missing_api_key"
    assert chat(server, Host="vlm.example.com", Authorization="Bearer key").status_code == 200
    asking = {
        "Origin": EVIL,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert refusal(server.http.options("/v1/chat/completions", headers=asking), 405)


def test_a_page_that_is_allowed_may_ask_send_and_read(allowing: Server) -> None:
    origin = {"Origin": "https://app.example.com"}
    asking = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    said = allowing.http.options("/v1/chat/completions", headers=asking)
    assert (said.status_code, said.headers["access-control-allow-origin"]) == (200, origin["Origin"])
    for response in (
        chat(allowing, **origin, Sec_Fetch_Site="cross-site"),
        allowing.http.post("/v1/chat/completions", content=b"{", headers=origin),
        allowing.http.post("/nothing", headers=origin),
    ):
        assert response.status_code in (200, 400, 404)
        assert response.headers["access-control-allow-origin"] == origin["Origin"]
    for other in (EVIL, "http://app.example.com", "https://app.example.com.evil.example"):
        response = chat(allowing, Origin=other)
        assert refusal(response, 403)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
        assert allowing.http.options("/v1/generate", headers=asking | {"Origin": other}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/health", "/metrics", "/", "/nothing"])
def test_a_name_that_a_stranger_may_own_is_not_answered(server: Server, allowing: Server, path: str) -> None:
    """A page may have its own name mean 127.0.0.1, and is of the same origin then."""
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::1",
        "a.b.",
    ):
        for one in (server, allowing):
            error = refusal(one.http.get(path, headers={"Host": host}), 403)
            assert error["code"] == "host_not_allowed"
            assert "--allowed-hosts" in error["message"]
    for host in (
        "localhost",
        "LOCALHOST:1",
        "a.localhost",
        "127.0.0.1:1",
        "[::1]:1",
        "10.0.0.1",
        "vlm",
        "",
        "host.docker.internal",
    ):
        assert server.http.get(path, headers={"Host": host}).status_code != 403, host
    for host in ("vlm.example.com:443", "VLM.example.com.", "a.example.net"):
        assert server.http.get(path, headers={"Host": host}).status_code == 403
        assert allowing.http.get(path, headers={"Host": host}).status_code != 403, host


@pytest.mark.parametrize(
    ("settings", "checks"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "10.0.0.1"}, False),
        ({"host": "::"}, False),
        ({"api_key": "key"}, False),
        ({"host": "0.0.0.0", "api_key": "key", "allowed_hosts": "vlm.example.com"}, True),
    ],
)
def test_names_matter_where_nothing_else_keeps_strangers_out(settings: dict[str, Any], checks: bool) -> None:
    assert checks_hosts(Settings(**settings)) == checks


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        (URLENCODED, 200),  # what `curl -d` says
        (None, 200),
        ("text/plain;charset=UTF-8", 415),
        (MULTIPART, 415),
        ("application/octet-stream", 415),
        ("image/png", 415),
        ("nonsense", 415),
    ],
)
def test_json_is_taken_as_what_says_that_it_is(server: Server, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.http.post("/v1/chat/completions", content=TEXT, headers=headers)
    assert response.status_code == status
    if status == 415:
        error = refusal(response, 415)
        assert (error["code"], error["param"]) == ("invalid_content_type", "content-type")
        assert "application/json" in error["message"]
