"""Sending answers while watching for clients that leave: one pattern, and server-sent events.

Knows nothing of what is in an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress
from types import TracebackType
from typing import Any, cast

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

LINGER = 2.0  # seconds in which a client that is refused may go on sending
SLOW_READER_GRACE = 2.0  # seconds past the deadline that a client gets to take the last event

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients pass over it, proxies see that the connection lives


class Last(bytes):
    """The end of a stream of events. It leaves in one write with what came just before it and with the body's end."""


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")


class LastResponse(Response):
    """Answers at once a request whose body is still being sent, and then ends the connection: what comes in the
    meantime is read and thrown away for a moment, else the client might lose the answer with its connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class UnlessGone:
    """A context that ends with ClientDisconnect as soon as the client leaves. The body must have been read before.

    One for a whole request, though it ends in another function than it began in: each would cost a task.
    """

    def __init__(self, receive: Receive) -> None:
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._watching = asyncio.create_task(_cancel_when_gone(receive, self._task))

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        gone = self._watching.done()
        self._watching.cancel()
        # It is done only where it was the client; then no cancellation is left, unless somebody else asked too.
        if isinstance(error, asyncio.CancelledError) and gone and not self._task.uncancel():
            raise ClientDisconnect from None


async def _cancel_when_gone(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


class EventStream(Response):
    """Sends events as they come, `Last` at the end, and a comment whenever there was none for so long; `resources`, an
    UnlessGone among them, are let go at the end, however it comes."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        resources: ExitStack,
        *,
        deadline: float,
        keep_alive: float,
    ) -> None:
        """keep_alive: seconds of silence after which a comment is sent; 0: none is."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._events = events
        self._resources = resources
        self._deadline = deadline
        self._keep_alive = keep_alive
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # A client that left, or that does not read, is not told anything more: the connection just ends.
        with suppress(ClientDisconnect, TimeoutError), self._resources:
            async with asyncio.timeout_at(self._deadline + SLOW_READER_GRACE):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                # One task for the whole stream: a timeout around each event would cost more than the event.
                commenting = asyncio.create_task(self._comment(send)) if self._keep_alive else None
                try:
                    await self._send_all(send)
                finally:
                    if commenting is not None:
                        commenting.cancel()

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        async with aclosing(self._events) as events:
            async for chunk in events:
                async with self._sending:
                    await send({"type": "http.response.body", "body": chunk, "more_body": not isinstance(chunk, Last)})
                    self._sent_at = loop.time()

    async def _comment(self, send: Send) -> None:
        """Break every silence. A client that does not read what was sent before gets no comment either."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            await asyncio.sleep(self._sent_at + self._keep_alive - loop.time())
            async with self._sending:
                if loop.time() >= self._sent_at + self._keep_alive:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    self._sent_at = loop.time()
