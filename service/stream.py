"""Send responses: JSON, server-sent events (SSE), and cancellation when the client disconnects.

Knows nothing of the contents of events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from typing import Any, cast

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.request_context import RequestContext

LINGER = 2.0  # seconds in which a refused client may go on sending its body
SLOW_READER_GRACE = 2.0  # seconds past the deadline in which a client may read the last event

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients ignore it, proxies see that the connection is alive


class LastEvent(bytes):
    """The end of a stream of events; it is sent in one write with the end of the body."""


def event(value: Any) -> bytes:
    """Encode one event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def typed_event(value: dict[str, Any]) -> bytes:
    """Encode one event that has its type as its name too."""
    return f"event: {value['type']}\n".encode() + event(value)


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")


class ClosingResponse(Response):
    """Responds before the request's body is complete, then closes the connection.

    It first reads and discards the body for LINGER seconds; otherwise the client might lose the response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def cancel_on_disconnect(receive: Receive) -> Iterator[None]:
    """Raise ClientDisconnect within the context as soon as the client leaves. The body must have been read before.

    Costs a task, so a request has one for its whole life, which begins in the handler and ends in its EventStream.
    """
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    watching = asyncio.create_task(_cancel_when_gone(receive, task))
    try:
        yield
    except asyncio.CancelledError:
        # Undo our cancellation; it remains if somebody else requested one too.
        if watching.done() and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


async def _cancel_when_gone(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


class EventStream(Response):
    """Sends events as they come, up to a `LastEvent`, and a comment after each long silence.

    Closes `resources` at the end, a cancel_on_disconnect among them, whether it succeeds or not.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        resources: ExitStack,
        context: RequestContext,
        *,
        keep_alive_event: bytes = KEEP_ALIVE,
    ) -> None:
        """context: says when the stream ends at the latest, and after how long a silence a comment is sent;
        keep_alive_event: what is sent instead of a comment."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._events = events
        self._resources = resources
        self._deadline, self._keep_alive = context.deadline, context.keep_alive
        self._keep_alive_event = keep_alive_event
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # Where the client left or does not read, the connection just ends.
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
        """Send every event; never at the same time as a comment."""
        loop = asyncio.get_running_loop()
        async with aclosing(self._events) as events:
            async for chunk in events:
                async with self._sending:
                    is_last = isinstance(chunk, LastEvent)
                    await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
                    self._sent_at = loop.time()

    async def _comment(self, send: Send) -> None:
        """Send a comment after each silence; none to a client that has not read what was sent before."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            await asyncio.sleep(self._sent_at + self._keep_alive - loop.time())
            async with self._sending:
                if loop.time() >= self._sent_at + self._keep_alive:
                    await send({"type": "http.response.body", "body": self._keep_alive_event, "more_body": True})
                    self._sent_at = loop.time()
