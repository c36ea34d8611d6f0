"""POST /v1/completions: OpenAI's older API, which continues raw prompts: texts or token ids, without media.

Choice j of prompt p is choice p * n + j of the answer. It is what it would be if its prompt were sent alone, with the
request's seed; without a seed every choice has its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import RequestOutput, TemplateOptions
from service.auth import require_api_key
from service.body import read_json
from service.chat_input import ChatInput
from service.deps import service_of, with_request_id
from service.errors import BadRequest, ServiceError
from service.logprobs import TextLogprobs
from service.openapi.operation import Operation
from service.request_context import RequestContext
from service.schemas import completions as schema
from service.schemas.answers import Completion, CompletionChoice, CompletionLogprobs
from service.schemas.sampling import max_prompt_tokens, sampling_params
from service.state import Service
from service.stream import DONE, EventStream, LastEvent, cancel_on_disconnect, event, json_response
from service.usage import usage

DEFAULT_TEMPERATURE = 1.0


@with_request_id("cmpl-")
@require_api_key
async def completions(request: Request) -> Response:
    service = service_of(request)
    with ExitStack() as resources:
        context = resources.enter_context(RequestContext(service, request))
        with service.uploads.open(request, request.state.key) as upload:
            body = await read_json(upload, schema.CompletionRequest, service.settings)
        schema.check(body, service.settings)
        prompts = schema.prompts(body, service.settings)
        params = sampling_params(body, service.settings, default_temperature=DEFAULT_TEMPERATURE)
        n = body.n or 1
        _check_number(service, n, len(prompts))
        template = TemplateOptions(
            add_special_tokens=body.add_special_tokens is not False,
            max_tokens=max_prompt_tokens(body, service.pool.info, params.max_tokens),
        )
        context.reserve(n * len(prompts))
        resources.enter_context(cancel_on_disconnect(request.receive))
        async with context.time_limit():
            echoed = [await _text(service, prompt) if body.echo else "" for prompt in prompts]
            token_ids = [await _token_ids(service, prompt, template) for prompt in prompts if body.return_token_ids]
        with_usage, running_stats = body.with_usage()
        await context.submit(
            ChatInput((), 0, 0.0, prompts=prompts, template=template),
            params,
            n=n,
            speculation=body.speculation,
            running_stats=running_stats,
            clamp_max_tokens=body.max_tokens is None,
            own_seeds=body.seed is None,
            cache_salt=body.cache_salt,
        )
        answer = _Answer(
            context,
            [echoed[index // n] for index in range(n * len(prompts))],
            len(prompts),
            prompt_token_ids=[token_ids[index // n] for index in range(n * len(token_ids))],
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
        )
        if body.stream:
            return EventStream(
                _events(answer, with_usage=with_usage, running_stats=running_stats), resources.pop_all(), context
            )
        return json_response(await answer.whole())


def _check_number(service: Service, n: int, num_prompts: int) -> None:
    """Raise BadRequest for more choices than could ever run and wait together."""
    if n > service.max_choices:
        raise BadRequest(f"n must be at most {service.max_choices}", param="n")
    if n * num_prompts > service.max_parallel:
        times = f" with n {n}" if n > 1 else ""
        raise BadRequest(
            f"{num_prompts} prompts{times} are {n * num_prompts} answers; at most {service.max_parallel} are possible "
            "at once: send several requests",
            param="prompt",
        )


async def _text(service: Service, prompt: schema.Prompt) -> str:
    """Return the text of a prompt, to be sent back before the answer."""
    try:
        return prompt if isinstance(prompt, str) else await service.pool.detokenize(prompt)
    except BadRequest as error:
        raise BadRequest(error.message.replace("tokens", "prompt", 1), param="prompt", code=error.code) from None


async def _token_ids(service: Service, prompt: schema.Prompt, template: TemplateOptions) -> list[int]:
    """Return the tokens of a prompt as the model reads it."""
    return list((await service.pool.tokenize(template=template, prompt=prompt)).ids)


class _Answer:
    """Renders what a request answers, whole or in chunks."""

    def __init__(
        self,
        context: RequestContext,
        echoed: list[str],
        num_prompts: int,
        *,
        prompt_token_ids: list[list[int]],
        tokens_as_ids: bool,
    ) -> None:
        """echoed: of each choice, the prompt's text, where it is wanted before the answer; prompt_token_ids: of each
        choice, if token ids are wanted; tokens_as_ids: whether log-probabilities name tokens by their ids."""
        self.context = context
        self.echoed = echoed
        self.prompt_token_ids = prompt_token_ids
        self._num_prompts = num_prompts
        self._logprobs = [TextLogprobs(len(text), as_ids=tokens_as_ids) for text in echoed]

    async def whole(self) -> Completion:
        """Wait until every choice is finished and return the answer."""
        columns: dict[int, list[CompletionLogprobs]] = {}
        token_ids: list[list[int]] = [[] for _ in self.context.choices]
        async for index, output in self.context.outputs():
            if self.prompt_token_ids:
                token_ids[index] += [token.id for token in output.tokens]
            if (part := self.logprobs(index, output)) is not None:
                columns.setdefault(index, []).append(part)
        choices: list[CompletionChoice] = [
            {
                "index": index,
                "text": self.echoed[index] + choice.text,
                "logprobs": _joined(columns[index]) if index in columns else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.context.choices)
        ]
        if self.prompt_token_ids:
            for each, prompt_ids, ids in zip(choices, self.prompt_token_ids, token_ids, strict=True):
                each["prompt_token_ids"], each["token_ids"] = prompt_ids, ids
        return self.completion(choices, with_usage=True)

    def completion(self, choices: list[CompletionChoice], *, with_usage: bool | None) -> Completion:
        """Return an answer or chunk. with_usage: None: without the field."""
        context = self.context
        head: Completion = {
            "id": context.id,
            "object": "text_completion",
            "created": context.created,
            "model": context.model,
            "choices": choices,
        }
        if with_usage is not None:
            head["usage"] = usage(context.stats, self._num_prompts) if with_usage else None
        return head

    def logprobs(self, index: int, output: RequestOutput) -> CompletionLogprobs | None:
        return self._logprobs[index].add(output.tokens, output.logprobs) if output.logprobs else None


def _joined(parts: Seq[CompletionLogprobs]) -> CompletionLogprobs:
    """Join the columns of an answer's parts."""
    return {
        "tokens": [token for part in parts for token in part["tokens"]],
        "token_logprobs": [logprob for part in parts for logprob in part["token_logprobs"]],
        "top_logprobs": [top for part in parts for top in part["top_logprobs"]],
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
    }


async def _events(answer: _Answer, *, with_usage: bool, running_stats: bool) -> AsyncGenerator[bytes, None]:
    """Yield a chunk per echoed prompt, one per output, then one with the usage, if requested.

    running_stats: put the usage so far into every chunk.
    """
    context = answer.context
    usage_of_chunks: Literal[True, False] | None = running_stats if with_usage else None

    def chunk(choice: CompletionChoice) -> bytes:
        return event(answer.completion([choice], with_usage=usage_of_chunks))

    for index, text in enumerate(answer.echoed):
        opening: CompletionChoice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if answer.prompt_token_ids:
            opening["prompt_token_ids"], opening["token_ids"] = answer.prompt_token_ids[index], []
        if text or answer.prompt_token_ids:
            yield chunk(opening)
    last = b""
    try:
        async for index, output in context.outputs():
            if not (output.text or output.logprobs or output.finish_reason or answer.prompt_token_ids):
                continue
            choice: CompletionChoice = {
                "index": index,
                "text": output.text,
                "logprobs": answer.logprobs(index, output),
                "finish_reason": output.finish_reason,
            }
            if answer.prompt_token_ids:
                choice["token_ids"] = [token.id for token in output.tokens]
            part = chunk(choice)
            if context.finished:
                last = part
            else:
                yield part
        if with_usage:
            last += event(answer.completion([], with_usage=True))
        yield LastEvent(last + DONE)
    except ServiceError as error:
        yield LastEvent(event(error.envelope()) + DONE)


ROUTES = [Route("/v1/completions", completions, methods=["POST"])]
OPERATIONS = [
    Operation(
        "post",
        "/v1/completions",
        "Continue raw prompts, as OpenAI's older API",
        {200: Completion},
        "Generate",
        "Texts or token ids, without a chat template and without media.",
        body=schema.CompletionRequest,
        events=(Completion,),
        not_supported=schema.NOT_BUILT,
        without_effect=("user",),
        example={"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0},
    )
]
