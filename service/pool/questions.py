"""Ask workers questions that need no decoding, and ask another one where a worker dies meanwhile.

Knows nothing of media or tokens: it carries questions to a worker and answers back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from service.errors import BadRequest, EngineFailure, NoCapacity
from service.pool import messages as m
from service.pool.supervisor import Worker

Reply = TypeVar("Reply", m.Sampled, m.Tokenized, m.Detokenized)


class Questions:
    """Questions to workers that are not answered yet."""

    def __init__(self, choose_worker: Callable[[], Worker | None], *, max_attempts: int) -> None:
        """choose_worker: returns a ready worker, or None while there is none; max_attempts: how many workers may die of
        one question."""
        self._choose_worker = choose_worker
        self._max_attempts = max_attempts
        self._numbers = count()
        self._open: dict[int, tuple[Worker, asyncio.Future[m.Reply | None]]] = {}  # None: the worker died
        self._waiting: set[asyncio.Future[None]] = set()  # resolved when a worker may be free, or none is left

    async def ask(self, task: str, question: Callable[[int], m.Question], reply: type[Reply]) -> Reply:
        """Send a question to a worker and return the reply.

        task: names the work in errors; question: builds the question from its number; reply: type of the reply.
        Raises BadRequest where the target refuses, EngineFailure where the engine fails or workers die of it, and what
        `choose_worker` raises.
        """
        for _ in range(self._max_attempts):
            while (worker := self._choose_worker()) is None:
                await self._wait_for_change()
            number = next(self._numbers)
            future: asyncio.Future[m.Reply | None] = asyncio.get_running_loop().create_future()
            self._open[number] = worker, future
            try:
                worker.send(question(number))
                answer = await future
            finally:
                del self._open[number]
            if isinstance(answer, reply):
                return answer
            if isinstance(answer, m.NotAnswered) and answer.reason is not None:
                raise BadRequest(answer.reason, param=answer.param, code=answer.code)
            if answer is not None:
                raise EngineFailure(f"the engine failed to {task}")
        raise EngineFailure(f"every worker that was to {task} died", code="worker_died")

    def waits_for(self, worker: Worker) -> bool:
        """Return whether a worker has a question to answer."""
        return any(each is worker for each, _ in self._open.values())

    def on_reply(self, reply: m.Reply) -> None:
        """Pass a reply on, unless nobody waits for it any more."""
        if (question := self._open.get(reply.number)) is not None and not question[1].done():
            question[1].set_result(reply)

    def on_death(self, worker: Worker) -> None:
        """Send the questions of a dead worker to another."""
        for each, future in self._open.values():
            if each is worker and not future.done():
                future.set_result(None)

    def on_change(self) -> None:
        """Look for a worker again: one may have become free, or none can come back."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def fail_all(self, error: NoCapacity) -> None:
        """End every question with an error."""
        futures: list[asyncio.Future[Any]] = [*(future for _, future in self._open.values()), *self._waiting]
        for future in futures:
            if not future.done():
                future.set_exception(NoCapacity(error.message, code=error.code))

    async def _wait_for_change(self) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
