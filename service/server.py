"""The HTTP server's process: uvicorn with a bound on request heads, and an orderly end.

On SIGTERM or SIGINT it drains: /readyz and new requests get 503 while running answers go on, up to the drain timeout;
then it stops listening, ends workers and media children, and the exit code is 0. A second signal ends the drain.

Exit codes: 0 told to stop; 1 nothing can be served, since the model cannot be loaded or every worker was given up;
2 a setting is wrong (cli.py); 3 it cannot listen on its address.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import socket
from types import FrameType
from typing import Any

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import log as logs
from service.app import create_app
from service.connections import Connections, raise_descriptor_limit
from service.errors import BadRequest, NoCapacity, ServiceError
from service.settings import Settings

log = logging.getLogger("flashserve")

M_MMAP_THRESHOLD = -3  # <malloc.h>
EXIT_CANNOT_SERVE, EXIT_CANNOT_LISTEN = 1, 3
LAST_WORDS = 5.0  # seconds for connections to close after the drain


def run(settings: Settings) -> int:
    """Serve until told to stop; the exit code."""
    logs.configure(settings.log_level)
    give_large_blocks_back()
    if (reason := cannot_listen(settings.host, settings.port)) is not None:
        where = f"{settings.host} port {settings.port}"
        log.critical("cannot listen on %s: %s; choose another --port or --host", where, reason)
        return EXIT_CANNOT_LISTEN
    server = DrainingServer(settings)
    server.run()
    return EXIT_CANNOT_SERVE if server.failed or not server.started else 0


def cannot_listen(host: str, port: int) -> str | None:
    """Why nothing can listen there, looked up before a model is loaded for it; None where something can."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return error.strerror
    return None  # or uvicorn will say what is wrong with the host


def give_large_blocks_back() -> None:
    """Map every block of a megabyte by itself, so that it goes back to the system when it is freed. glibc would learn
    from the first large body that such blocks come often, and keep them: for ever, where a small one lies behind."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 1024 * 1024)


class DrainingServer(uvicorn.Server):
    def __init__(self, settings: Settings) -> None:
        self.failed = False
        self.app = create_app(settings, self._fail)
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        bounds = {
            "max_head_bytes": settings.max_header_bytes,
            "limit": Connections(raise_descriptor_limit(settings.max_connections)),
        }
        protocol = type("Protocol", (BoundedHttpProtocol,), bounds)
        super().__init__(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                loop="uvloop",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=list(settings.trusted_proxies),
                timeout_keep_alive=settings.head_timeout,
                timeout_graceful_shutdown=round(LAST_WORDS) + 1,
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.freeze()  # what is here stays: the collector need not walk through it again and again, on the loop

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(LAST_WORDS, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        """On who does not read what it is told: its request then ends like any whose client left."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Replaces uvicorn's, which would stop listening at once and end with the signal's exit code."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            asyncio.get_running_loop().call_soon(self._draining.cancel)  # when it has begun, else nobody were told

    async def _drain(self) -> None:
        try:
            await self.app.state.service.drain()
        finally:
            self.should_exit = True

    def _fail(self, reason: str) -> None:
        log.critical("cannot serve: %s", reason)
        self.failed = self.should_exit = True


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's, but for heads: they have a size (with the trailers of their body) and a time, other protocols that
    they offer are passed over, and what cannot be read is refused in the words of any other error. And there are only
    so many connections."""

    max_head_bytes = 32 * 1024
    limit = Connections(4096)

    _head_bytes = 0
    _head_is_too_large = False
    _unreported_bytes = 0  # that came since the parser last told of anything: it may be keeping them

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn has a timer for connections that are idle. Here it also runs before the first request, and on until a
        # head is complete: else one that never ends would keep its connection for ever.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.limit.waits(self)
        if len(self.connections) > self.limit.most and not self.limit.make_room(self):
            self._refuse(NoCapacity("there are too many connections; try again soon", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self in self.connections and (self.timeout_keep_alive_task is not None or self.transport.is_closing()):
            self.limit.waits(self)  # for another request, or until the last answer is read

    def pause_writing(self) -> None:
        super().pause_writing()
        self.limit.waits(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.timeout_keep_alive_task is None:
            self.limit.goes_on(self)

    def timeout_keep_alive_handler(self) -> None:
        """Called where no request came in time."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # closing waits until the last answer is read
            self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _unset_keepalive_if_required(self) -> None:
        super()._unset_keepalive_if_required()
        if not self.flow.write_paused:
            self.limit.goes_on(self)

    def data_received(self, data: bytes) -> None:
        """Replaces uvicorn's."""
        self._unreported_bytes += len(data)
        try:
            self._feed(data)
            self._count(0)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            error = BadRequest("this is not a request of HTTP/1.1", code="invalid_http")
            if self._head_is_too_large:
                error = BadRequest(f"the head is larger than {self.max_head_bytes} bytes", code="head_too_large")
            self._refuse(error)

    def on_message_begin(self) -> None:
        self._head_bytes = self._unreported_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise httptools.HttpParserError  # 0.9 among them, in which a request is one line
        self._unset_keepalive_if_required()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unreported_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unreported_bytes = 0
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return True  # to uvicorn: such a head begins no request, `_feed` sees to it

    def _feed(self, data: bytes) -> None:
        """An offer of another protocol, as Java's client makes to any server, stops the parser: it leaves the body out,
        and would take it for the next request. So it starts over, and never sees the offer."""
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                lines = [
                    b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                ]
                lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
                self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))  # CONNECT remains one, and is refused

    def _count(self, num_bytes: int) -> None:
        """Count bytes of the head that the parser tells of, and those that it does not: of a header without an end."""
        if num_bytes:
            self._head_bytes, self._unreported_bytes = self._head_bytes + num_bytes, 0
        if self._head_bytes + self._unreported_bytes > self.max_head_bytes:
            self._head_is_too_large = True
            raise httptools.HttpParserError

    def _refuse(self, error: ServiceError) -> None:
        last = self.cycle
        asked = last is not None and not last.response_complete
        # An answer that is under way, or due, is not to be mixed with this one.
        if not asked or (last.more_body and not last.response_started and not self.pipeline):
            body = msgspec.json.encode(error.envelope())
            headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
            lines = [f"{name}: {value}" for name, value in (headers | error.headers()).items()]
            self.transport.write(STATUS_LINE[error.status] + "\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
        self.limit.waits(self)  # until what was sent is read
