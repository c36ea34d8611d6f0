"""Ask workers which frames of a video their target wants; ask another one where a worker dies meanwhile.

Knows nothing of media: it carries metadata to a worker and indices back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from model.request import VideoMetadata
from service.errors import BadRequest, EngineFailure, NoCapacity
from service.pool import messages as m
from service.pool.supervisor import Worker


class FrameSampling:
    """Questions to workers that are not answered yet."""

    def __init__(self, *, max_attempts: int) -> None:
        """max_attempts: how many workers may die of one question."""
        self._max_attempts = max_attempts
        self._numbers = count()
        self._questions: dict[int, tuple[Worker, asyncio.Future[m.SampleReply | None]]] = {}  # None: the worker died
        self._waiting: set[asyncio.Future[None]] = set()  # resolved when a worker may be free, or none is left

    async def sample(
        self,
        source: VideoMetadata,
        num_frames: int | None,
        fps: float | None,
        choose_worker: Callable[[], Worker | None],
    ) -> Sequence[int] | None:
        """Return the indices of the frames that the target wants of a video; None where it leaves that to the caller.

        choose_worker: returns a ready worker, or None while there is none. Raises BadRequest where the target's
        processor refuses, EngineFailure where workers die of it, and what `choose_worker` raises.
        """
        for _ in range(self._max_attempts):
            while (worker := choose_worker()) is None:
                await self._wait_for_change()
            number = next(self._numbers)
            future: asyncio.Future[m.SampleReply | None] = asyncio.get_running_loop().create_future()
            self._questions[number] = worker, future
            try:
                worker.send(m.Sample(number, source, num_frames, fps))
                reply = await future
            finally:
                del self._questions[number]
            if isinstance(reply, m.Sampled):
                return reply.indices
            if reply is not None and reply.reason is not None:
                raise BadRequest(reply.reason, code="not_sampled")
            if reply is not None:
                raise EngineFailure("the engine failed to choose the video's frames")
        raise EngineFailure("every worker that was to choose the video's frames died", code="worker_died")

    def waits_for(self, worker: Worker) -> bool:
        """Return whether a worker has a question to answer."""
        return any(each is worker for each, _ in self._questions.values())

    def on_reply(self, reply: m.SampleReply) -> None:
        """Pass an answer on, unless nobody waits for it any more."""
        if (question := self._questions.get(reply.number)) is not None and not question[1].done():
            question[1].set_result(reply)

    def on_death(self, worker: Worker) -> None:
        """Send the questions of a dead worker to another."""
        for each, future in self._questions.values():
            if each is worker and not future.done():
                future.set_result(None)

    def on_change(self) -> None:
        """Look for a worker again: one may have become free, or none can come back."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def fail_all(self, error: NoCapacity) -> None:
        """End every question with an error."""
        futures: list[asyncio.Future[Any]] = [*(future for _, future in self._questions.values()), *self._waiting]
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
