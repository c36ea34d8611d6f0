"""POST /v1/generate: media as uploaded files, and for each token of the context whether draft or target chose it.

Unlike OpenAI's route, greedy by default (`temperature` 0).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import TokenLogprobs
from service import chat_input, logprobs
from service.auth import require_api_key
from service.body import read_form
from service.deps import service_of, with_request_id
from service.errors import ServiceError
from service.request_context import RequestContext
from service.schemas import generate as schema
from service.schemas.sampling import check_media_options, sampling_params
from service.stream import DONE, EventStream, LastEvent, cancel_on_disconnect, event, json_response
from service.usage import speculation, timings, usage

DEFAULT_TEMPERATURE = 0.0
MAX_FIELDS = 64


@with_request_id("gen-")
@require_api_key
async def generate(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        form = await read_form(upload, service.settings, max_files=service.settings.max_media, max_fields=MAX_FIELDS)
        fields, files = schema.read(form, service.settings)
        upload.note_ignored(form.ignored)
        params = sampling_params(fields, service.settings, default_temperature=DEFAULT_TEMPERATURE)
        context.reserve(1)
        resources.enter_context(cancel_on_disconnect(request.receive))
        options = check_media_options(fields, service.settings, service.pool.info)
        async with context.time_limit():
            with upload:
                loader = service.media_loader(context.count_decoded)
                chat = await chat_input.from_form(fields.prompt, files, options, upload.client, loader)
        del form, files  # frees their media
        clamp_max_tokens = fields.requested_max_tokens() is None
        await context.submit(
            chat,
            params,
            n=1,
            speculation=fields.speculation,
            clamp_max_tokens=clamp_max_tokens,
            cache_salt=fields.cache_salt,
        )
        if fields.stream:
            return EventStream(
                _events(context),
                resources.pop_all(),
                deadline=context.deadline,
                keep_alive=service.settings.sse_keepalive_seconds,
            )
        await context.finish()
        return json_response(_result(context))


def _result(context: RequestContext) -> dict[str, Any]:
    (choice,) = context.choices
    return {
        "id": context.id,
        "model": context.model,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        **_logprobs(choice.logprobs),
        "usage": usage(context.stats),
        "speculation": speculation(choice.stats),
        "timings": timings(
            queue=choice.stats.queue,
            media=context.media_seconds,
            time_to_first_token=context.time_to_first_token(choice),
            decode=choice.decode_seconds,
            seconds_per_token=choice.seconds_per_token,
        ),
    }


async def _events(context: RequestContext) -> AsyncGenerator[bytes, None]:
    """Yield a `token` event per output, then one `done` event with the result."""
    last = b""
    try:
        async for _, output in context.outputs():
            if output.tokens or output.text:
                more = _logprobs(output.logprobs)
                chunk = event({"type": "token", "text": output.text, "tokens": output.tokens, **more})
                if context.finished:
                    last = chunk
                else:
                    yield chunk
        yield LastEvent(last + event({"type": "done", **_result(context)}))
    except ServiceError as error:
        yield LastEvent(event(error.envelope()) + DONE)


def _logprobs(tokens: Seq[TokenLogprobs] | None) -> dict[str, Any]:
    """Return the `logprobs` field, or no field where they were not requested."""
    return {"logprobs": logprobs.to_openai(tokens)} if tokens else {}


ROUTES = [Route("/v1/generate", generate, methods=["POST"])]
