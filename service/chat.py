"""A conversation's way from the request's checked body to its parsed answers, for every route that has one.

Routes turn their bodies into a ChatRequest and render a Chat; knows nothing of response formats.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from starlette.requests import Request

from model.request import ChatFormat, RequestOutput
from service import chat_input
from service.answers import grammars
from service.answers.events import Answer, Delta, ReasoningDelta
from service.answers.parser import AnswerParser
from service.answers.reasoning import ReasoningCounter
from service.deps import service_of
from service.errors import BadRequest
from service.request_context import RequestContext
from service.schemas import openai, tools
from service.schemas.answers import ChatFinishReason, Usage
from service.schemas.sampling import max_prompt_tokens, sampling_params
from service.stream import cancel_on_disconnect
from service.uploads import Upload
from service.usage import usage

DEFAULT_TEMPERATURE = 1.0


@dataclass
class Chat:
    """A conversation that the engine answers.

    stream: whether events are wanted; with_usage, running_stats: whether usage is wanted in a stream, and in every
    chunk of it.
    """

    context: RequestContext
    stream: bool
    with_usage: bool
    running_stats: bool
    parsers: list[AnswerParser]
    include_reasoning: bool = True
    as_functions: bool = False  # whether a call is answered in OpenAI's former way
    tokens_as_ids: bool = False  # whether log-probabilities name tokens by their ids
    prompt_token_ids: list[int] | None = None  # None: token ids are not wanted
    answers: list[Answer] = field(init=False)  # one per choice, as far as it has arrived
    counters: list[ReasoningCounter] = field(init=False)
    token_ids: list[list[int]] = field(init=False)  # of each choice so far, where wanted

    def __post_init__(self) -> None:
        self.answers = [Answer() for _ in self.parsers]
        self.counters = [ReasoningCounter() for _ in self.parsers]
        self.token_ids = [[] for _ in self.parsers]

    @property
    def usage(self) -> Usage:
        """The tokens of the prompt and of all choices so far."""
        return usage(self.context.stats, reasoning_tokens=sum(counter.tokens for counter in self.counters))

    async def deltas(self) -> AsyncIterator[tuple[int, list[Delta], RequestOutput]]:
        """Yield (choice, what it adds to the answer, output) until every choice is finished, then nothing. Raises the
        error that ends the request early."""
        async for index, output in self.context.outputs():
            deltas = self.parsers[index].feed(output.text)
            if output.finish_reason is not None:
                deltas += self.parsers[index].finish()
            self.counters[index].add(deltas, output)
            if not self.include_reasoning:
                deltas = [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]
            self.answers[index].add(deltas)
            if self.prompt_token_ids is not None:
                self.token_ids[index] += [token.id for token in output.tokens]
            yield index, deltas, output

    async def finish(self) -> None:
        """Wait until every choice is finished."""
        async for _ in self.deltas():
            pass

    def finish_reason(self, index: int) -> ChatFinishReason | None:
        """Return why a choice ended: as the engine says, or that it ended with calls."""
        reason = self.context.choices[index].finish_reason
        if reason != "stop" or not self.answers[index].tool_calls:
            return reason
        return "function_call" if self.as_functions else "tool_calls"


async def begin(
    request: Request,
    body: openai.ChatRequest,
    context: RequestContext,
    upload: Upload,
    resources: ExitStack,
    *,
    clamp_max_tokens: bool = False,
) -> Chat:
    """Check a body, load its media and send it to the engine; return when its first output is there. Callers keep no
    reference to the body, so that its media are freed. resources: gets what must be closed with the request;
    clamp_max_tokens: lower max_tokens to what fits, also where the client sent it.

    Raises ServiceError for whatever is refused.
    """
    service = service_of(request)
    settings = service.settings
    openai.check(body, settings)
    params = sampling_params(body, settings, default_temperature=DEFAULT_TEMPERATURE)
    offered = tools.read(body, settings)
    template = replace(
        tools.template_options(body, offered, service.chat_format),
        max_tokens=max_prompt_tokens(body, service.pool.info, params.max_tokens),
    )
    n = body.n or 1
    if n > service.max_choices:
        raise BadRequest(f"n must be at most {service.max_choices}", param="n")
    context.reserve(n)
    resources.enter_context(cancel_on_disconnect(request.receive))
    options = openai.media_options(body, settings, service.pool.info)
    async with context.time_limit():
        with upload:
            loader = service.media_loader(context.count_decoded)
            chat_in = await chat_input.from_chat(body, options, upload, loader, template)
        tokenized = await service.pool.tokenize(chat_in.messages, template=template) if body.return_token_ids else None
    chat_format = service.chat_format
    thinking = tools.thinking(template, chat_format)
    params = replace(
        params,
        grammar=grammars.of_answer(chat_format, offered, params.grammar, thinking),
        shown_tokens=_shown_tokens(chat_format, offered),
    )
    parsers = [
        AnswerParser(
            chat_format,
            offered.schemas,
            thinking=thinking == "open",
            parallel=offered.parallel,
            id=f"{context.id}/{index}",
        )
        for index in range(n)
    ]
    with_usage, running_stats = body.with_usage()
    chat = Chat(
        context,
        bool(body.stream),
        with_usage,
        running_stats,
        parsers,
        include_reasoning=body.include_reasoning is not False,
        as_functions=offered.as_functions,
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        prompt_token_ids=None if tokenized is None else list(tokenized.ids),
    )
    clamp_max_tokens = clamp_max_tokens or body.requested_max_tokens() is None
    speculation, cache_salt = body.speculation, body.cache_salt
    del body  # frees its media
    await context.submit(
        chat_in,
        params,
        n=n,
        speculation=speculation,
        running_stats=running_stats,
        clamp_max_tokens=clamp_max_tokens,
        cache_salt=cache_salt,
    )
    return chat


def _shown_tokens(chat: ChatFormat, offered: tools.Tools) -> tuple[int, ...]:
    """Return the tokens that the parser must see: those of reasoning, and where there are tools those of calls."""
    return tuple(token for text, token in chat.tokens if offered.tools or text in (chat.reasoning or ()))
