"""One client request from admission to its last token: reservation, deadline, choices, timings, log line and metrics.

Knows nothing of response formats: routes turn its outputs into JSON or events.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, cast

from starlette.requests import ClientDisconnect, Request

from model.request import RequestOutput, RequestStats, SamplingParams
from service.chat_input import ChatInput
from service.errors import BadRequest, EngineFailure, ServiceError, TimedOut
from service.log import fields
from service.pool.generation import Event
from service.pool.messages import Submit
from service.request_record import NO_STATS, Choice, RequestRecord
from service.schemas.sampling import seed_of_choice
from service.state import Service
from service.trace_context import TraceContext

log = logging.getLogger("flashserve.request")


class RequestContext:
    """A context manager: on exit whatever still runs is aborted, its reservation is released and it is logged."""

    def __init__(self, service: Service, request: Request) -> None:
        """Ask for admission, before the body is read. request: with the state that `with_request_id` and
        `require_api_key` set. Raises NoCapacity or ClientLimit."""
        key: str | None = request.state.key
        self.id: str = request.state.id  # of the answer; unique
        self.request_id: str = request.state.request_id  # the client's own, where it sent one
        self.trace: TraceContext | None = request.state.trace
        self.route = request.url.path
        self.created = int(time.time())
        self.model = service.settings.model_name
        self.choices: list[Choice] = []
        self.media_seconds = 0.0
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + service.settings.request_timeout
        self.keep_alive = (
            service.settings.sse_keepalive_seconds
        )  # seconds of silence before a stream sends a comment; 0: never
        self._service = service
        self._arrived = time.monotonic()
        self._load_at: float | None = None
        self._loaded_at: float | None = None
        self._submitted_at: float | None = None
        self._reservation = service.admission.enter(key)
        self._decoded = service.decoded_media.open()
        self._num_reserved = 0
        self._key = key or ""
        self._outputs: deque[tuple[int, RequestOutput]] = deque()  # (choice, output), not yet read
        self._waiter: asyncio.Future[None] | None = None  # set while a reader waits for outputs
        self._num_media = 0
        self._num_prompts = 1
        self._error: BaseException | None = None
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelled_for: ServiceError | None = None  # why `end` cancelled the task
        # One timer for all events: a timeout around each would cost more than the event.
        self._timer = self._loop.call_at(self.deadline, self._on_deadline)
        service.requests.add(self)

    @property
    def finished(self) -> bool:
        """Whether every choice has its last output."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def stats(self) -> list[RequestStats]:
        """The statistics of every choice so far."""
        return [choice.stats for choice in self.choices]

    def reserve(self, number: int) -> None:
        """Reserve capacity for so many choices, before any media is loaded. Raises NoCapacity or ClientLimit."""
        self._reservation.add(number)
        self._num_reserved += number

    def count_decoded(self, num_bytes: int) -> None:
        """Count a decoded medium, which every choice has its own copy of. Raises TooLarge and NoCapacity."""
        self._decoded.add(num_bytes * self._num_reserved)

    @asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """Raise TimedOut at the deadline, while media are loaded. `submit` and `outputs` keep it by themselves."""
        self._load_at = time.monotonic()
        try:
            async with asyncio.timeout_at(self.deadline):
                yield
            self._loaded_at = time.monotonic()
        except TimeoutError:
            self._error = self._timed_out()
            raise self._error from None

    async def submit(
        self,
        chat: ChatInput,
        params: SamplingParams,
        *,
        n: int,
        speculation: Literal["auto", "off"] | None,
        running_stats: bool = False,
        clamp_max_tokens: bool = False,
        cache_salt: str | None = None,
        own_seeds: bool = False,
    ) -> None:
        """Send `n` choices of each prompt to the engine and wait for the first output, so that refusals come before a
        status of 200.

        running_stats: give choices their `stats` from their first output on, not only at their end; clamp_max_tokens:
        lower max_tokens to what fits the model's context; cache_salt: caches are shared only with requests of the same,
        and of the same key; own_seeds: no choice has the seed of another prompt's.
        """
        self.media_seconds, self._num_media = chat.seconds, chat.num_media
        salt = _salt(self._key, cache_salt or "")
        self._num_prompts = len(chat.prompts) or 1
        self._submitted_at = time.monotonic()
        for index in range(n * self._num_prompts):
            variant = index if own_seeds else index % n
            message = Submit(
                f"{self.id}-{index}",
                chat.messages,
                params if variant == 0 else replace(params, seed=seed_of_choice(params.seed, variant)),
                speculation != "off",
                running_stats,
                salt,
                clamp_max_tokens,
                chat.template,
                chat.prompts[index // n] if chat.prompts else None,
            )
            self.choices.append(Choice(self._service.pool.submit(message, partial(self._deliver, index))))
        await self._wait_for_output()
        index, output = self._outputs[0]
        if output.stats is not None:  # the prompt's length is the same for every choice of it
            opening = replace(NO_STATS, prompt_tokens=output.stats.prompt_tokens)
            first = index // n * n
            for choice in self.choices[first : first + n]:
                choice.stats = opening
            self.choices[index].stats = replace(opening, cached_tokens=output.stats.cached_tokens)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield (choice, output) until every choice is finished. Raises the error that ends the request early."""
        while not self.finished:
            await self._wait_for_output()
            index, output = self._outputs.popleft()
            self._count(self.choices[index], output)
            yield index, output

    async def finish(self) -> None:
        """Wait until every choice is finished."""
        async for _ in self.outputs():
            pass

    def end(self, error: ServiceError) -> None:
        """End the request with an error from outside, whether it waits for its body, media or the engine."""
        if self.choices:
            self._deliver(0, error)
        elif self._cancelled_for is None:  # each cancellation must be undone once
            self._error = self._cancelled_for = error
            self._task.cancel()

    def time_to_first_token(self, choice: Choice) -> float:
        return 0.0 if choice.first_at is None else choice.first_at - self._arrived

    def _deliver(self, index: int, event: Event) -> None:
        """Queue an event of a choice and wake the reader."""
        if isinstance(event, ServiceError):
            if event.param == "prompt" and self._num_prompts > 1:
                event.param = f"prompt[{index * self._num_prompts // len(self.choices)}]"
            self._error = self._error or event
        else:
            self._outputs.append((index, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait_for_output(self) -> None:
        """Wait until there is an output to read. Raises the error after which there will be none."""
        # An asyncio.Queue would look up the running loop for every output, which takes a system call.
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter

    def _on_deadline(self) -> None:
        self._deliver(0, self._timed_out())

    def _timed_out(self) -> TimedOut:
        return TimedOut(f"the request took longer than {self._service.settings.request_timeout:g} s")

    def _count(self, choice: Choice, output: RequestOutput) -> None:
        first_at, last_at = choice.first_at, choice.last_at
        choice.add(output, time.monotonic())
        if output.tokens and first_at is None:
            self._service.metrics.first_output(self.time_to_first_token(choice))
        elif output.tokens:
            self._service.metrics.next_output(choice.last_at - last_at)
        if choice.finish_reason is not None:
            self._reservation.release(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._timer.cancel()
        self._service.requests.discard(self)
        for choice in self.choices:
            if choice.finish_reason is None:
                self._service.pool.abort(choice.generation)
        self._decoded.close()
        self._reservation.leave()
        self._record(self._error or error)
        # As in cancel_on_disconnect: undo the cancellation, unless somebody else requested one too.
        if self._cancelled_for and isinstance(error, asyncio.CancelledError) and not self._task.uncancel():
            raise self._cancelled_for from None

    def _record(self, error: BaseException | None) -> None:
        """Log the request, count its answers and trace it. error: what ended it early."""
        outcome = _outcome(error)
        choices = [] if isinstance(self._error, BadRequest) else self.choices
        if choices and outcome == "refused":
            outcome = "error"  # its workers were lost
        finished = bool(choices) and self.finished
        record = RequestRecord(
            id=self.id,
            client_id=None if self.request_id == self.id else self.request_id,
            route=self.route,
            trace=self.trace,
            arrived=self._arrived,
            load_at=self._load_at,
            loaded_at=self._loaded_at,
            submitted_at=self._submitted_at,
            ended=time.monotonic(),
            outcome=outcome,
            error=None if finished else (isinstance(error, ServiceError) and error.code) or outcome,
            choices=choices,
            num_prompts=self._num_prompts,
            num_media=self._num_media,
            media_seconds=self.media_seconds,
        )
        self._service.metrics.request_ended(record)
        if self._service.tracer is not None:
            self._service.tracer.request_ended(record)
        if log.isEnabledFor(logging.INFO):
            _log(record)


def _log(record: RequestRecord) -> None:
    """Log a request in one line, without what it said."""
    stats = [choice.stats for choice in record.choices]
    outcomes = [choice.finish_reason or record.outcome for choice in record.choices]
    log.info(
        "request %s",
        fields(
            id=record.id,
            request_id=record.client_id,
            trace_id=record.trace and record.trace.trace_id,
            outcome=",".join(outcomes) or record.outcome,
            media=record.num_media,
            prompt_tokens=max((one.prompt_tokens for one in stats), default=0),
            completion_tokens=sum(choice.num_tokens for choice in record.choices),
            drafts=sum(one.drafts for one in stats),
            accepted_tokens=sum(one.accepted_tokens for one in stats),
            media_seconds=record.media_seconds,
            queue=max((one.queue for one in stats), default=0.0),
            time_to_first_token=record.time_to_first_token,
            seconds=record.latency,
        ),
    )


def _salt(key: str, cache_salt: str) -> str:
    """Return what separates the caches of this key and salt from all others; "" without either."""
    own = hashlib.sha256(key.encode()).hexdigest() if key else ""
    return hashlib.sha256(f"{own}|{cache_salt}".encode()).hexdigest() if cache_salt else own


def _outcome(error: BaseException | None) -> str:
    """Return the outcome for log and metrics: timeout, error, refused or abort."""
    if isinstance(error, TimedOut | TimeoutError):
        return "timeout"
    if isinstance(error, EngineFailure):
        return "error"
    if isinstance(error, ServiceError):
        return "refused"
    gone = error is None or isinstance(error, ClientDisconnect) or not isinstance(error, Exception)
    return "abort" if gone else "error"
