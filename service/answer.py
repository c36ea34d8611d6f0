"""One client request from the door to its last token: deadline, choices, times, and the account at the end.

Knows nothing of how answers are written down: routes turn its outputs into JSON or events.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, cast

from starlette.requests import ClientDisconnect

from model.request import FinishReason, Likelihoods, RequestOutput, RequestStats, SamplingParams
from service.errors import BadRequest, EngineFailure, ServiceError, TimedOut
from service.log import fields
from service.pool.generation import Event, Generation
from service.pool.messages import Submit
from service.prompt import Prompt
from service.schemas.sampling import seed_of_choice
from service.state import Service

log = logging.getLogger("flashserve.request")

NO_STATS = RequestStats(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


@dataclass
class Choice:
    generation: Generation
    finish_reason: FinishReason | None = None
    stats: RequestStats = NO_STATS
    num_tokens: int = 0
    num_first_tokens: int = 0  # that came together, in the first output
    first_at: float | None = None
    last_at: float = 0.0
    logprobs: list[Likelihoods] = field(default_factory=list)  # one for every token, where they are asked for

    @property
    def text(self) -> str:
        return self.generation.text

    @property
    def decode_seconds(self) -> float:
        return 0.0 if self.first_at is None else self.last_at - self.first_at

    @property
    def seconds_per_token(self) -> float | None:
        """Of the tokens after the first output: those in it cost no decoding that could be seen."""
        later = self.num_tokens - self.num_first_tokens
        return self.decode_seconds / later if later > 0 else None

    def take(self, output: RequestOutput, now: float) -> None:
        if output.tokens:
            self.last_at = now
            if self.first_at is None:
                self.first_at, self.num_first_tokens = now, len(output.tokens)
            self.num_tokens += len(output.tokens)
            self.logprobs += output.logprobs or ()
        self.stats = output.stats or self.stats
        self.finish_reason = output.finish_reason or self.finish_reason


class Answer:
    """A context: on leaving it, whatever still runs is aborted, the slots are free and the request is on record."""

    def __init__(self, service: Service, request_id: str, *, key: str | None) -> None:
        """Asks for admission before body, media and work; raises NoCapacity or ClientLimit. Its slots come later."""
        self.id = request_id
        self.created = int(time.time())
        self.model = service.settings.model_name
        self.choices: list[Choice] = []
        self.media_seconds = 0.0
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + service.settings.request_timeout
        self._service = service
        self._arrived = time.monotonic()
        self._slots = service.admission.enter(key)
        self._salt = hashlib.sha256(key.encode()).hexdigest() if key else ""
        self._outputs: deque[tuple[int, RequestOutput]] = deque()  # of any choice, not yet read
        self._waiter: asyncio.Future[None] | None = None  # for more, while there is none
        self._num_media = 0
        self._error: BaseException | None = None
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cut: ServiceError | None = None  # the task was cancelled for this
        # One alarm for all events: a timeout around each would cost more than the event.
        self._alarm = self._loop.call_at(self.deadline, self._ring)
        service.answers.add(self)

    @property
    def ended(self) -> bool:
        """Whether every choice has said its last."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def stats(self) -> list[RequestStats]:
        """Of every choice: at its end, or so far."""
        return [choice.stats for choice in self.choices]

    def take_slots(self, number: int) -> None:
        """Before any media; raises NoCapacity or ClientLimit."""
        self._slots.take(number)

    async def begin(
        self,
        preparing: Awaitable[Prompt],
        params: SamplingParams,
        *,
        n: int,
        speculation: Literal["auto", "off"] | None,
        running_stats: bool = False,
        fit: bool = False,
    ) -> None:
        """Hand it to the engine; returns with its first word, so that refusals and early failures come before a 200.

        running_stats: whether choices have their `stats` from their first output on, not only at their end; fit:
        whether max_tokens may be lowered to what there is room for."""
        try:
            async with asyncio.timeout_at(self.deadline):
                prompt = await preparing
        except TimeoutError:
            self._error = self._timed_out()
            raise self._error from None
        self.media_seconds, self._num_media = prompt.seconds, prompt.num_media
        for index in range(n):
            own = params if index == 0 else replace(params, seed=seed_of_choice(params.seed, index))
            name, speculates = f"{self.id}-{index}", speculation != "off"
            submit = Submit(name, prompt.messages, own, speculates, running_stats, self._salt, fit)
            self.choices.append(Choice(self._service.pool.submit(submit, partial(self._deliver, index))))
        await self._has_news()
        index, output = self._outputs[0]
        if output.stats is not None:  # from now on the prompt's length is known, of every choice
            opening = replace(NO_STATS, prompt_tokens=output.stats.prompt_tokens)
            for choice in self.choices:
                choice.stats = opening
            self.choices[index].stats = replace(opening, cached_tokens=output.stats.cached_tokens)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """What the engine says, choice by choice as it comes, to the end of all; raises where one cannot be ended."""
        while not self.ended:
            await self._has_news()
            index, output = self._outputs.popleft()
            self._take(self.choices[index], output)
            yield index, output

    async def finish(self) -> None:
        async for _ in self.outputs():
            pass

    def end(self, error: ServiceError) -> None:
        """From outside: whatever it waits for, the client's body, media or the engine, it gets this error instead."""
        if self.choices:
            self._deliver(0, error)
        elif self._cut is None:  # each cancellation would have to be taken back
            self._error = self._cut = error
            self._task.cancel()

    def time_to_first_token(self, choice: Choice) -> float:
        return 0.0 if choice.first_at is None else choice.first_at - self._arrived

    def _deliver(self, index: int, event: Event) -> None:
        if isinstance(event, ServiceError):
            self._error = self._error or event
        else:
            self._outputs.append((index, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _has_news(self) -> None:
        """Returns when there is an output to be read; raises the error after which there will be none."""
        # An asyncio.Queue would look up the running loop for every output, which takes a system call.
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter

    def _ring(self) -> None:
        self._deliver(0, self._timed_out())

    def _timed_out(self) -> TimedOut:
        return TimedOut(f"not done within {self._service.settings.request_timeout:g} s")

    def _take(self, choice: Choice, output: RequestOutput) -> None:
        was_first = choice.first_at is None
        choice.take(output, time.monotonic())
        if was_first and choice.first_at is not None:
            self._service.metrics.first_token(self.time_to_first_token(choice))
        if choice.finish_reason is not None:
            self._slots.give_back(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._alarm.cancel()
        self._service.answers.discard(self)
        for choice in self.choices:
            if choice.finish_reason is None:
                self._service.pool.abort(choice.generation)
        self._slots.leave()
        self._record(_outcome(self._error or error))
        # As in UnlessGone: of the cancellation nothing is left, unless somebody else asked for one too.
        if self._cut is not None and isinstance(error, asyncio.CancelledError) and not self._task.uncancel():
            raise self._cut from None

    def _record(self, outcome: str) -> None:
        """`outcome` is that of the choices which did not end by themselves."""
        metrics, latency = self._service.metrics, time.monotonic() - self._arrived
        taken = [] if isinstance(self._error, BadRequest) else self.choices
        if taken and outcome == "refused":
            outcome = "error"  # the workers went away under it
        for choice in taken:
            metrics.answered(choice.finish_reason or outcome, latency, choice.seconds_per_token)
            if choice.finish_reason is not None:
                metrics.queued(choice.stats.queue)
        if not taken and outcome != "refused":
            metrics.answered(outcome, latency, None)
        if not log.isEnabledFor(logging.INFO):
            return
        stats = [choice.stats for choice in taken]
        log.info(
            "request %s",
            fields(
                id=self.id,
                outcome=",".join(choice.finish_reason or outcome for choice in taken) or outcome,
                media=self._num_media,
                prompt_tokens=max((one.prompt_tokens for one in stats), default=0),
                completion_tokens=sum(choice.num_tokens for choice in taken),
                drafts=sum(one.drafts for one in stats),
                accepted_tokens=sum(one.accepted_tokens for one in stats),
                media_seconds=self.media_seconds,
                queue=max((one.queue for one in stats), default=0.0),
                time_to_first_token=self.time_to_first_token(taken[0]) if taken else None,
                seconds=latency,
            ),
        )


def _outcome(error: BaseException | None) -> str:
    if isinstance(error, TimedOut | TimeoutError):
        return "timeout"
    if isinstance(error, EngineFailure):
        return "error"
    if isinstance(error, ServiceError):
        return "refused"
    gone = error is None or isinstance(error, ClientDisconnect) or not isinstance(error, Exception)
    return "abort" if gone else "error"
