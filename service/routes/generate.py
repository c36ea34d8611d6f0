"""POST /v1/generate: media as uploaded files, and answers that tell where each token came from.

Unlike OpenAI's route it is greedy unless a `temperature` is given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import Likelihoods
from service import logprobs, prompt
from service.answer import Answer
from service.auth import keyed
from service.body import read_form
from service.deps import identified, service_of
from service.errors import ServiceError
from service.schemas import generate as schema
from service.schemas.sampling import sampling_params
from service.stream import DONE, EventStream, Last, UnlessGone, event, json_response
from service.usage import speculation, timings, usage

DEFAULT_TEMPERATURE = 0.0
MAX_FIELDS = 64


@identified("gen-")
@keyed
async def generate(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        answer = resources.enter_context(Answer(service, request.state.id, key=request.state.key))
        upload = resources.enter_context(service.uploads.open(request, request.state.key))
        form = await read_form(upload, service.settings, max_files=service.settings.max_media, max_fields=MAX_FIELDS)
        ask, files = schema.read(form, service.settings)
        params = sampling_params(ask, service.settings, default_temperature=DEFAULT_TEMPERATURE)
        answer.take_slots(1)
        preparing = upload.used_by(prompt.from_form(service, ask, files, upload.client))
        del form, files  # the media in them
        resources.enter_context(UnlessGone(request.receive))
        await answer.begin(preparing, params, n=1, speculation=ask.speculation, fit=ask.asked_max_tokens() is None)
        if ask.stream:
            return EventStream(
                _events(answer),
                resources.pop_all(),
                deadline=answer.deadline,
                keep_alive=service.settings.sse_keepalive_seconds,
            )
        await answer.finish()
        return json_response(_result(answer))


def _result(answer: Answer) -> dict[str, Any]:
    (choice,) = answer.choices
    return {
        "id": answer.id,
        "model": answer.model,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        **_logprobs(choice.logprobs),
        "usage": usage(answer.stats),
        "speculation": speculation(choice.stats),
        "timings": timings(
            queue=choice.stats.queue,
            media=answer.media_seconds,
            time_to_first_token=answer.time_to_first_token(choice),
            decode=choice.decode_seconds,
            seconds_per_token=choice.seconds_per_token,
        ),
    }


async def _events(answer: Answer) -> AsyncGenerator[bytes, None]:
    last = b""
    try:
        async for _, output in answer.outputs():
            if output.tokens or output.text:
                more = _logprobs(output.logprobs)
                said = event({"type": "token", "text": output.text, "tokens": output.tokens, **more})
                if answer.ended:
                    last = said
                else:
                    yield said
        yield Last(last + event({"type": "done", **_result(answer)}))
    except ServiceError as error:
        yield Last(event(error.envelope()) + DONE)


def _logprobs(tokens: Seq[Likelihoods] | None) -> dict[str, Any]:
    """Of every token, where they are asked for; where not, there is no such field."""
    return {"logprobs": logprobs.told(tokens)} if tokens else {}


ROUTES = [Route("/v1/generate", generate, methods=["POST"])]
