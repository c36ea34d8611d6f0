"""POST /v1/chat/completions, as OpenAI's clients expect it.

`temperature` defaults to 1, as at OpenAI. Without `seed` a random one is drawn. With `n`, choice j > 0 has a seed
derived from (seed, j), so that choice 0 is the context of a request without `n`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import RequestOutput, TokenLogprobs
from service import logprobs
from service.answers.events import Answer, ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart
from service.auth import require_api_key
from service.body import read_json
from service.chat import Chat, begin
from service.deps import service_of, with_request_id
from service.errors import ServiceError
from service.openapi.operation import Operation
from service.request_context import RequestContext
from service.schemas import openai
from service.schemas.answers import (
    ChatAnswer,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChunkChoice,
    FunctionDelta,
)
from service.stream import DONE, EventStream, LastEvent, event, json_response


@with_request_id("chatcmpl-")
@require_api_key
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        body = read_json(upload, openai.ChatRequest, service.settings)
        chat = await begin(request, await body, context, upload, resources)
        if chat.stream:
            return EventStream(_events(chat), resources.pop_all(), context)
        await chat.finish()
        return json_response(_completion(chat))


def _completion(chat: Chat) -> ChatCompletion:
    completion: ChatCompletion = {
        "id": chat.context.id,
        "object": "chat.completion",
        "created": chat.context.created,
        "model": chat.context.model,
        "choices": [
            {
                "index": index,
                "message": _message(answer, as_functions=chat.as_functions),
                "logprobs": _logprobs(chat, chat.context.choices[index].logprobs),
                "finish_reason": chat.finish_reason(index),
            }
            for index, answer in enumerate(chat.answers)
        ],
        "usage": chat.usage,
    }
    if chat.prompt_token_ids is not None:
        completion["prompt_token_ids"] = chat.prompt_token_ids
        for choice, token_ids in zip(completion["choices"], chat.token_ids, strict=True):
            choice["token_ids"] = token_ids
    return completion


def _message(answer: Answer, *, as_functions: bool) -> ChatAnswer:
    message: ChatAnswer = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning is not None:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if (calls := answer.tool_calls) and as_functions:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _fields(delta: Delta, *, as_functions: bool) -> ChatDelta:
    """Return the `delta` of a chunk."""
    match delta:
        case TextDelta():
            return {"content": delta.text}
        case ReasoningDelta():
            return {"reasoning_content": delta.text, "reasoning": delta.text}  # the names that clients know it by
        case ToolCallStart() if as_functions:
            return {"function_call": {"name": delta.name, "arguments": ""}}
        case ArgumentsDelta() if as_functions:
            return {"function_call": {"arguments": delta.text}}
        case ToolCallStart():
            function: FunctionDelta = {"name": delta.name, "arguments": ""}
            return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
        case ArgumentsDelta():
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


async def _events(chat: Chat) -> AsyncGenerator[bytes, None]:
    """Yield a chunk that opens each choice, one per delta, one that closes each choice; then usage, if requested."""
    context = chat.context

    def whole(choices: list[ChunkChoice], *, with_usage: bool, opens: bool = False) -> bytes:
        head: ChatChunk = {
            "id": context.id,
            "object": "chat.completion.chunk",
            "created": context.created,
            "model": context.model,
            "choices": choices,
        }
        if chat.with_usage:
            head["usage"] = chat.usage if with_usage else None
        if opens and chat.prompt_token_ids is not None:
            head["prompt_token_ids"] = chat.prompt_token_ids
        return event(head)

    def chunk(
        index: int,
        delta: ChatDelta,
        finish_reason: ChatFinishReason | None = None,
        output: RequestOutput | None = None,
        *,
        opens: bool = False,
    ) -> bytes:
        choice: ChunkChoice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(chat, output.logprobs) if output else None,
            "finish_reason": finish_reason,
        }
        if output and chat.prompt_token_ids is not None:
            choice["token_ids"] = [token.id for token in output.tokens]
        return whole([choice], with_usage=chat.running_stats, opens=opens)

    for index in range(len(chat.answers)):
        yield chunk(index, {"role": "assistant", "content": ""}, opens=True)
    last = b""
    try:
        async for index, deltas, output in chat.deltas():
            # Tokens may come before their text is complete.
            fields = [_fields(delta, as_functions=chat.as_functions) for delta in deltas]
            if not fields and (output.logprobs or (output.tokens and chat.prompt_token_ids is not None)):
                fields = [{"content": ""}]
            chunks = b"".join(
                chunk(index, delta, output=None if number else output) for number, delta in enumerate(fields)
            )
            if output.finish_reason is not None:
                chunks += chunk(index, {}, chat.finish_reason(index))
            if context.finished:
                last = chunks
            elif chunks:
                yield chunks
        if chat.with_usage:
            last += whole([], with_usage=True)
        yield LastEvent(last + DONE)
    except ServiceError as error:
        yield LastEvent(event(error.envelope()) + DONE)


def _logprobs(chat: Chat, tokens: Seq[TokenLogprobs] | None) -> ChatLogprobs | None:
    return {"content": logprobs.to_openai(tokens, as_ids=chat.tokens_as_ids), "refusal": None} if tokens else None


ROUTES = [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
OPERATIONS = [
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation with images and videos, as OpenAI's chat API",
        {200: ChatCompletion},
        "Generate",
        body=openai.ChatRequest,
        events=(ChatChunk,),
        not_supported=openai.NOT_BUILT,
        without_effect=openai.IGNORED,
        example={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0},
    )
]
