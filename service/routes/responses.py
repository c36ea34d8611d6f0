"""POST /v1/responses, OpenAI's Responses API: one answer to the items that are sent. Nothing is stored.

POST /v1/responses/input_tokens counts the tokens of the same request.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import RequestOutput, TokenLogprobs
from service import logprobs
from service.answers.blocks import Added, Block, Blocks, Closed, Opened, Step
from service.answers.events import Delta, TextDelta, joined
from service.answers.reasoning import num_last_tokens
from service.auth import require_api_key
from service.body import read_json
from service.chat import Chat, begin
from service.deps import service_of, with_request_id
from service.errors import ServiceError
from service.openapi.operation import Operation
from service.request_context import RequestContext
from service.routes.tokenize import admitted, tokenize_chat
from service.schemas import responses as schema
from service.schemas.answers import ChatLogprob, InputTokens, ResponseEvent, ResponseObject
from service.stream import EventStream, LastEvent, json_response, typed_event
from service.usage import responses_usage


@with_request_id("resp_")
@require_api_key
async def create_response(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        body = await read_json(upload, schema.ResponsesRequest, service.settings)
        names = schema.field_names()
        with names.in_errors():
            answer = begin(request, schema.to_chat(body, names), context, upload, resources)
            echo = schema.echo(body)
            del body  # frees its media
            chat = await answer
        if chat.stream:
            return EventStream(_events(chat, echo), resources.pop_all(), context)
        output = Output(context.id)
        async for _, deltas, step in chat.deltas():
            output.feed(deltas, step)
        output.finish()
        return json_response(_response(chat, echo, output))


@with_request_id("resp_")
@require_api_key
async def count_input_tokens(request: Request) -> Response:
    service = service_of(request)
    async with admitted(request) as upload:
        body = await read_json(upload, schema.ResponsesRequest, service.settings)
        names = schema.field_names()
        with names.in_errors():
            tokens = await tokenize_chat(service, schema.to_chat(body, names), upload)
    answer: InputTokens = {"object": "response.input_tokens", "input_tokens": len(tokens.ids)}
    return json_response(answer)


class Output:
    """The output items of a response, and the events by which they grow."""

    def __init__(self, response_id: str) -> None:
        self.complete = True  # whether the last item is, or will be
        self._suffix = response_id.rpartition("_")[2]
        self._blocks = Blocks()
        self._logprobs: dict[int, list[ChatLogprob]] = {}  # of texts, by their index
        self._new_logprobs: list[TokenLogprobs] = []  # of tokens whose text is not yet there
        self._num_reserved = 0  # the last ones, which belong to text that is still to be fed
        self._number = 0

    @property
    def items(self) -> list[dict[str, Any]]:
        last = len(self._blocks.blocks) - 1
        return [self._item(block, done=self.complete or block.index < last) for block in self._blocks.blocks]

    def feed(self, deltas: Iterable[Delta], output: RequestOutput) -> list[bytes]:
        """Append what the parser found in an output."""
        deltas = joined(deltas)
        self._new_logprobs += output.logprobs or ()
        if output.finish_reason == "length":
            self.complete = False
        begin = max((index for index, delta in enumerate(deltas, 1) if not isinstance(delta, TextDelta)), default=0)
        text = "".join(delta.text for delta in deltas[begin:] if isinstance(delta, TextDelta))
        self._num_reserved = num_last_tokens(output.tokens, len(text))
        events = [event for step in self._blocks.feed(deltas[:begin]) for event in self._events(step)]
        self._num_reserved = 0
        return events + [event for step in self._blocks.feed(deltas[begin:]) for event in self._events(step)]

    def finish(self) -> list[bytes]:
        """Complete the last item."""
        return [event for step in self._blocks.finish() for event in self._events(step)]

    def event(self, kind: str, **fields: Any) -> bytes:
        """Encode an event with its number in the stream."""
        number, self._number = self._number, self._number + 1
        return typed_event({"type": kind, "sequence_number": number, **fields})

    def _events(self, step: Step) -> list[bytes]:
        block = step.block
        place = {"item_id": self._id(block), "output_index": block.index}
        part_place = place | {"content_index": 0}
        match step:
            case Opened():
                item = self._item(block, done=False, empty=True)
                added = self.event("response.output_item.added", output_index=block.index, item=item)
                if block.kind == "call":
                    return [added]
                part = self._part(block, empty=True)
                return [added, self.event("response.content_part.added", **part_place, part=part)]
            case Added() if block.kind == "text":
                tokens = self._take_logprobs(block)
                return [self.event("response.output_text.delta", **part_place, delta=step.text, logprobs=tokens)]
            case Added() if block.kind == "reasoning":
                self._pop_logprobs()
                return [self.event("response.reasoning_text.delta", **part_place, delta=step.text)]
            case Added():
                self._pop_logprobs()
                return [self.event("response.function_call_arguments.delta", **place, delta=step.text)]
            case Closed():
                return [*self._closed(block, place), self._item_done(block)]

    def _closed(self, block: Block, place: dict[str, Any]) -> list[bytes]:
        """Return the events that complete what is in an item."""
        if block.call is not None:
            fields = {"name": block.call.name, "arguments": block.text}
            return [self.event("response.function_call_arguments.done", **place, **fields)]
        place = place | {"content_index": 0}
        if block.kind == "text":
            self._take_logprobs(block)
            tokens = self._logprobs[block.index]
            done = self.event("response.output_text.done", **place, text=block.text, logprobs=tokens)
        else:
            done = self.event("response.reasoning_text.done", **place, text=block.text)
        return [done, self.event("response.content_part.done", **place, part=self._part(block))]

    def _item_done(self, block: Block) -> bytes:
        is_last = block.index == len(self._blocks.blocks) - 1
        item = self._item(block, done=self.complete or not is_last)
        return self.event("response.output_item.done", output_index=block.index, item=item)

    def _item(self, block: Block, *, done: bool, empty: bool = False) -> dict[str, Any]:
        """Return an output item. empty: as it begins."""
        status = "in_progress" if empty else "completed" if done else "incomplete"
        item: dict[str, Any] = {"id": self._id(block), "status": status}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": "" if empty else block.text}
            return {"type": "function_call", **item, **call}
        content = [] if empty else [self._part(block)]
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": content, "encrypted_content": None}
        return {"type": "message", **item, "role": "assistant", "content": content}

    def _part(self, block: Block, *, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        tokens = [] if empty else self._logprobs.get(block.index, [])
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}

    def _id(self, block: Block) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
        return f"{prefix}_{self._suffix}{block.index:02d}"

    def _pop_logprobs(self) -> list[TokenLogprobs]:
        """Remove and return the new log-probabilities, but for the reserved ones."""
        end = max(0, len(self._new_logprobs) - self._num_reserved)
        popped, self._new_logprobs = self._new_logprobs[:end], self._new_logprobs[end:]
        return popped

    def _take_logprobs(self, block: Block) -> list[ChatLogprob]:
        """Move the new log-probabilities to a text, and return them."""
        tokens = logprobs.to_openai(self._pop_logprobs())
        self._logprobs.setdefault(block.index, []).extend(tokens)
        return tokens


async def _events(chat: Chat, echo: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """Yield the events that open the response, those of each output item, and one with the whole response."""
    output = Output(chat.context.id)
    opening = _response(chat, echo)
    yield output.event("response.created", response=opening) + output.event("response.in_progress", response=opening)
    last = b""
    try:
        async for _, deltas, step in chat.deltas():
            events = b"".join(output.feed(deltas, step))
            if chat.context.finished:
                last = events
            elif events:
                yield events
        last += b"".join(output.finish())
        response = _response(chat, echo, output)
        yield LastEvent(last + output.event(f"response.{response['status']}", response=response))
    except ServiceError as error:
        fields = {"code": error.code or error.type, "message": error.message, "param": error.param}
        output.complete = False
        response = _response(chat, echo, output, error)
        yield LastEvent(output.event("error", **fields) + output.event("response.failed", response=response))


def _response(
    chat: Chat, echo: dict[str, Any], output: Output | None = None, error: ServiceError | None = None
) -> dict[str, Any]:
    """Return the response. output: None before there is any; error: what ended it early."""
    context = chat.context
    cut = output is not None and not output.complete
    status = "in_progress" if output is None else "failed" if error else "incomplete" if cut else "completed"
    return {
        "id": context.id,
        "object": "response",
        "created_at": context.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": error and {"code": "server_error", "message": error.message},
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": context.model,
        "output": [] if output is None else output.items,
        "usage": None if output is None else responses_usage(chat.usage),
        **echo,
    }


ROUTES = [
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input_tokens, methods=["POST"]),
]
OPERATIONS = [
    Operation(
        "post",
        "/v1/responses",
        "Answer, as OpenAI's Responses API",
        {200: ResponseObject},
        "Generate",
        "Stateless: nothing is stored.",
        body=schema.ResponsesRequest,
        bounded=False,
        events=(ResponseEvent,),
        named_events=True,
        closing_event=None,
        not_supported=schema.NOT_BUILT,
        example={"input": "Hello", "max_output_tokens": 8, "temperature": 0},
    ),
    Operation(
        "post",
        "/v1/responses/input_tokens",
        "Count the tokens of an input, as OpenAI's Responses API",
        {200: InputTokens},
        "Tokens",
        body=schema.ResponsesRequest,
        bounded=False,
        example={"input": "Hello"},
    ),
]
