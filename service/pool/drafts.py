"""Which draft is served, and how all workers come to another one, or none does.

A change has two halves. First every worker reads and packs the new draft beside the old one, and says whether it fits.
Only where all could are they told to use it, which takes no time and cannot fail. They read a copy of our own: so all
have the same bytes, and so has a worker that starts later, whatever has become of the folder by then.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import BadRequest, NoCapacity
from service.log import fields
from service.pool import messages as m

if TYPE_CHECKING:
    from service.pool.supervisor import Worker

log = logging.getLogger("flashserve.pool")

FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Served:
    number: int = 0  # by which it is known here and to workers
    folder: str | None = None  # as it was named to us; None: the model's own
    copy: Path | None = None  # what workers read; None: the folder itself
    since: float | None = None  # seconds since the epoch; None: no worker is ready yet
    changes: int = 0  # before it


class Drafts:
    def __init__(self, folder: str | None = None, *, keep: bool = False, timeout: float = 900.0) -> None:
        """folder: the draft that workers begin with; keep: as a copy, since another may take its place; timeout:
        seconds for a worker to read a draft."""
        self.served = Served(folder=folder)
        self._keep, self._timeout = keep, timeout
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._numbers = 0  # given to changes, refused ones included
        self._holds: dict[Worker, int | None] = {}  # the number of the draft that each works with, or loads
        self._replaced: dict[int, Path] = {}  # copies of drafts served before, which a worker that loads may still read
        self._asked: dict[Worker, tuple[int, asyncio.Future[m.DraftAnswer | None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        if self._keep and self.served.folder is not None:
            try:
                self.served = replace(self.served, copy=self._copied(self.served.folder, 0))
            except BadRequest:
                return  # a worker will say what is wrong with it

    async def stop(self) -> None:
        """Whoever waits for a worker's answer gets none."""
        for task in self._tasks:
            task.cancel()
        for worker in list(self._asked):
            self._answer(worker, None)
        if self._copies is not None:
            await asyncio.to_thread(self._copies.cleanup)

    async def change(self, folder: str, ready_workers: Callable[[], list[Worker]]) -> int:
        """Draft with the one in `folder` from now on; how many workers changed at once (those that start now follow).
        BadRequest, and the old one stays everywhere, where it does not fit."""
        async with self._one_at_a_time:
            self._numbers += 1
            number, copy = self._numbers, await asyncio.to_thread(self._copied, folder, self._numbers)
            workers = ready_workers()
            try:
                await self._read(workers, number, folder, copy)
            except BaseException:
                for worker in workers:
                    worker.send(m.DropDraft(number))
                shutil.rmtree(copy, ignore_errors=True)
                raise
            old, self.served = self.served, Served(number, folder, copy, time.time(), self.served.changes + 1)
            if old.copy is not None:
                self._replaced[old.number] = old.copy
            answers = await asyncio.gather(*(self._ask(worker, m.UseDraft(number)) for worker in workers))
            changed = [w for w, answer in zip(workers, answers, strict=True) if isinstance(answer, m.DraftUsed)]
            for worker in changed:
                self._hold(worker, number)
            for worker in ready_workers():  # one that was loading the old draft in the meantime
                self.on_ready(worker)
        log.info("draft changed %s", fields(folder=folder, workers=len(changed)))
        return len(changed)

    async def _read(self, workers: list[Worker], number: int, folder: str, copy: Path) -> None:
        """Every worker has it ready, or BadRequest."""
        answers = await asyncio.gather(*(self._ask(worker, m.ReadDraft(number, str(copy))) for worker in workers))
        for answer in answers:
            if isinstance(answer, m.DraftRefused):
                raise BadRequest(answer.reason.replace(str(copy), folder), param="draft", code="draft_refused")
        if not any(answers):  # none there, or all died of something
            raise NoCapacity("no worker is up at the moment", code="no_worker", retry_after=2.0)

    # What the pool tells it

    def options_for(self, worker: Worker) -> dict[str, Any]:
        """For a worker that starts now: what its plan does not know of."""
        served = self.served
        self._hold(worker, served.number)
        if served.copy is None:
            return {}
        # Someone may have tidied up.
        there = all((served.copy / name).exists() for name in FILES)
        return {"draft": str(served.copy) if there else served.folder}

    def on_ready(self, worker: Worker) -> None:
        if self.served.since is None:
            self.served = replace(self.served, since=time.time())
        if self._holds.get(worker) != self.served.number:
            task = asyncio.create_task(self._catch_up(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def on_answer(self, worker: Worker, message: m.DraftAnswer) -> None:
        if worker in self._asked and self._asked[worker][0] == message.number:
            self._answer(worker, message)

    def on_death(self, worker: Worker) -> None:
        self._answer(worker, None)
        self._hold(worker, None)

    # Its own

    def _hold(self, worker: Worker, number: int | None) -> None:
        self._holds[worker] = number
        for unread in self._replaced.keys() - self._holds.values():
            shutil.rmtree(self._replaced.pop(unread), ignore_errors=True)

    async def _catch_up(self, worker: Worker) -> None:
        """For a worker that loaded the draft of before while all others changed."""
        async with self._one_at_a_time:
            number, folder = self.served.number, self.served.copy or self.served.folder
            if worker.state != "ready" or self._holds.get(worker) == number:
                return
            answer = await self._ask(worker, m.ReadDraft(number, str(folder)))
            if isinstance(answer, m.DraftReady):
                answer = await self._ask(worker, m.UseDraft(number))
            if isinstance(answer, m.DraftUsed):
                self._hold(worker, number)
            elif isinstance(answer, m.DraftRefused):
                log.error("worker %d does not take the draft that is served: %s", worker.index, answer.reason)
                worker.kill()  # its streams go on elsewhere, and it starts with that draft

    async def _ask(self, worker: Worker, message: m.ReadDraft | m.UseDraft) -> m.DraftAnswer | None:
        """The worker's answer; None where it died."""
        if worker.state != "ready":
            return None
        future: asyncio.Future[m.DraftAnswer | None] = asyncio.get_running_loop().create_future()
        self._asked[worker] = message.number, future
        worker.send(message)
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            return m.DraftRefused(message.number, "a worker did not answer in time")
        finally:
            if self._asked.get(worker) == (message.number, future):
                del self._asked[worker]

    def _answer(self, worker: Worker, answer: m.DraftAnswer | None) -> None:
        if worker in self._asked:
            _, future = self._asked.pop(worker)
            if not future.done():
                future.set_result(answer)

    def _copied(self, folder: str, number: int) -> Path:
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="flashserve-drafts-", ignore_cleanup_errors=True)
        copy = Path(self._copies.name) / str(number)
        try:
            copy.mkdir()
            for name in FILES:
                shutil.copyfile(Path(folder) / name, copy / name)
        except (OSError, ValueError) as error:
            shutil.rmtree(copy, ignore_errors=True)
            why = getattr(error, "strerror", None) or type(error).__name__
            raise BadRequest(
                f"draft {folder!r} cannot be read ({why}): give a folder with {' and '.join(FILES)}, as this machine "
                "knows it",
                param="draft",
                code="draft_refused",
            ) from None
        return copy
