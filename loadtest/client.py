"""Send a question by either route, and read its whole answer.

A question (prompt, files, sampling) decides the answer. The variant of the request (route, streamed or not, with
speculation or without) must not change it, nor must other requests in progress.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from loadtest.media import File

PIECE = 16 * 1024


@dataclass(frozen=True)
class Question:
    prompt: str
    files: tuple[File, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict, hash=False)  # max_tokens, temperature, seed, ...


@dataclass(frozen=True)
class Variant:
    route: Literal["chat", "generate"] = "chat"
    stream: bool = False
    speculation: Literal["auto", "off"] = "auto"
    n: int = 1  # chat only; the first choice is what a single one would be


@dataclass(frozen=True)
class Disconnect:
    """When the client closes the connection: after a share of its upload, or some seconds, or some events."""

    at: Literal["upload", "wait", "stream"]
    amount: float


@dataclass(frozen=True)
class Answer:
    status: int
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)  # /v1/generate's whole object


class Disconnected(Exception):
    """The client closed the connection before it had its answer, as `Disconnect` says."""


async def ask(
    client: httpx.AsyncClient, question: Question, variant: Variant, disconnect: Disconnect | None = None
) -> Answer:
    """Send one request and return its whole answer or refusal.

    Raises Disconnected if the client closed the connection first, and ValueError if a stream is malformed.
    """
    request = _chat(client, question, variant) if variant.route == "chat" else _generate(client, question, variant)
    if disconnect is None:
        return await _answer(client, request, variant)
    if disconnect.at == "upload":
        return await _answer(client, _half_sent(client, request, disconnect.amount), variant)
    if disconnect.at == "stream":
        return await _answer(client, request, variant, max_events=int(disconnect.amount))
    try:
        async with asyncio.timeout(disconnect.amount):
            return await _answer(client, request, variant)
    except TimeoutError:
        raise Disconnected from None


def data_uri(file: File) -> str:
    return f"data:{file.mime};base64,{base64.b64encode(file.data).decode()}"


def parts(question: Question) -> list[dict[str, Any]]:
    media = [{"type": f"{file.kind}_url", f"{file.kind}_url": {"url": data_uri(file)}} for file in question.files]
    return [*media, {"type": "text", "text": question.prompt}]


def chat_body(question: Question, variant: Variant) -> dict[str, Any]:
    message = {"role": "user", "content": parts(question)}
    body: dict[str, Any] = {"messages": [message], "temperature": 0, "stream": variant.stream}
    if variant.speculation != "auto":  # the one field that other servers do not know
        body["speculation"] = variant.speculation
    if variant.n != 1:
        body["n"] = variant.n
    if variant.stream:
        body["stream_options"] = {"include_usage": True}
    return body | question.sampling


def _chat(client: httpx.AsyncClient, question: Question, variant: Variant) -> httpx.Request:
    return client.build_request("POST", "/v1/chat/completions", json=chat_body(question, variant))


def _generate(client: httpx.AsyncClient, question: Question, variant: Variant) -> httpx.Request:
    fields: dict[str, Any] = {"prompt": question.prompt, "stream": variant.stream, "speculation": variant.speculation}
    fields |= question.sampling
    form = {name: _as_text(value) for name, value in fields.items()}
    # The service finds a file's type from its bytes.
    files = [("media", ("file", file.data, "application/octet-stream")) for file in question.files]
    return client.build_request("POST", "/v1/generate", data=form, files=files)


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str | list) else json.dumps(value)


def _half_sent(client: httpx.AsyncClient, request: httpx.Request, share: float) -> httpx.Request:
    body = request.read()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, int(len(body) * share), PIECE):
            yield body[start : start + PIECE]
            await asyncio.sleep(0)
        raise Disconnected

    headers = {"Content-Type": request.headers["Content-Type"], "Content-Length": str(len(body))}
    return client.build_request("POST", request.url, content=pieces(), headers=headers)


async def _answer(
    client: httpx.AsyncClient, request: httpx.Request, variant: Variant, *, max_events: int | None = None
) -> Answer:
    response = await client.send(request, stream=True)
    try:
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return await _streamed(response, variant, max_events)
        body = json.loads(await response.aread())
    finally:
        await response.aclose()
    if response.status_code != 200:
        return Answer(response.status_code, error=body["error"])
    if variant.route == "generate":
        return _native(body)
    choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
    return Answer(
        200,
        tuple(choice["message"]["content"] for choice in choices),
        tuple(choice["finish_reason"] for choice in choices),
        body["usage"],
    )


def _native(body: dict[str, Any]) -> Answer:
    return Answer(200, (body["text"],), (body["finish_reason"],), body["usage"], done=body)


async def _streamed(response: httpx.Response, variant: Variant, max_events: int | None) -> Answer:
    texts, reasons = [""] * variant.n, [""] * variant.n
    usage: dict[str, Any] = {}
    done: dict[str, Any] = {}
    closed, seen = False, 0
    async for line in response.aiter_lines():
        if not line or (line.startswith(":") and not closed):  # between events; comments keep connections open
            continue
        if closed or not line.startswith("data: "):
            raise ValueError(f"a stream may not have this line here: {line[:80]!r}")
        if line == "data: [DONE]":
            closed = True
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return Answer(response.status_code, tuple(texts), error=event["error"])
        seen += 1
        if max_events is not None and seen > max_events:
            raise Disconnected
        if variant.route == "generate":
            if event["type"] == "done":
                done, closed = event, True
            else:
                texts[0] += event["text"]
            continue
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    if not closed:
        raise ValueError("the stream ended without its last event")
    if variant.route == "generate":
        if done["text"] != texts[0]:
            raise ValueError("the streamed text is not the final text")
        return _native(done)
    return Answer(200, tuple(texts), tuple(reasons), usage)
