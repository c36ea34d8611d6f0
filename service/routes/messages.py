"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's Messages API."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable
from contextlib import ExitStack
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import RequestOutput
from service.answers.blocks import Added, Block, Blocks, Closed, Opened, Step
from service.answers.events import Delta
from service.auth import require_api_key
from service.body import MEDIA_IN_ANTHROPIC, read_json
from service.chat import Chat, begin
from service.deps import service_of, with_request_id
from service.errors import ServiceError
from service.openapi.operation import Operation
from service.request_context import RequestContext
from service.routes.tokenize import admitted, tokenize_chat
from service.schemas import anthropic as schema
from service.schemas.answers import AnthropicError, AnthropicEvent, AnthropicMessage, CountedTokens
from service.stream import EventStream, LastEvent, json_response, typed_event
from service.usage import anthropic_usage

PATH = "/v1/messages"
REQUEST_ID = "Request-Id"  # Anthropic's name of the header
PING = typed_event({"type": "ping"})
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@with_request_id("msg_", header=REQUEST_ID)
@require_api_key
async def create_message(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        body = await read_json(upload, schema.MessagesRequest, service.settings, media=MEDIA_IN_ANTHROPIC)
        names = schema.field_names()
        with names.in_errors():
            converted = schema.to_chat(body, names, service.settings)
            answer = begin(request, converted, context, upload, resources, clamp_max_tokens=True)
            del body, converted  # frees its media
            chat = await answer
        if chat.stream:
            return EventStream(_events(chat), resources.pop_all(), context, keep_alive_event=PING)
        content = Content()
        async for _, deltas, output in chat.deltas():
            content.feed(deltas, output)
        content.finish()
        return json_response(_message(chat, content))


@with_request_id("msg_", header=REQUEST_ID)
@require_api_key
async def count_tokens(request: Request) -> Response:
    service = service_of(request)
    async with admitted(request) as upload:
        body = await read_json(upload, schema.MessagesRequest, service.settings, media=MEDIA_IN_ANTHROPIC)
        names = schema.field_names()
        with names.in_errors():
            tokens = await tokenize_chat(service, schema.to_chat(body, names, service.settings), upload)
    answer: CountedTokens = {"input_tokens": len(tokens.ids)}
    return json_response(answer)


class Content:
    """The content blocks of a message, and the events by which they grow."""

    def __init__(self) -> None:
        self.stop_reason: str | int | None = None  # the engine's: the stop string that ended the answer
        self._blocks = Blocks()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [_block(block) for block in self._blocks.blocks]

    def feed(self, deltas: Iterable[Delta], output: RequestOutput) -> list[bytes]:
        """Append what the parser found in an output."""
        self.stop_reason = output.stop_reason
        return [event for step in self._blocks.feed(deltas) for event in _step_events(step)]

    def finish(self) -> list[bytes]:
        """Complete the last block."""
        return [event for step in self._blocks.finish() for event in _step_events(step)]


def _step_events(step: Step) -> list[bytes]:
    block = step.block
    match step:
        case Opened():
            return [_event("content_block_start", index=block.index, content_block=_block(block, empty=True))]
        case Added():
            return [_delta(block, step.text)]
        case Closed():
            signature = [_delta(block, _signature(block), signs=True)] if block.kind == "reasoning" else []
            return [*signature, _event("content_block_stop", index=block.index)]


def _delta(block: Block, text: str, *, signs: bool = False) -> bytes:
    """Encode what a block grows by. signs: the text is the signature of thinking."""
    kinds = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")}
    kinds["call"] = ("input_json_delta", "partial_json")
    kind, field = ("signature_delta", "signature") if signs else kinds[block.kind]
    return _event("content_block_delta", index=block.index, delta={"type": kind, field: text})


def _block(block: Block, *, empty: bool = False) -> dict[str, Any]:
    """Return a content block. empty: as it begins."""
    if block.call is not None:
        value = {} if empty else _input(block.text)
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": value}
    text = "" if empty else block.text
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": "" if empty else _signature(block)}
    return {"type": "text", "text": text, "citations": None}


def _input(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call. What is no JSON object, because the answer was cut or the model erred, stays
    readable, in the form that Anthropic recommends."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any]) if arguments.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return {"INVALID_JSON": arguments}


def _signature(block: Block) -> str:
    """Return what stands for a signature: clients expect one with thinking. It is not checked when it comes back."""
    return hashlib.sha256(block.text.encode()).hexdigest()


async def _events(chat: Chat) -> AsyncGenerator[bytes, None]:
    """Yield the event that opens the message, those of each block, and those that close it."""
    content = Content()
    yield _event("message_start", message=_message(chat)) + PING
    last = b""
    try:
        async for _, deltas, output in chat.deltas():
            events = b"".join(content.feed(deltas, output))
            if chat.context.finished:
                last = events
            elif events:
                yield events
        last += b"".join(content.finish())
        usage = anthropic_usage(chat.usage)
        yield LastEvent(
            last + _event("message_delta", delta=_stop(chat, content), usage=usage) + _event("message_stop")
        )
    except ServiceError as error:
        yield LastEvent(typed_event(schema.error_envelope(error, chat.context.id)))


def _message(chat: Chat, content: Content | None = None) -> dict[str, Any]:
    """Return the message. content: None before there is any."""
    context = chat.context
    return {
        "id": context.id,
        "type": "message",
        "role": "assistant",
        "model": context.model,
        "content": [] if content is None else content.blocks,
        **_stop(chat, content),
        "usage": anthropic_usage(chat.usage),
    }


def _stop(chat: Chat, content: Content | None) -> dict[str, Any]:
    """Return why a message ended."""
    finish = chat.finish_reason(0)
    if finish is None or content is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finish == "stop" and isinstance(content.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": content.stop_reason}
    return {"stop_reason": STOP_REASONS[finish], "stop_sequence": None}


def _event(kind: str, **fields: Any) -> bytes:
    return typed_event({"type": kind, **fields})


ROUTES = [
    Route(PATH, create_message, methods=["POST"]),
    Route(f"{PATH}/count_tokens", count_tokens, methods=["POST"]),
]
OPERATIONS = [
    Operation(
        "post",
        PATH,
        "Answer a conversation, as Anthropic's Messages API",
        {200: AnthropicMessage},
        "Generate",
        body=schema.MessagesRequest,
        bounded=False,
        events=(AnthropicEvent,),
        named_events=True,
        closing_event=None,
        error=AnthropicError,
        not_supported=schema.NOT_BUILT,
        example={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0},
    ),
    Operation(
        "post",
        f"{PATH}/count_tokens",
        "Count the tokens of a conversation, as Anthropic's Messages API",
        {200: CountedTokens},
        "Tokens",
        body=schema.MessagesRequest,
        bounded=False,
        error=AnthropicError,
        example={"messages": [{"role": "user", "content": "Hello"}]},
    ),
]
