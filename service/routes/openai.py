"""POST /v1/chat/completions and /v1/models, as OpenAI's clients expect them.

What differs from OpenAI's own: `temperature` defaults to 1 as there, `seed` is drawn where it is missing, and with
`n` choice j > 0 gets a seed derived from (seed, j), so that choice 0 is what a request without `n` would get.
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

from model.request import Likelihoods
from service import logprobs, prompt
from service.answer import Answer
from service.auth import keyed
from service.body import read_json
from service.deps import identified, service_of
from service.errors import BadRequest, ServiceError
from service.schemas import openai
from service.schemas.sampling import sampling_params, unknown_model
from service.stream import DONE, EventStream, Last, UnlessGone, event, json_response
from service.usage import usage

DEFAULT_TEMPERATURE = 1.0


@identified("chatcmpl-")
@keyed
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        answer = resources.enter_context(Answer(service, request.state.id, key=request.state.key))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        ask = await read_json(upload, openai.ChatRequest, service.settings)
        openai.check(ask, service.settings)
        params = sampling_params(ask, service.settings, default_temperature=DEFAULT_TEMPERATURE)
        n = ask.n or 1
        if n > service.most_choices:
            raise BadRequest(f"n must be at most {service.most_choices}", param="n")
        answer.take_slots(n)
        preparing = upload.used_by(prompt.from_chat(service, ask, upload))
        resources.enter_context(UnlessGone(request.receive))
        options = ask.stream_options or openai.StreamOptions()
        with_usage = bool(options.include_usage)
        running = with_usage and bool(options.continuous_usage_stats)
        fit = ask.asked_max_tokens() is None
        stream, speculation = ask.stream, ask.speculation
        del ask  # the media in it
        await answer.begin(preparing, params, n=n, speculation=speculation, running_stats=running, fit=fit)
        if stream:
            events = _events(answer, with_usage=with_usage, running=running)
            return EventStream(
                events,
                resources.pop_all(),
                deadline=answer.deadline,
                keep_alive=service.settings.sse_keepalive_seconds,
            )
        await answer.finish()
        return json_response(_completion(answer))


@keyed
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(request)]})


@keyed
async def model(request: Request) -> Response:
    name = request.path_params["name"]
    if not name:
        raise HTTPException(404)
    settings = service_of(request).settings
    if name != settings.model_name:
        raise unknown_model(name, settings)
    return json_response(_model(request))


def _completion(answer: Answer) -> dict[str, Any]:
    return {
        **_head(answer, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(answer.choices)
        ],
        "usage": usage(answer.stats),
    }


async def _events(answer: Answer, *, with_usage: bool, running: bool) -> AsyncGenerator[bytes, None]:
    """A chunk that opens each choice, one per output, one that closes each choice; then usage, where asked for.
    running: usage so far in every chunk, the opening ones included."""
    head = _head(answer, "chat.completion.chunk") | ({"usage": None} if with_usage else {})

    def chunk(
        index: int, delta: dict[str, str], finish_reason: str | None = None, said: Seq[Likelihoods] | None = None
    ) -> bytes:
        if running:
            head["usage"] = usage(answer.stats)
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(said), "finish_reason": finish_reason}
        return event({**head, "choices": [choice]})

    for index in range(len(answer.choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    last = b""
    try:
        async for index, output in answer.outputs():
            # A token whose text is still to come has its log-probability told all the same.
            new = output.text or output.logprobs
            said = chunk(index, {"content": output.text}, said=output.logprobs) if new else b""
            if output.finish_reason is not None:
                said += chunk(index, {}, output.finish_reason)
            if answer.ended:
                last = said
            elif said:
                yield said
        if with_usage:
            last += event({**head, "choices": [], "usage": usage(answer.stats)})
        yield Last(last + DONE)
    except ServiceError as error:
        yield Last(event(error.envelope()) + DONE)


def _logprobs(tokens: Seq[Likelihoods] | None) -> dict[str, Any] | None:
    return {"content": logprobs.told(tokens), "refusal": None} if tokens else None


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def _model(request: Request) -> dict[str, Any]:
    service = service_of(request)
    info = service.pool.info
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(request.app.state.started),
        "owned_by": "flashserve",
        "root": service.settings.model_name,  # this, the next and the last but one as vLLM tells them
        "parent": None,
        "permission": [],
        "max_model_len": info.max_model_len if info else None,
    }


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
]
