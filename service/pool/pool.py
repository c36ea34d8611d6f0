"""Dispatch requests to the least loaded worker, and move them to another one when their worker dies.

A request may be what kills its workers. One that was running when several died is a suspect: it is retried alone on a
worker, so that either only it dies or it is cleared. Suspects with the shortest answers so far are retried first, since
a fatal request seldom gets far. A suspect that dies alone on its last attempt fails, and the deaths it took part in no
longer count against other requests or the workers.

Knows requests only as `Submit` messages and their `Generation`s; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from model.request import EngineInfo, EngineStats, Message, TemplateOptions, VideoMetadata
from service.errors import BadRequest, EngineFailure, NoCapacity
from service.pool import messages as m
from service.pool.drafts import Drafts
from service.pool.generation import Event, Generation
from service.pool.questions import Questions
from service.pool.supervisor import STOP_GRACE, Death, Worker, WorkerConfig

log = logging.getLogger("flashserve.pool")

DEATHS_OF_A_SUSPECT = 2  # or fewer, with fewer retries: the last attempt is always made alone


class PoolObserver(Protocol):
    """Receives the pool's events; `Metrics` implements it."""

    def worker_up(self, worker: int, up: bool) -> None: ...
    def worker_restarting(self, worker: int) -> None: ...
    def engine_stats(self, worker: int, stats: EngineStats) -> None: ...


class Pool:
    """All engine workers behind one interface."""

    def __init__(
        self,
        configs: list[WorkerConfig],
        *,
        max_request_retries: int,
        observer: PoolObserver,
        drafts: Drafts | None = None,
    ) -> None:
        self.workers = [Worker(index, config, self) for index, config in enumerate(configs)]
        self.drafts = drafts or Drafts()
        self.worker_changed = asyncio.Event()  # set when a worker became ready or died
        self._max_attempts = 1 + max_request_retries
        self._questions = Questions(self._worker_for_question, max_attempts=self._max_attempts)
        self._deaths_of_a_suspect = min(DEATHS_OF_A_SUSPECT, max(1, max_request_retries))
        self._observer = observer
        self._generations: dict[Worker, dict[str, Generation]] = {worker: {} for worker in self.workers}
        self._parked: list[Generation] = []  # admitted, and waiting for a worker
        self._tasks: list[asyncio.Task[None]] = []

    # Called by the service

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def unrecoverable(self) -> bool:
        """Whether no worker can come back: all failed for good, or none could ever load the model (wrong settings)."""
        none_left = all(worker.state == "given_up" for worker in self.workers)
        return none_left or (self.info is None and all(worker.load_error for worker in self.workers))

    @property
    def info(self) -> EngineInfo | None:
        """What the engines report about themselves; None until the first one is loaded."""
        return next((worker.info for worker in self.workers if worker.info is not None), None)

    @property
    def load_error(self) -> str | None:
        """Why the model could not be loaded; None if it once was."""
        return None if self.info else next((worker.load_error for worker in self.workers if worker.load_error), None)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    @property
    def num_generations(self) -> int:
        return len(self._parked) + sum(map(len, self._generations.values()))

    def num_running_on(self, worker: Worker) -> int:
        return len(self._generations[worker])

    def start(self) -> None:
        self.drafts.start()
        for worker in self.workers:
            self._observer.worker_up(worker.index, False)
            self._tasks.append(asyncio.create_task(worker.supervise(), name=f"worker-{worker.index}"))

    async def stop(self) -> None:
        """Fail all requests, stop the workers and wait for them."""
        await self.drafts.stop()
        self.fail_all(NoCapacity("the server is shutting down", code="draining"))
        for worker in self.workers:
            worker.stop()
        if self._tasks:
            _, hanging = await asyncio.wait(self._tasks, timeout=STOP_GRACE)
            for task in hanging:
                task.cancel()  # still loading, or not responding: this kills the process
            await asyncio.gather(*hanging, return_exceptions=True)

    def submit(self, submit: m.Submit, deliver: Callable[[Event], None]) -> Generation:
        """Send a request to a worker, or park it until one is free; `deliver` gets its outputs."""
        generation = Generation(submit, deliver)
        self._dispatch(generation)
        return generation

    async def sample_frames(
        self, source: VideoMetadata, num_frames: int | None, fps: float | None
    ) -> Sequence[int] | None:
        """Return the indices of the frames that the target wants of a video; None where it leaves that to the caller.

        Raises what `Questions.ask` raises; a BadRequest where the target's processor refuses.
        """
        try:
            reply = await self._questions.ask(
                "choose the video's frames", lambda number: m.Sample(number, source, num_frames, fps), m.Sampled
            )
        except BadRequest as error:
            error.code = "not_sampled"
            raise
        return reply.indices

    async def tokenize(
        self,
        messages: tuple[Message, ...] = (),
        *,
        template: TemplateOptions,
        prompt: str | tuple[int, ...] | None = None,
    ) -> m.Tokenized:
        """Return the tokens of a conversation or of a text. Raises what `Questions.ask` raises."""
        return await self._questions.ask(
            "tokenize the prompt", lambda number: m.Tokenize(number, messages, template, prompt), m.Tokenized
        )

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        """Return the text of tokens, special ones included. Raises what `Questions.ask` raises."""
        return (
            await self._questions.ask("detokenize the tokens", lambda number: m.Detokenize(number, ids), m.Detokenized)
        ).text

    def abort(self, generation: Generation) -> None:
        """Stop decoding a request whose consumer has left; deliver nothing more."""
        generation.finished = True
        if generation in self._parked:
            self._parked.remove(generation)
            self._dispatch_parked()  # others may have waited for this suspect
        for worker, generations in self._generations.items():
            if generation.request_id in generations:
                self._forget(worker, generation, engine_done=False)

    def fail_all(self, error: NoCapacity) -> None:
        """End every request with an error and abort it in its engine."""
        self._questions.fail_all(error)
        self._fail_parked(error)
        for worker, generations in self._generations.items():
            for generation in list(generations.values()):
                generation.fail(error)
                self._forget(worker, generation, engine_done=False)

    async def change_draft(self, folder: str) -> int:
        """Change the draft of all workers, or of none; return how many changed. See `Drafts.change`."""
        return await self.drafts.change(folder, lambda: self.ready_workers)

    # Called by workers (WorkerEvents)

    def options_for(self, worker: Worker) -> dict[str, Any]:
        return self.drafts.options_for(worker)

    def on_ready(self, worker: Worker) -> None:
        self.drafts.on_ready(worker)
        self._observer.worker_up(worker.index, True)
        self.worker_changed.set()
        self._dispatch_parked()

    def on_message(self, worker: Worker, message: m.FromWorker) -> None:
        """Pass a worker's message to the request or draft change that it belongs to."""
        generations = self._generations[worker]
        if isinstance(message, m.Outputs):
            for output in message.outputs:
                # A missing one was aborted while this message was on its way.
                if (generation := generations.get(output.request_id)) is not None:
                    generation.feed(output)
                    if generation.finished:
                        worker.on_request_finished()
                        self._forget(worker, generation, engine_done=output.finish_reason is not None)
        elif isinstance(message, m.Stats):
            self._observer.engine_stats(worker.index, message.stats)
        elif isinstance(message, m.Reply):
            self._questions.on_reply(message)
            self._dispatch_parked()  # a suspect may have waited for this worker
        elif isinstance(message, m.DraftReply):
            self.drafts.on_reply(worker, message)
        elif isinstance(message, m.Refused) and message.request_id in generations:
            generations[message.request_id].refuse(message)
            self._forget(worker, generations[message.request_id], engine_done=True)

    def on_death(self, worker: Worker, death: Death) -> None:
        """Move a dead worker's requests to others; fail those without attempts left."""
        self.drafts.on_death(worker)
        self._questions.on_death(worker)
        self._observer.worker_up(worker.index, False)
        orphans, self._generations[worker] = list(self._generations[worker].values()), {}
        for generation in orphans:
            generation.deaths.add(death)
        self._parked += orphans
        failed = [generation for generation in orphans if len(generation.deaths) >= self._max_attempts]
        for generation in failed:
            self._parked.remove(generation)
            generation.fail(EngineFailure("every worker that decoded this request died", code="worker_died"))
        if failed and len(orphans) == 1:
            self._forgive(failed[0].deaths)
        self._dispatch_parked()

    def on_restart(self, worker: Worker) -> None:
        self._observer.worker_restarting(worker.index)
        self.worker_changed.set()

    def on_failed(self, worker: Worker) -> None:  # noqa: ARG002
        self.worker_changed.set()
        self._questions.on_change()
        if self.unrecoverable:
            self._fail_parked(NoCapacity("no worker is left", code="no_worker"))

    def is_busy(self, worker: Worker) -> bool:
        return bool(self._generations[worker]) or self._questions.waits_for(worker)

    # Internal

    def _dispatch(self, generation: Generation) -> None:
        """Send a request to a worker; park it where none may take it, fail it where none is left."""
        if self.unrecoverable:
            generation.fail(NoCapacity("no worker is left", code="no_worker"))
        elif (worker := self._worker_for(generation)) is None:
            self._parked.append(generation)
        else:
            if generation.attempts:
                alone = ", alone, since several workers died with it" if self._is_suspect(generation) else ""
                log.warning("request %s continues on worker %d%s", generation.request_id, worker.index, alone)
            generation.begin_attempt()
            worker.send(generation.submit)
            self._generations[worker][generation.request_id] = generation

    def _worker_for(self, generation: Generation) -> Worker | None:
        """Return the least loaded worker that may take a request; None where it has to wait."""
        ready, quarantined = self.ready_workers, self._quarantined
        if self._is_suspect(generation):
            candidates = [worker for worker in ready if not self.is_busy(worker)]
        elif any(map(self._is_suspect, self._parked)) and not quarantined and not self._any_restarting:
            candidates = []  # otherwise every worker would stay busy, and the parked suspect would wait for ever
        else:
            candidates = [worker for worker in ready if worker not in quarantined]
        return min(candidates, key=self.num_running_on, default=None)

    def _worker_for_question(self) -> Worker | None:
        """Return the least loaded worker; None while none is free of suspects. Raises NoCapacity where none is left."""
        if self.unrecoverable:
            raise NoCapacity("no worker is left", code="no_worker")
        candidates = [worker for worker in self.ready_workers if worker not in self._quarantined]
        return min(candidates, key=self.num_running_on, default=None)

    @property
    def _quarantined(self) -> list[Worker]:
        """The workers that decode a suspect."""
        return [
            worker for worker in self.ready_workers if any(map(self._is_suspect, self._generations[worker].values()))
        ]

    def _is_suspect(self, generation: Generation) -> bool:
        return len(generation.deaths) >= self._deaths_of_a_suspect

    @property
    def _any_restarting(self) -> bool:
        return any(worker.state in ("loading", "dead") for worker in self.workers)

    def _forgive(self, deaths: set[Death]) -> None:
        """Count these deaths no longer, neither against workers nor against requests: their cause is known."""
        for worker in self.workers:
            worker.forgive(deaths)
        for generation in self._parked:
            generation.deaths -= deaths
        for generations in self._generations.values():
            for generation in generations.values():
                generation.deaths -= deaths

    def _dispatch_parked(self) -> None:
        """Dispatch everything parked, suspects first; what still finds no worker is parked again."""
        self._questions.on_change()
        parked, self._parked = self._parked, []
        suspects = [generation for generation in parked if self._is_suspect(generation)]
        suspects.sort(key=lambda generation: len(generation.text))
        for generation in (*suspects, *(one for one in parked if one not in suspects)):
            self._dispatch(generation)

    def _forget(self, worker: Worker, generation: Generation, *, engine_done: bool) -> None:
        del self._generations[worker][generation.request_id]
        if not engine_done:
            worker.send(m.Abort(generation.request_id))
        self._dispatch_parked()

    def _fail_parked(self, error: NoCapacity) -> None:
        parked, self._parked = self._parked, []
        for generation in parked:
            generation.fail(error)
