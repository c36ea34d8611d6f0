"""The HTTP server process: uvicorn with limits on request heads and connections, and a graceful shutdown.

On SIGTERM or SIGINT it drains: /readyz and new requests get 503 while running requests continue, up to the drain
timeout; then it stops listening and ends workers and media children. A second signal ends the drain at once.

Exit codes: 0 stopped by a signal; 1 nothing can be served, since the model cannot be loaded or every worker has failed;
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
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service import log as logs
from service.app import create_app
from service.connections import Connections, raise_descriptor_limit
from service.errors import BadRequest, NoCapacity, ServiceError
from service.settings import Settings

log = logging.getLogger("flashserve")

M_MMAP_THRESHOLD = -3  # <malloc.h>
EXIT_CANNOT_SERVE, EXIT_CANNOT_LISTEN = 1, 3
CLOSE_TIMEOUT = 5.0  # seconds for connections to close after the drain


def run(settings: Settings) -> int:
    """Serve until stopped; return the exit code."""
    logs.configure(settings.log_level)
    return_large_blocks()
    if (reason := cannot_listen(settings.host, settings.port)) is not None:
        where = f"{settings.host} port {settings.port}"
        log.critical("cannot listen on %s: %s; choose another --port or --host", where, reason)
        return EXIT_CANNOT_LISTEN
    server = DrainingServer(settings)
    server.run()
    return EXIT_CANNOT_SERVE if server.failed or not server.started else 0


def cannot_listen(host: str, port: int) -> str | None:
    """Return why the server cannot listen there, or None; checked before the model is loaded."""
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
    return None  # uvicorn will report any other problem of the host


def return_large_blocks() -> None:
    """Make malloc map every block from a megabyte on separately, so that freeing it returns it to the system.

    Otherwise glibc raises its threshold after the first large body and keeps such blocks, often for ever."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 1024 * 1024)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains on the first signal."""

    def __init__(self, settings: Settings) -> None:
        self.failed = False
        self.app = create_app(settings, self._fail)
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        bounds = {
            "max_head_bytes": settings.max_header_bytes,
            "connection_limit": Connections(raise_descriptor_limit(settings.max_connections)),
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
                timeout_graceful_shutdown=round(CLOSE_TIMEOUT) + 1,
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.freeze()  # keeps everything loaded so far out of garbage collections, which block the event loop

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        """Abort connections whose clients do not read; their requests end as if the client had left."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Override uvicorn's, which would stop listening at once and exit with the signal's code."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            # Later, since a task cancelled before it starts would not run its `finally`, which ends the requests.
            asyncio.get_running_loop().call_soon(self._draining.cancel)

    async def _drain(self) -> None:
        try:
            await self.app.state.service.drain()
        finally:
            self.should_exit = True

    def _fail(self, reason: str) -> None:
        log.critical("cannot serve: %s", reason)
        self.failed = self.should_exit = True


class UnchunkedCycle(RequestResponseCycle):
    """uvicorn's request and response for clients of HTTP/1.0, which know no chunks: a response of unknown length ends
    with its connection, which uvicorn closes anyway."""

    ends_with_connection = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.ends_with_connection = all(name.lower() != b"content-length" for name, _ in message["headers"])
            if self.ends_with_connection:
                self.chunked_encoding = False
        elif self.ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))  # uvicorn checks that no more is sent
        await super().send(message)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on the size and duration of request heads and on the number of connections.

    The size includes trailers. Offers to upgrade to another protocol are ignored, and malformed requests get an error
    in the usual JSON envelope."""

    max_head_bytes = 32 * 1024
    connection_limit = Connections(4096)

    _head_bytes = 0
    _head_is_too_large = False
    _unreported_bytes = 0  # received since the parser's last callback; it may be buffering them

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's timer of idle connections also runs before the first request and until each head is complete;
        # otherwise a head that never ends would keep its connection for ever.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.connection_limit.mark_waiting(self)
        if len(self.connections) > self.connection_limit.maximum and not self.connection_limit.make_room(self):
            self._refuse(NoCapacity("there are too many connections; try again soon", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self in self.connections and (self.timeout_keep_alive_task is not None or self.transport.is_closing()):
            self.connection_limit.mark_waiting(self)  # for another request, or for the client to read the response

    def pause_writing(self) -> None:
        super().pause_writing()
        self.connection_limit.mark_waiting(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.timeout_keep_alive_task is None:
            self.connection_limit.mark_active(self)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no request came in time."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # close() waits until the client has read the response
            self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _unset_keepalive_if_required(self) -> None:
        super()._unset_keepalive_if_required()
        if not self.flow.write_paused:
            self.connection_limit.mark_active(self)

    def data_received(self, data: bytes) -> None:
        """Override uvicorn's: parse with limits, and refuse what is malformed."""
        self._unreported_bytes += len(data)
        try:
            self._feed(data)
            self._count(0)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            error = BadRequest("this is not a valid HTTP/1.1 request", code="invalid_http")
            if self._head_is_too_large:
                message = f"the request's head is larger than {self.max_head_bytes} bytes"
                error = BadRequest(message, code="head_too_large")
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
            raise httptools.HttpParserError  # such as HTTP/0.9, whose requests are one line
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0" and self.cycle is not None:
            self.cycle.__class__ = UnchunkedCycle

    def on_body(self, body: bytes) -> None:
        self._unreported_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unreported_bytes = 0
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return True  # keeps uvicorn from starting a request; `_feed` does so without the upgrade

    def _feed(self, data: bytes) -> None:
        """Parse bytes. An offer to upgrade, which Java's client sends to any server, stops the parser, and it would
        read the body as the next request; so a new parser gets the same head without the offer."""
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
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))  # a CONNECT request fails again, and is refused

    def _count(self, num_bytes: int) -> None:
        """Count bytes of the head: those that the parser reports, and those that it buffers of an unfinished header."""
        if num_bytes:
            self._head_bytes, self._unreported_bytes = self._head_bytes + num_bytes, 0
        if self._head_bytes + self._unreported_bytes > self.max_head_bytes:
            self._head_is_too_large = True
            raise httptools.HttpParserError

    def _refuse(self, error: ServiceError) -> None:
        """Send an error and close; without the error where it would mix with another response."""
        last = self.cycle
        response_due = last is not None and not last.response_complete
        if not response_due or (last.more_body and not last.response_started and not self.pipeline):
            body = msgspec.json.encode(error.envelope())
            headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
            lines = [f"{name}: {value}" for name, value in (headers | error.headers()).items()]
            self.transport.write(STATUS_LINE[error.status] + "\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
        self.connection_limit.mark_waiting(self)  # for the client to read the response
