"""The HTTP server's process: uvicorn with a bound on request heads, and an orderly end.

On SIGTERM or SIGINT it drains: /readyz and new requests get 503 while running answers go on, up to the drain timeout;
then it stops listening, ends workers and media children, and the exit code is 0. A second signal cuts that short.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from types import FrameType
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service import log as logs
from service.app import create_app
from service.settings import Settings

log = logging.getLogger("flashserve")

LAST_WORDS = 5.0  # seconds for connections to close after the drain


def run(settings: Settings) -> int:
    """Serve until told to stop; the exit code."""
    logs.configure(settings.log_level)
    server = DrainingServer(settings)
    server.run()
    if server.fatal is not None:
        log.critical("cannot serve: %s", server.fatal)
        return 1
    return 0 if server.started else 1


class DrainingServer(uvicorn.Server):
    def __init__(self, settings: Settings) -> None:
        self.fatal: str | None = None
        self.app = create_app(settings, self._fail)
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        protocol = type("Protocol", (BoundedHttpProtocol,), {"max_head_bytes": settings.max_header_bytes})
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
                proxy_headers=False,  # nobody here asks where a request came from
                timeout_keep_alive=30,
                timeout_graceful_shutdown=round(LAST_WORDS),
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.freeze()  # what is here stays: the collector need not walk through it again and again, on the loop

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
            self._draining.cancel()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self.app.state.service.drain()
        self.should_exit = True

    def _fail(self, reason: str) -> None:
        self.fatal = reason
        self.should_exit = True


class BoundedHttpProtocol(HttpToolsProtocol):
    """httptools itself takes heads of any size, and collects them in memory."""

    max_head_bytes = 32 * 1024

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        # A header without an end is not reported while it grows: count what came of it.
        if was_in_head and self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self.send_400_response("The head is too large.")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.max_head_bytes:
            raise httptools.HttpParserError("the head is too large")
