"""Change the served draft in all workers, or in none (a two-phase commit).

First every worker reads and packs the new draft beside the old one and reports whether it is usable. Only when all
succeed does each get UseDraft, which is quick and cannot fail. Workers read a private copy of the folder, so that all
of them, and those that start later, use the same bytes.
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
from typing import Any

from service.errors import BadRequest, NoCapacity
from service.log import fields
from service.pool import messages as m
from service.pool.supervisor import Worker

log = logging.getLogger("flashserve.pool")

FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class ServedDraft:
    number: int = 0  # identifies it here and in messages to workers
    folder: str | None = None  # as the operator named it; None: the model's own draft
    copy: Path | None = None  # what workers read; None: the folder itself
    since: float | None = None  # seconds since the epoch; None: no worker is ready yet
    changes: int = 0  # how many drafts were replaced before this one


class Drafts:
    """The draft in use, and its change in all workers."""

    def __init__(self, folder: str | None = None, *, keep_copy: bool = False, timeout: float = 900.0) -> None:
        """folder: the first draft; keep_copy: copy it, since it may be replaced; timeout: seconds to read a draft."""
        self.served = ServedDraft(folder=folder)
        self._keep_copy, self._timeout = keep_copy, timeout
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._change_lock = asyncio.Lock()
        self._last_number = 0  # refused changes have numbers too
        self._loaded: dict[Worker, int | None] = {}  # the number of the draft that each uses or loads
        self._replaced: dict[int, Path] = {}  # copies of earlier drafts, which a loading worker may still read
        self._pending: dict[Worker, tuple[int, asyncio.Future[m.DraftReply | None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Copy the first draft, where it may be replaced."""
        if self._keep_copy and self.served.folder is not None:
            try:
                self.served = replace(self.served, copy=self._copy(self.served.folder, 0))
            except BadRequest:
                return  # a worker will report what is wrong with it

    async def stop(self) -> None:
        """Cancel changes in progress and delete the copies."""
        for task in self._tasks:
            task.cancel()
        for worker in list(self._pending):
            self._resolve(worker, None)
        if self._copies is not None:
            await asyncio.to_thread(self._copies.cleanup)

    async def change(self, folder: str, ready_workers: Callable[[], list[Worker]]) -> int:
        """Use the draft in `folder` from now on, and return how many workers changed at once; starting ones follow.

        Raises BadRequest where a worker refuses it, and NoCapacity without workers; then every worker keeps its draft.
        """
        async with self._change_lock:
            self._last_number += 1
            number, copy = self._last_number, await asyncio.to_thread(self._copy, folder, self._last_number)
            workers = ready_workers()
            try:
                await self._read(workers, number, folder, copy)
            except BaseException:
                for worker in workers:
                    worker.send(m.DropDraft(number))
                shutil.rmtree(copy, ignore_errors=True)
                raise
            old, self.served = self.served, ServedDraft(number, folder, copy, time.time(), self.served.changes + 1)
            if old.copy is not None:
                self._replaced[old.number] = old.copy
            replies = await asyncio.gather(*(self._request(worker, m.UseDraft(number)) for worker in workers))
            changed = [w for w, reply in zip(workers, replies, strict=True) if isinstance(reply, m.DraftUsed)]
            for worker in changed:
                self._set_loaded(worker, number)
            for worker in ready_workers():  # some may have loaded the old draft in the meantime
                self.on_ready(worker)
        log.info("draft changed %s", fields(folder=folder, workers=len(changed)))
        return len(changed)

    async def _read(self, workers: list[Worker], number: int, folder: str, copy: Path) -> None:
        """Have every worker read and pack a draft. Raises BadRequest where one refuses, NoCapacity without workers."""
        replies = await asyncio.gather(*(self._request(worker, m.ReadDraft(number, str(copy))) for worker in workers))
        for reply in replies:
            if isinstance(reply, m.DraftRefused):
                raise BadRequest(reply.reason.replace(str(copy), folder), param="draft", code="draft_refused")
        if not any(replies):  # no worker is up, or all died
            raise NoCapacity("no worker is up at the moment", code="no_worker", retry_after=2.0)

    # Called by the pool

    def options_for(self, worker: Worker) -> dict[str, Any]:
        """Return the engine options that make a starting worker load the served draft."""
        served = self.served
        self._set_loaded(worker, served.number)
        if served.copy is None:
            return {}
        # Temporary folders may be cleaned up by others.
        exists = all((served.copy / name).exists() for name in FILES)
        return {"draft": str(served.copy) if exists else served.folder}

    def on_ready(self, worker: Worker) -> None:
        """Start a change in a worker that loaded another draft than the served one."""
        if self.served.since is None:
            self.served = replace(self.served, since=time.time())
        if self._loaded.get(worker) != self.served.number:
            task = asyncio.create_task(self._catch_up(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def on_reply(self, worker: Worker, message: m.DraftReply) -> None:
        """Pass a worker's reply to the change that waits for it."""
        if worker in self._pending and self._pending[worker][0] == message.number:
            self._resolve(worker, message)

    def on_death(self, worker: Worker) -> None:
        """End the wait for a worker's reply."""
        self._resolve(worker, None)
        self._set_loaded(worker, None)

    # Internal

    def _set_loaded(self, worker: Worker, number: int | None) -> None:
        """Note which draft a worker has, and delete copies that no worker reads any more."""
        self._loaded[worker] = number
        for unread in self._replaced.keys() - self._loaded.values():
            shutil.rmtree(self._replaced.pop(unread), ignore_errors=True)

    async def _catch_up(self, worker: Worker) -> None:
        """Change one worker to the served draft: it loaded the previous one while the others changed."""
        async with self._change_lock:
            number, folder = self.served.number, self.served.copy or self.served.folder
            if worker.state != "ready" or self._loaded.get(worker) == number:
                return
            reply = await self._request(worker, m.ReadDraft(number, str(folder)))
            if isinstance(reply, m.DraftReady):
                reply = await self._request(worker, m.UseDraft(number))
            if isinstance(reply, m.DraftUsed):
                self._set_loaded(worker, number)
            elif isinstance(reply, m.DraftRefused):
                log.error("worker %d refuses the served draft and is restarted: %s", worker.index, reply.reason)
                worker.kill()  # other workers continue its streams, and it restarts with that draft

    async def _request(self, worker: Worker, message: m.ReadDraft | m.UseDraft) -> m.DraftReply | None:
        """Send a message and wait for the worker's reply; return None where it is not up or dies."""
        if worker.state != "ready":
            return None
        future: asyncio.Future[m.DraftReply | None] = asyncio.get_running_loop().create_future()
        self._pending[worker] = message.number, future
        worker.send(message)
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            return m.DraftRefused(message.number, "a worker did not answer in time")
        finally:
            if self._pending.get(worker) == (message.number, future):
                del self._pending[worker]

    def _resolve(self, worker: Worker, reply: m.DraftReply | None) -> None:
        if worker in self._pending:
            _, future = self._pending.pop(worker)
            if not future.done():
                future.set_result(reply)

    def _copy(self, folder: str, number: int) -> Path:
        """Copy a draft's files to a folder of our own. Raises BadRequest where they cannot be read."""
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
                f"draft {folder!r} cannot be read ({why}): give a folder on this server that holds "
                f"{' and '.join(FILES)}",
                param="draft",
                code="draft_refused",
            ) from None
        return copy
