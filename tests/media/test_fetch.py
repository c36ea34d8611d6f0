"""Media URLs: what is decoded, what is fetched, and above all what is not."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from service import log
from service.errors import BadRequest, NoCapacity, ServiceError, TooLarge
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
            elif self.path.partition("?")[0] == "/ok":
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
        self.send_header("Set-Cookie", "session=secret-cookie")
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


@pytest.mark.parametrize("size", [0, 1, 99_999, 100_000])
async def test_data_uris_are_read_up_to_the_limit(size):
    data = (BODY * 10)[:size]
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert await resolve(uri, limits=LIMITS) == data
    long = uri.rstrip("=") + "AAAA" * (100_001 - size)
    assert isinstance(await refused(long), TooLarge)


async def test_a_data_uri_without_base64_is_a_medium_or_malformed():
    bmp = b"BM" + bytes(12) + (40).to_bytes(4, "little") + bytes(range(256))
    plain = "".join(f"%{byte:02x}" for byte in bmp)
    assert await resolve("data:image/bmp," + plain, limits=LIMITS) == bmp
    for uri in ("data:image/png,abc", "data:," + base64.b64encode(bmp).decode(), "data:,"):
        error = await refused(uri)
        assert error.code == "invalid_data_uri"
        assert "no ;base64" in error.message


@pytest.mark.parametrize("url", ["", "ftp://example.com/a", "/etc/passwd", "gopher://x", "javascript:1"])
async def test_other_schemes_are_refused(url):
    assert (await refused(url, allowed_domains=("example.com",), allow_private=True)).code == "unsupported_url"


async def test_by_default_no_domain_is_fetched_from_and_the_error_says_how(server):
    error = await refused(f"http://{server}/ok", allow_private=True)
    assert "allowed-media-domains" in error.message
    assert Handler.seen == []


async def test_what_is_fetched_is_counted_while_it_comes(server):
    """Eight files of each of eighty requests were twenty gigabytes."""
    url = f"http://{server}/ok"
    pieces: list[int] = []
    options: dict[str, Any] = {"limits": LIMITS, "allowed_domains": (server,), "allow_private": True}
    assert await resolve(url, count=pieces.append, **options) == BODY
    assert sum(pieces) == len(BODY)

    def full(_: int) -> None:
        raise NoCapacity("the memory is full")

    with pytest.raises(NoCapacity):
        await resolve(url, count=full, **options)


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

    async def get(target, address, limits, count):
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


# By what they are: addresses that no media may be fetched from. First, last and inner ones of each network.
NOT_PUBLIC = {
    "this network": ("0.0.0.0", "0.0.0.1", "0.255.255.255"),
    "private": ("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"),
    "shared by a carrier's customers": ("100.64.0.0", "100.100.100.200", "100.127.255.255"),
    "loopback": ("127.0.0.1", "127.255.255.254", "::1"),
    "link-local": ("169.254.0.23", "169.254.169.254", "169.254.170.2", "fe80::1", "fe80::1%lo", "febf::1"),
    "protocol assignments": (
        "192.0.0.0",
        "192.0.0.8",
        "192.0.0.9",
        "192.0.0.192",
        "192.0.0.255",
        "2001::1",
        "2001:1ff::",
    ),
    "documentation": ("192.0.2.1", "198.51.100.7", "203.0.113.255", "2001:db8::1", "3fff::1", "3fff:fff::1"),
    "6to4 relays": ("192.88.99.0", "192.88.99.1", "192.88.99.255"),
    "benchmarking": ("198.18.0.1", "198.19.255.255", "2001:2::1"),
    "multicast": ("224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"),
    "reserved": ("240.0.0.1", "255.255.255.254", "255.255.255.255", "4000::1", "a000::1", "1fff::1"),
    "clouds' own": (
        "168.63.129.16",
        "169.254.169.254",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::a9fe:a9fe",
    ),
    "site-local": ("fec0::", "fec0::1", "feff:ffff::1"),
    "unique local": ("fc00::1", "fd00::1", "fdff::1"),
    "unspecified, discard, segment routing": ("::", "100::1", "100:0:0:1::1", "5f00::1"),
    "IPv4-mapped": (
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:192.0.0.192",
        "::ffff:168.63.129.16",
        "::ffff:a9fe:a9fe",
    ),
    "IPv4-compatible and -translated": ("::127.0.0.1", "::93.184.216.34", "::ffff:0:10.0.0.1"),
    "NAT64": ("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::5db8:d822", "64:ff9b:1::1"),
    "6to4": ("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:5db8:d822::1"),
    "Teredo": ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:a9fe:a9fe::1", "2001:0:ffff::1"),
    "ORCHID": ("2001:10::1", "2001:1f:ffff::1", "2001:20::1", "2001:2f::1"),
    "with a zone": ("2606:4700::1111%eth0", "::ffff:93.184.216.34%1"),
}
PUBLIC = (
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "93.184.216.34", "100.63.255.255", "100.128.0.0", "126.0.0.1"),
    *("128.0.0.1", "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
    *("192.0.1.0", "192.0.3.0", "192.88.98.255", "192.88.100.0", "192.167.255.255", "192.169.0.0", "198.17.255.255"),
    *("198.20.0.0", "198.51.99.255", "203.0.112.255", "203.0.114.0", "223.255.255.254", "1.0.0.0"),
    *("2606:2800:220:1:248:1893:25c8:1946", "2001:4860:4860::8888", "2001:200::1", "2001:db9::1", "2003::1"),
    *("2a00:1450:4001:80b::200e", "2400:cb00::1", "3ffe::1", "3fff:1000::1", "::ffff:93.184.216.34", "::ffff:8.8.8.8"),
)


@pytest.mark.parametrize("kind", NOT_PUBLIC)
async def test_addresses_that_are_not_of_the_open_internet(kind):
    """Whatever this Python's `ipaddress` thinks of them: it called four of these public."""
    assert [address for address in NOT_PUBLIC[kind] if is_public(address)] == []


async def test_ordinary_addresses_are_public():
    assert [address for address in PUBLIC if not is_public(address)] == []


async def test_where_a_name_leads_decides_not_the_name(monkeypatch):
    monkeypatch.setattr(fetch, "_get", lambda *args: pytest.fail("connected"))
    for address in ("192.0.0.192", "168.63.129.16", "fec0::1", "3fff::1"):

        async def getaddrinfo(host, port, address=address, **options):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        error = await refused("http://cdn.example.com/", allowed_domains=("*.example.com",))
        assert error.code == "fetch_failed"


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


FETCH_LOUDLY = """
import asyncio, sys
from service import log
from service.media import MediaLimits, fetch
log.configure(sys.argv[1])
host = sys.argv[2].partition("//")[2].partition("/")[0]
asyncio.run(fetch.resolve(sys.argv[2], limits=MediaLimits(), allowed_domains=(host,), allow_private=True))
log.logging.getLogger("flashserve").warning("fetched")
"""


@pytest.mark.parametrize("level", ["debug", "info", "warning"])
async def test_no_level_of_logging_tells_what_a_media_host_answers_or_is_asked(server, level):
    """httpcore's debug lines have every header, cookies too, and httpx's have whole URLs."""
    command = [sys.executable, "-c", FETCH_LOUDLY, level, f"http://{server}/ok?signature=of-a-client"]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert "fetched" in run.stderr
    for word in ("secret-cookie", "of-a-client", "Set-Cookie", "httpcore", "httpx"):
        assert word not in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("library", ["httpx", "httpcore", "h11", "openai", "PIL", "multipart", "asyncio"])
async def test_libraries_may_only_warn(library, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for own in ("flashserve", "uvicorn", "uvicorn.access"):
        monkeypatch.setattr(logging.getLogger(own), "level", logging.NOTSET)
        monkeypatch.setattr(logging.getLogger(own), "disabled", False)
    for level in ("debug", "info"):
        log.configure(level)
        assert not logging.getLogger(f"{library}.inner").isEnabledFor(logging.INFO)
        assert logging.getLogger(f"{library}.inner").isEnabledFor(logging.WARNING)
        assert logging.getLogger("flashserve.pool").getEffectiveLevel() == logging.getLevelNamesMapping()[level.upper()]
        root.handlers.clear()
