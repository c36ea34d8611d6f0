"""The service as one object: its parts, whether it takes requests, and how it opens, drains and closes.

Knows nothing of HTTP; routes ask it, the server drives it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from model.request import EngineInfo
from service import cores
from service.admission import Admission
from service.errors import NoCapacity
from service.log import fields
from service.media import MediaDecoder, MediaLimits
from service.metrics import Metrics
from service.pool.arena import Arena
from service.pool.drafts import Drafts
from service.pool.pool import Pool
from service.pool.supervisor import WorkerPlan
from service.schemas.sampling import max_frames
from service.settings import Settings
from service.uploads import Uploads
from service.watch import Watch

if TYPE_CHECKING:
    from service.answer import Answer

log = logging.getLogger("flashserve")


class Service:
    def __init__(self, settings: Settings, on_fatal: Callable[[str], None]) -> None:
        """`on_fatal`: called once, with the reason, where nothing can be served any more, or ever."""
        self.settings = settings
        self.metrics = Metrics(settings.model_name)
        self.media_limits = media_limits(settings)
        self.decoder: MediaDecoder | None = None  # from the moment the target's geometry is known
        self.draining = False
        self.answers: set[Answer] = set()  # under way, from the door on
        self._watch: Watch | None = None
        if settings.watch_draft is not None and settings.draft is not None:
            self._watch = Watch(settings.draft, settings.watch_draft, self.change_draft)
        changes = self._watch is not None or settings.admin_key is not None
        self._arena = _arena(settings.shared_media_bytes)
        self.pool = Pool(
            _plans(settings, self._arena),
            max_request_retries=settings.max_request_retries,
            observer=self.metrics,
            drafts=Drafts(settings.draft, keep=changes, timeout=settings.load_timeout),
        )
        self.admission = Admission(self._capacity, self.closed_because, settings.max_requests_per_key)
        self.uploads = Uploads(settings)
        self.metrics.watch_unassigned(self._num_unassigned)
        self._on_fatal = on_fatal
        self._living: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    # Whether it takes requests

    def closed_because(self) -> NoCapacity | None:
        """Why no request can be taken now; None where it can."""
        if self.draining:
            return _shutting_down()
        if self.pool.info is None or self.decoder is None:
            return NoCapacity("the model is loading", code="loading", retry_after=5.0)
        if not self.pool.ready_workers:
            return NoCapacity("no worker is up at the moment", code="no_worker", retry_after=2.0)
        return None

    @property
    def beyond_hope(self) -> bool:
        """Only a restart of the whole service can help."""
        return self.pool.beyond_hope

    def _capacity(self) -> int:
        decoded_at_once = sum(worker.info.max_num_seqs for worker in self.pool.ready_workers if worker.info)
        return decoded_at_once + self.settings.max_waiting

    @property
    def most_choices(self) -> int:
        """That one request may ask for: places for more are never free, however long it waits."""
        settings = self.settings
        workers = [worker.info or self.pool.info for worker in self.pool.workers if worker.state != "given_up"]
        places = sum(info.max_num_seqs for info in workers if info) + settings.max_waiting
        per_key = settings.max_requests_per_key if settings.api_key else None
        return min(settings.max_n, places, per_key or places)

    def _num_unassigned(self) -> int:
        return max(0, self.admission.in_use - self.pool.num_generations + self.pool.num_parked)

    # What can be changed while it runs

    async def change_draft(self, folder: str) -> int:
        """All workers draft with the one in `folder` from now on; how many. ServiceError, and none does, where it does
        not fit."""
        if (closed := self.closed_because()) is not None:
            raise closed
        return await self.pool.change_draft(folder)

    # Its life

    def start(self) -> None:
        self.pool.start()
        self._living = asyncio.create_task(self._live())

    async def drain(self) -> None:
        """Take nothing new, and let what runs finish, for as long as settings allow, or until this is cancelled."""
        self.draining = True
        log.info("draining: %d requests are running", self.admission.in_use)
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.admission.emptied()
        except TimeoutError:
            log.warning("%d requests did not end in time", self.admission.in_use)
        finally:
            for answer in tuple(self.answers):
                answer.end(_shutting_down())

    async def stop(self) -> None:
        self.draining = True
        tasks = [task for task in (self._living, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.pool.stop()
        if self.decoder is not None:
            await self.decoder.close()

    async def _live(self) -> None:
        """Open with the first worker, and end with the last: every request gets its error, and the process ends too,
        so that whatever watches it starts another."""
        while not self.pool.beyond_hope:
            if self.decoder is None and self.pool.info is not None and not await self._open(self.pool.info):
                return
            await self.pool.has_news.wait()
            self.pool.has_news.clear()
        reason = self.pool.load_error or "the workers died while they loaded the model"
        if self.pool.info is not None:
            reason = "every worker was given up; why each one died stands above"
        self._on_fatal(reason)
        for answer in tuple(self.answers):
            answer.end(NoCapacity("no worker is left", code="no_worker"))

    async def _open(self, info: EngineInfo) -> bool:
        """Begin to take requests: only a worker knows the geometry that media are decoded to."""
        if info.device == "cpu":
            cores.give_way()  # and so do the decoding children, which inherit it
        self.media_limits = replace(self.media_limits, max_frames=self._max_frames(info))
        decoder = MediaDecoder(
            self.media_limits,
            info.geometry,
            self.settings.media_workers,
            self._arena,
            video_workers=self.settings.video_workers,
            spares=self.settings.spare_media_workers,
        )
        try:
            await decoder.start()
        except RuntimeError as error:
            self._on_fatal(str(error))
            return False
        self.decoder = decoder
        if self._watch is not None:
            self._watching = asyncio.create_task(self._watch.run())
        log.info(
            "ready %s",
            fields(
                model=self.settings.model_name,
                device=info.device,
                dtype=info.dtype,
                backend=info.backend,
                drafter=info.drafter,
                max_model_len=info.max_model_len,
                max_num_seqs=info.max_num_seqs,
                max_frames=self.media_limits.max_frames,
            ),
        )
        return True

    def _max_frames(self, info: EngineInfo) -> int:
        wanted, fitting = self.settings.max_frames, max_frames(self.settings, info)
        if fitting < wanted and "max_frames" in self.settings.model_fields_set:
            log.warning(
                "--max-frames %d is more than the %d that fit the model's context of %d tokens; it is %d",
                *(wanted, fitting, info.max_model_len, fitting),
            )
        return fitting


def _shutting_down() -> NoCapacity:
    return NoCapacity("the server is shutting down", code="draining", retry_after=5.0)


def _arena(num_bytes: int) -> Arena | None:
    """Memory shared with the workers, where this system has any to share: without, pixels go through their sockets."""
    if not num_bytes:
        return None
    try:
        return Arena(num_bytes)
    except (AttributeError, OSError) as error:
        log.warning("media are sent to the workers through sockets, there is no memory to share: %s", error)
        return None


def _plans(settings: Settings, arena: Arena | None) -> list[WorkerPlan]:
    return [
        WorkerPlan(
            engine=settings.engine,
            options=options,
            load_timeout=settings.load_timeout,
            stall_timeout=settings.stall_timeout,
            max_restarts=settings.max_worker_restarts,
            arena=arena,
        )
        for options in settings.engine_options()
    ]


def media_limits(settings: Settings) -> MediaLimits:
    """Under which the media of a request are fetched and decoded."""
    return MediaLimits(
        max_bytes=settings.max_media_bytes,
        max_pixels=settings.max_pixels,
        max_video_pixels=settings.max_video_pixels,
        max_video_seconds=settings.max_video_seconds,
        max_frames=settings.max_frames,
        decode_seconds=settings.media_timeout,
        cpu_seconds=max(1, round(settings.media_timeout)),
        image_seconds=settings.image_timeout,
        queue_seconds=settings.media_queue_timeout,
        max_queued=settings.max_waiting_media,
        memory_bytes=settings.media_memory_bytes,
        fetch_seconds=settings.fetch_timeout,
    )
