"""POST /v1/chat/completions and /v1/models, as OpenAI's clients expect them.

`temperature` defaults to 1, as at OpenAI. Without `seed` a random one is drawn. With `n`, choice j > 0 has a seed
derived from (seed, j), so that choice 0 is the context of a request without `n`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import TokenLogprobs
from service import chat_input, logprobs
from service.auth import require_api_key
from service.body import read_json
from service.deps import service_of, with_request_id
from service.errors import BadRequest, ServiceError
from service.request_context import RequestContext
from service.schemas import openai
from service.schemas.sampling import sampling_params, unknown_model
from service.stream import DONE, EventStream, LastEvent, cancel_on_disconnect, event, json_response
from service.usage import usage

DEFAULT_TEMPERATURE = 1.0


@with_request_id("chatcmpl-")
@require_api_key
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request.state.id, key=request.state.key))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        body = await read_json(upload, openai.ChatRequest, service.settings)
        openai.check(body, service.settings)
        params = sampling_params(body, service.settings, default_temperature=DEFAULT_TEMPERATURE)
        n = body.n or 1
        if n > service.max_choices:
            raise BadRequest(f"n must be at most {service.max_choices}", param="n")
        context.reserve(n)
        resources.enter_context(cancel_on_disconnect(request.receive))
        options = openai.media_options(body, service.settings, service.pool.info)
        async with context.time_limit():
            with upload:
                chat = await chat_input.from_chat(body, options, upload, service.media_loader(context.count_decoded))
        stream_options = body.stream_options or openai.StreamOptions()
        with_usage = bool(stream_options.include_usage)
        running_stats = with_usage and bool(stream_options.continuous_usage_stats)
        clamp_max_tokens = body.requested_max_tokens() is None
        stream, speculation = body.stream, body.speculation
        del body  # frees its media
        await context.submit(
            chat,
            params,
            n=n,
            speculation=speculation,
            running_stats=running_stats,
            clamp_max_tokens=clamp_max_tokens,
        )
        if stream:
            return EventStream(
                _events(context, with_usage=with_usage, running_stats=running_stats),
                resources.pop_all(),
                deadline=context.deadline,
                keep_alive=service.settings.sse_keepalive_seconds,
            )
        await context.finish()
        return json_response(_completion(context))


@require_api_key
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(request)]})


@require_api_key
async def model(request: Request) -> Response:
    name = request.path_params["name"]
    if not name:
        raise HTTPException(404)
    settings = service_of(request).settings
    if name != settings.model_name:
        raise unknown_model(name, settings)
    return json_response(_model(request))


def _completion(context: RequestContext) -> dict[str, Any]:
    return {
        **_head(context, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(context.choices)
        ],
        "usage": usage(context.stats),
    }


async def _events(context: RequestContext, *, with_usage: bool, running_stats: bool) -> AsyncGenerator[bytes, None]:
    """Yield a chunk that opens each choice, one per output, one that closes each choice; then usage, if requested.

    running_stats: put the usage so far into every chunk.
    """
    head = _head(context, "chat.completion.chunk") | ({"usage": None} if with_usage else {})

    def chunk(
        index: int, delta: dict[str, str], finish_reason: str | None = None, tokens: Seq[TokenLogprobs] | None = None
    ) -> bytes:
        if running_stats:
            head["usage"] = usage(context.stats)
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(tokens), "finish_reason": finish_reason}
        return event({**head, "choices": [choice]})

    for index in range(len(context.choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    last = b""
    try:
        async for index, output in context.outputs():
            # A token may have log-probabilities before its text is complete.
            has_content = output.text or output.logprobs
            chunks = chunk(index, {"content": output.text}, tokens=output.logprobs) if has_content else b""
            if output.finish_reason is not None:
                chunks += chunk(index, {}, output.finish_reason)
            if context.finished:
                last = chunks
            elif chunks:
                yield chunks
        if with_usage:
            last += event({**head, "choices": [], "usage": usage(context.stats)})
        yield LastEvent(last + DONE)
    except ServiceError as error:
        yield LastEvent(event(error.envelope()) + DONE)


def _logprobs(tokens: Seq[TokenLogprobs] | None) -> dict[str, Any] | None:
    return {"content": logprobs.to_openai(tokens), "refusal": None} if tokens else None


def _head(context: RequestContext, kind: str) -> dict[str, Any]:
    return {"id": context.id, "object": kind, "created": context.created, "model": context.model}


def _model(request: Request) -> dict[str, Any]:
    service = service_of(request)
    info = service.pool.info
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(request.app.state.started),
        "owned_by": "flashserve",
        # vLLM's fields
        "root": service.settings.model_name,
        "parent": None,
        "permission": [],
        "max_model_len": info.max_model_len if info else None,
    }


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
]
