"""All workers as one engine: each request goes to the least loaded, and outlives the worker that it went to.

A worker that dies may have died of a request. One that was there when several did is suspected: it is tried at a
worker of its own, while nothing else goes there, so that it dies alone or is not the cause. Those that have said least
are tried first, since what kills a worker seldom says much. The one found guilty fails, and the deaths that it was
there for count against nobody else: neither the requests beside it nor the workers.

Knows requests only as `Submit` messages and their `Generation`s; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from model.request import EngineInfo, EngineStats
from service.errors import EngineFailure, NoCapacity
from service.pool import messages as m
from service.pool.drafts import Drafts
from service.pool.generation import Event, Generation
from service.pool.supervisor import STOP_GRACE, Death, Worker, WorkerPlan

log = logging.getLogger("flashserve.pool")

DEATHS_OF_A_SUSPECT = 2  # or fewer, where a request is not taken up so often: its last attempt is one alone


class PoolObserver(Protocol):
    """Who wants to know; the metrics do."""

    def worker_up(self, worker: int, up: bool) -> None: ...
    def worker_restarting(self, worker: int) -> None: ...
    def engine_stats(self, worker: int, stats: EngineStats) -> None: ...


class Pool:
    def __init__(
        self,
        plans: list[WorkerPlan],
        *,
        max_request_retries: int,
        observer: PoolObserver,
        drafts: Drafts | None = None,
    ) -> None:
        self.workers = [Worker(index, plan, self) for index, plan in enumerate(plans)]
        self.drafts = drafts or Drafts()
        self.has_news = asyncio.Event()  # set when a worker became ready or died
        self._max_attempts = 1 + max_request_retries
        self._deaths_of_a_suspect = min(DEATHS_OF_A_SUSPECT, max(1, max_request_retries))
        self._observer = observer
        self._generations: dict[Worker, dict[str, Generation]] = {worker: {} for worker in self.workers}
        self._parked: list[Generation] = []  # taken in, and waiting for a worker
        self._tasks: list[asyncio.Task[None]] = []

    # What its owner sees

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def beyond_hope(self) -> bool:
        """All are given up; or each said why it cannot load, and none ever could: then settings are wrong, and trying
        again is no cure."""
        given_up = all(worker.state == "given_up" for worker in self.workers)
        return given_up or (self.info is None and all(worker.load_error for worker in self.workers))

    @property
    def info(self) -> EngineInfo | None:
        return next((worker.info for worker in self.workers if worker.info is not None), None)

    @property
    def load_error(self) -> str | None:
        """Why the model could not be loaded, where none ever could be."""
        return None if self.info else next((worker.load_error for worker in self.workers if worker.load_error), None)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    @property
    def num_generations(self) -> int:
        return len(self._parked) + sum(map(len, self._generations.values()))

    def num_at(self, worker: Worker) -> int:
        return len(self._generations[worker])

    def start(self) -> None:
        self.drafts.start()
        for worker in self.workers:
            self._observer.worker_up(worker.index, False)
            self._tasks.append(asyncio.create_task(worker.supervise(), name=f"worker-{worker.index}"))

    async def stop(self) -> None:
        """Ends the workers, and with an error whatever they still had."""
        await self.drafts.stop()
        self.fail_all(NoCapacity("the server is shutting down", code="draining"))
        for worker in self.workers:
            worker.stop()
        if self._tasks:
            _, hanging = await asyncio.wait(self._tasks, timeout=STOP_GRACE)
            for task in hanging:
                task.cancel()  # in the middle of loading, or deaf: killed on the way out
            await asyncio.gather(*hanging, return_exceptions=True)

    def submit(self, submit: m.Submit, deliver: Callable[[Event], None]) -> Generation:
        generation = Generation(submit, deliver)
        self._dispatch(generation)
        return generation

    def abort(self, generation: Generation) -> None:
        """The consumer is gone: frees the engine, and delivers nothing more."""
        generation.finished = True
        if generation in self._parked:
            self._parked.remove(generation)
            self._dispatch_parked()  # others may have waited for it
        for worker, generations in self._generations.items():
            if generation.request_id in generations:
                self._forget(worker, generation, engine_done=False)

    def fail_all(self, error: NoCapacity) -> None:
        """Every consumer is told, and every engine freed."""
        self._fail_parked(error)
        for worker, generations in self._generations.items():
            for generation in list(generations.values()):
                generation.fail(error)
                self._forget(worker, generation, engine_done=False)

    async def change_draft(self, folder: str) -> int:
        """All workers draft with the one in `folder`, or none does; how many changed. See `Drafts.change`."""
        return await self.drafts.change(folder, lambda: self.ready_workers)

    # What workers tell it

    def options_for(self, worker: Worker) -> dict[str, Any]:
        return self.drafts.options_for(worker)

    def on_ready(self, worker: Worker) -> None:
        self.drafts.on_ready(worker)
        self._observer.worker_up(worker.index, True)
        self.has_news.set()
        self._dispatch_parked()

    def on_message(self, worker: Worker, message: m.FromWorker) -> None:
        generations = self._generations[worker]
        if isinstance(message, m.Outputs):
            for output in message.outputs:
                # One that is not known any more was aborted while this was on its way.
                if (generation := generations.get(output.request_id)) is not None:
                    generation.feed(output)
                    if generation.finished:
                        worker.did_well()
                        self._forget(worker, generation, engine_done=output.finish_reason is not None)
        elif isinstance(message, m.Stats):
            self._observer.engine_stats(worker.index, message.stats)
        elif isinstance(message, m.DraftAnswer):
            self.drafts.on_answer(worker, message)
        elif isinstance(message, m.Refused) and message.request_id in generations:
            generations[message.request_id].refuse(message)
            self._forget(worker, generations[message.request_id], engine_done=True)

    def on_death(self, worker: Worker, death: Death) -> None:
        self.drafts.on_death(worker)
        self._observer.worker_up(worker.index, False)
        orphans, self._generations[worker] = list(self._generations[worker].values()), {}
        for generation in orphans:
            generation.deaths.add(death)
        self._parked += orphans
        failed = [generation for generation in orphans if len(generation.deaths) >= self._max_attempts]
        for generation in failed:
            self._parked.remove(generation)
            generation.fail(EngineFailure("the workers that took this request died", code="worker_died"))
        if failed and len(orphans) == 1:
            self._excuse(failed[0].deaths)
        self._dispatch_parked()

    def on_restart(self, worker: Worker) -> None:
        self._observer.worker_restarting(worker.index)
        self.has_news.set()

    def on_given_up(self, worker: Worker) -> None:  # noqa: ARG002
        self.has_news.set()
        if self.beyond_hope:
            self._fail_parked(NoCapacity("no worker is left", code="no_worker"))

    def is_busy(self, worker: Worker) -> bool:
        return bool(self._generations[worker])

    # Its own

    def _dispatch(self, generation: Generation) -> None:
        if self.beyond_hope:
            generation.fail(NoCapacity("no worker is left", code="no_worker"))
        elif (worker := self._worker_for(generation)) is None:
            self._parked.append(generation)
        else:
            if generation.attempts:
                alone = ", alone, since it was there when others died" if self._is_suspect(generation) else ""
                log.warning("request %s goes on at worker %d%s", generation.request_id, worker.index, alone)
            generation.begin_attempt()
            worker.send(generation.submit)
            self._generations[worker][generation.request_id] = generation

    def _worker_for(self, generation: Generation) -> Worker | None:
        """The least loaded that may take it; None where it has to wait."""
        suspect, ready = self._is_suspect(generation), self.ready_workers
        at_trial = [worker for worker in ready if any(map(self._is_suspect, self._generations[worker].values()))]
        if suspect:
            fit = [worker for worker in ready if not self._generations[worker]]
        elif any(map(self._is_suspect, self._parked)) and not at_trial and not self._reviving:
            fit = []  # else they would keep every worker busy, and a suspect would wait for ever
        else:
            fit = [worker for worker in ready if worker not in at_trial]
        return min(fit, key=self.num_at, default=None)

    def _is_suspect(self, generation: Generation) -> bool:
        return len(generation.deaths) >= self._deaths_of_a_suspect

    @property
    def _reviving(self) -> bool:
        return any(worker.state in ("loading", "dead") for worker in self.workers)

    def _excuse(self, deaths: set[Death]) -> None:
        """Nobody else is to be blamed for these."""
        for worker in self.workers:
            worker.excuse(deaths)
        for generation in self._parked:
            generation.deaths -= deaths
        for generations in self._generations.values():
            for generation in generations.values():
                generation.deaths -= deaths

    def _dispatch_parked(self) -> None:
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
