"""POST /v1/generate: media as uploaded files, and for each token of the context whether draft or target chose it.

Unlike OpenAI's route, greedy by default (`temperature` 0).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service import chat_input, logprobs
from service.auth import require_api_key
from service.body import read_form
from service.deps import service_of, with_request_id
from service.errors import ServiceError
from service.openapi.operation import Files, Operation
from service.request_context import RequestContext
from service.schemas import generate as schema
from service.schemas.answers import DoneEvent, Generated, GeneratedToken, TokenEvent
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
            return EventStream(_events(context), resources.pop_all(), context)
        await context.finish()
        return json_response(_result(context))


def _result(context: RequestContext) -> Generated:
    (choice,) = context.choices
    result: Generated = {
        "id": context.id,
        "model": context.model,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
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
    if choice.logprobs:
        result["logprobs"] = logprobs.to_openai(choice.logprobs)
    return result


async def _events(context: RequestContext) -> AsyncGenerator[bytes, None]:
    """Yield a `token` event per output, then one `done` event with the result."""
    last = b""
    try:
        async for _, output in context.outputs():
            if output.tokens or output.text:
                # The tokens' own form is that of GeneratedToken.
                tokens = cast("list[GeneratedToken]", output.tokens)
                step: TokenEvent = {"type": "token", "text": output.text, "tokens": tokens}
                if output.logprobs:
                    step["logprobs"] = logprobs.to_openai(output.logprobs)
                chunk = event(step)
                if context.finished:
                    last = chunk
                else:
                    yield chunk
        done: DoneEvent = {"type": "done", **_result(context)}
        yield LastEvent(last + event(done))
    except ServiceError as error:
        yield LastEvent(event(error.envelope()) + DONE)


ROUTES = [Route("/v1/generate", generate, methods=["POST"])]
OPERATIONS = [
    Operation(
        "post",
        "/v1/generate",
        "Generate from files and a prompt",
        {200: Generated},
        "Generate",
        "A form with media as files. Says for each token whether draft or target chose it. Greedy by default.",
        body=schema.GenerateRequest,
        form=Files("media", "Images and videos, in their order; they come before the prompt."),
        events=(TokenEvent, DoneEvent),
    )
]
