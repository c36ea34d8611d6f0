"""Media URLs: what is decoded, what is fetched, and above all what is not."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from service.errors import BadRequest, ServiceError, TooLarge
from service.media import MediaLimits, fetch
from service.media.fetch import is_public, resolve

pytestmark = pytest.mark.anyio

LIMITS = MediaLimits(max_bytes=100_000, fetch_seconds=2.0)
BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Answers by path, and notes what it was asked."""

    seen: list[tuple[str, dict[str, str]]] = []

    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        Handler.seen.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        port = self.server.server_port
        redirects = {
            "/once": "/ok",
            "/loop": "/loop",
            "/metadata": "http://169.254.169.254/latest/",
            "/elsewhere": f"http://localhost:{port}/ok",
            "/file": "file:///etc/passwd",
            "/data": "data:image/png;base64,AAAA",
        }
        try:
            if self.path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[self.path])
                self.end_headers()
            elif self.path == "/ok":
                self.answer(BODY)
            elif self.path == "/claims-much":
                self.answer(b"", length=10**12)
            elif self.path == "/sends-much":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(65536))
            elif self.path == "/drips":
                self.answer(b"", length=1000)
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            elif self.path == "/packed":
                self.answer(BODY, encoding="gzip")
            elif self.path == "/half":
                self.answer(BODY[:100], length=1000)
            else:
                self.send_error(404, "internal detail")
        except OSError:
            pass  # the client hung up, as it should

    def answer(self, body: bytes, *, length: int | None = None, encoding: str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Handler.seen.clear()


async def refused(url: str, **options) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        await resolve(url, **{"limits": LIMITS, **options})
    assert error.value.status in (400, 413)
    for word in ("127.0.0.1", "169.254", "localhost", "errno", "refused by", "internal detail"):
        assert word not in error.value.message.lower()
    return error.value


def data_uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 99_999, 100_000])
async def test_data_uris(size):
    data = (BODY * 10)[:size]
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:video/mp4;charset=x;BASE64,"):
        assert await resolve(data_uri(data, head), limits=LIMITS) == data


@pytest.mark.parametrize("size", [fetch.SLICE // 4 * 3 + delta for delta in (-2, -1, 0, 1, 2)] + [5_000_000])
async def test_large_data_uris_are_decoded_in_slices(size):
    data = (BODY * 500)[:size]
    limits = MediaLimits(max_bytes=10_000_000)
    assert await resolve(data_uri(data), limits=limits) == data
    spoilt = data_uri(data)
    spoilt = spoilt[: fetch.SLICE] + "=" + spoilt[fetch.SLICE + 1 :]
    assert (await refused(spoilt, limits=limits)).code == "invalid_data_uri"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,###",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,ääää",
        "data:" + "x" * 2000 + ";base64,AAAA",
        "data:",
    ],
)
async def test_malformed_data_uris(url):
    assert (await refused(url)).code == "invalid_data_uri"


async def test_data_uris_are_measured_before_they_are_decoded(monkeypatch):
    assert isinstance(await refused(data_uri(bytes(100_001))), TooLarge)
    monkeypatch.setattr(fetch, "_decode_base64", lambda *args: pytest.fail("decoded"))
    assert isinstance(await refused(data_uri(bytes(100_010))), TooLarge)


@pytest.mark.parametrize(
    "url", ["", "ftp://example.com/a", "file:///etc/passwd", "/etc/passwd", "gopher://x", "javascript:1"]
)
async def test_other_schemes_are_refused(url):
    assert (await refused(url, allowed_domains=("example.com",), allow_private=True)).code == "unsupported_url"


async def test_by_default_no_domain_is_fetched_from_and_the_error_says_how(server):
    error = await refused(f"http://{server}/ok", allow_private=True)
    assert "allowed-media-domains" in error.message
    assert Handler.seen == []


async def test_an_allowed_domain_is_fetched(server):
    url = f"http://{server}/ok"
    assert await resolve(url, limits=LIMITS, allowed_domains=(server,), allow_private=True) == BODY
    ((_, headers),) = Handler.seen
    assert headers["host"] == server
    assert headers["accept-encoding"] == "identity"


async def test_private_addresses_are_refused_even_when_allowed_by_name(server):
    port = server.partition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        error = await refused(f"http://{host}:{port}/ok", allowed_domains=(f"{host}:{port}",))
        assert error.code == "fetch_failed"
    assert Handler.seen == []


@pytest.mark.parametrize(
    ("url", "allowed", "expected"),
    [
        ("http://example.com/a", ("example.com",), True),
        ("https://EXAMPLE.com./a", ("example.com",), True),
        ("https://example.com:443/a", ("Example.com",), True),
        ("http://example.com:8080/a", ("example.com",), False),
        ("http://example.com:8080/a", ("example.com:8080",), True),
        ("http://example.com/a", ("example.com:8080",), False),
        ("http://evil-example.com/", ("example.com",), False),
        ("http://example.com.evil.org/", ("example.com",), False),
        ("http://a.example.com/", ("example.com",), False),
        ("http://a.example.com/", ("*.example.com",), True),
        ("http://example.com/", ("*.example.com",), False),
        ("http://evilexample.com/", ("*.example.com",), False),
        ("http://example.com@evil.org/", ("example.com",), False),
        ("http://user:pw@example.com/", ("example.com",), False),
        ("http://evil.org#@example.com/", ("example.com",), False),
        ("http://evil.org\\@example.com/", ("example.com",), False),
        ("http://evil.org%2f@example.com/", ("example.com",), False),
        ("http:///a", ("",), False),
        ("http://exa mple.com/", ("example.com",), False),
        ("http://2130706433/", ("example.com",), False),
        ("http://example.com/" + "a" * 10_000, ("example.com",), False),
    ],
)
async def test_which_urls_a_domain_allows(monkeypatch, url, allowed, expected):
    asked = []

    async def get(target, address, limits):
        asked.append(str(target.host))
        return b"x"

    async def address(target, allow_private):
        return "93.184.216.34"

    monkeypatch.setattr(fetch, "_get", get)
    monkeypatch.setattr(fetch, "_public_address", address)
    if expected:
        assert await resolve(url, limits=LIMITS, allowed_domains=allowed) == b"x"
    else:
        assert isinstance(await refused(url, allowed_domains=allowed), BadRequest)
        assert asked == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%lo", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ],
)
async def test_which_addresses_are_public(address, expected):
    assert is_public(address) is expected


async def test_one_private_address_among_public_ones_spoils_them(monkeypatch):
    async def getaddrinfo(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "_get", lambda *args: pytest.fail("connected"))
    assert (await refused("http://example.com/", allowed_domains=("example.com",))).code == "fetch_failed"


async def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """DNS rebinding: a second look-up could give another address. So there is none."""
    lookups, requests = [], []

    async def getaddrinfo(host, port, **options):
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b"x"))

    async def client(limits):
        return httpx.AsyncClient(transport=httpx.MockTransport(handle))

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "_client", client)
    assert await resolve("https://example.com/a?b=c#d", limits=LIMITS, allowed_domains=("example.com",)) == b"x"
    assert lookups == ["example.com"]
    (request,) = requests
    assert str(request.url) == "https://93.184.216.34/a?b=c"
    assert request.headers["host"] == "example.com"
    assert request.extensions["sni_hostname"] == "example.com"


async def test_every_redirect_is_checked_again(server):
    options: dict[str, Any] = {"allowed_domains": (server,), "allow_private": True}
    assert await resolve(f"http://{server}/once", limits=LIMITS, **options) == BODY
    assert (await refused(f"http://{server}/loop", **options)).code == "fetch_failed"
    assert [path for path, _ in Handler.seen].count("/loop") == 4
    for path, code in (
        ("/metadata", "domain_not_allowed"),
        ("/elsewhere", "domain_not_allowed"),
        ("/file", "invalid_url"),
        ("/data", "fetch_failed"),
    ):
        assert (await refused(f"http://{server}{path}", **options)).code == code


async def test_bytes_and_time_are_capped_as_they_are_spent(server):
    options: dict[str, Any] = {"allowed_domains": (server,), "allow_private": True}
    for path in ("/claims-much", "/sends-much"):
        assert isinstance(await refused(f"http://{server}{path}", **options), TooLarge)
    start = time.monotonic()
    limits = MediaLimits(fetch_seconds=0.5)
    assert (await refused(f"http://{server}/drips", **{**options, "limits": limits})).code == "fetch_timeout"
    assert time.monotonic() - start < 2


async def test_what_cannot_be_fetched_says_only_that(server):
    options: dict[str, Any] = {
        "allowed_domains": (server, "127.0.0.1:1", "no.such.name.invalid"),
        "allow_private": True,
    }
    for url in (f"http://{server}/missing", f"http://{server}/packed", f"http://{server}/half", "http://127.0.0.1:1/"):
        assert (await refused(url, **options)).code == "fetch_failed"
    limits = MediaLimits(fetch_seconds=1.0)
    error = await refused("http://no.such.name.invalid/", **{**options, "limits": limits})
    assert error.code in ("fetch_failed", "fetch_timeout")


async def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    """A proxy would resolve the name again, and connect to whatever it finds."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    options: dict[str, Any] = {"allowed_domains": (server,), "allow_private": True}
    assert await resolve(f"http://{server}/ok", limits=LIMITS, **options) == BODY
