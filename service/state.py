"""The service as one object: its parts, whether it accepts requests, and how it starts, drains and stops.

Knows nothing of HTTP; routes use it, the server starts and stops it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from model.request import ChatFormat, EngineInfo
from service import cores
from service.admission import Admission
from service.decoded_media import DecodedMedia
from service.draft_watcher import DraftWatcher
from service.errors import NoCapacity, ServiceError
from service.log import fields
from service.media import MediaCache, MediaDecoder, MediaLimits
from service.media_loader import MediaLoader
from service.metrics import Metrics
from service.metrics_aliases import VllmAliases
from service.pool.arena import Arena
from service.pool.drafts import Drafts
from service.pool.pool import Pool
from service.pool.supervisor import WorkerConfig
from service.schemas.sampling import max_frames
from service.settings import Settings
from service.tracing import start_tracer
from service.uploads import Uploads

log = logging.getLogger("flashserve")

MAX_TRACES_SECONDS = 5.0  # for the last traces to be sent


class Endable(Protocol):
    """A running request, which shutdown can end."""

    def end(self, error: ServiceError) -> None: ...


class Service:
    """Everything that runs behind the routes; one per process."""

    def __init__(self, settings: Settings, on_fatal: Callable[[str], None]) -> None:
        """on_fatal: called once, with the reason, when nothing can be served any more, or ever."""
        self.settings = settings
        self.metrics = Metrics(settings.model_name)
        self.tracer = start_tracer(settings)
        self.media_limits = media_limits(settings)
        self.decoder: MediaDecoder | None = None  # None until the target's geometry is known
        self.draining = False
        self.requests: set[Endable] = set()  # admitted and not yet ended
        self._draft_watcher: DraftWatcher | None = None
        if settings.watch_draft is not None and settings.draft is not None:
            self._draft_watcher = DraftWatcher(settings.draft, settings.watch_draft, self.change_draft)
        changes = self._draft_watcher is not None or settings.admin_key is not None
        self._arena = _new_arena(settings.shared_media_bytes)
        self.pool = Pool(
            _worker_configs(settings, self._arena),
            max_request_retries=settings.max_request_retries,
            observer=self.metrics,
            drafts=Drafts(settings.draft, keep_copy=changes, timeout=settings.load_timeout),
        )
        self.admission = Admission(self._capacity, self.unavailable_reason, settings.max_requests_per_key)
        self.uploads = Uploads(settings)
        self.decoded_media = DecodedMedia(settings.max_decoded_bytes)
        self.media_cache = MediaCache(settings.media_cache_bytes)
        self.metrics.watch_media_cache(lambda: self.media_cache.usage)
        self.metrics.watch_unassigned(self._num_unassigned)
        self._on_fatal = on_fatal
        self._lifecycle_task: asyncio.Task[None] | None = None
        self._watcher_task: asyncio.Task[None] | None = None

    # Whether it accepts requests

    def unavailable_reason(self) -> NoCapacity | None:
        """Return why no request can be accepted now, or None."""
        if self.draining:
            return _shutting_down()
        if self.pool.info is None or self.decoder is None:
            return NoCapacity("the model is loading", code="loading", retry_after=5.0)
        if not self.pool.ready_workers:
            return NoCapacity("no worker is up at the moment", code="no_worker", retry_after=2.0)
        return None

    @property
    def unrecoverable(self) -> bool:
        """Whether only a restart of the whole service can help."""
        return self.pool.unrecoverable

    def _capacity(self) -> int:
        """Return how many engine requests may be decoded or wait now."""
        decoded_at_once = sum(worker.info.max_num_seqs for worker in self.pool.ready_workers if worker.info)
        return decoded_at_once + self.settings.max_waiting

    @property
    def chat_format(self) -> ChatFormat:
        """How the model's answers show reasoning and calls; before it is known, they show none."""
        return ChatFormat() if self.pool.info is None else self.pool.info.chat

    @property
    def max_choices(self) -> int:
        """The largest `n` of one request."""
        return min(self.settings.max_n, self.max_parallel)

    @property
    def max_parallel(self) -> int:
        """The most choices of one request: capacity for more would never be free, however long it waited."""
        settings = self.settings
        workers = [worker.info or self.pool.info for worker in self.pool.workers if worker.state != "given_up"]
        capacity = sum(info.max_num_seqs for info in workers if info) + settings.max_waiting
        per_key = settings.max_requests_per_key if settings.api_key else None
        return min(capacity, per_key or capacity)

    def _num_unassigned(self) -> int:
        """Return how many admitted engine requests no worker has yet."""
        return max(0, self.admission.in_use - self.pool.num_generations + self.pool.num_parked)

    def media_loader(self, count_decoded: Callable[[int], None]) -> MediaLoader:
        """Return what loads the media of a request under the present limits. count_decoded: called with the bytes of
        each medium; it may raise."""
        return MediaLoader(
            decoder=self.decoder,
            limits=self.media_limits,
            allowed_domains=self.settings.allowed_media_domains,
            allowed_folders=self.settings.allowed_media_path,
            cache=self.media_cache,
            on_cache_query=self.metrics.media_cache_query,
            on_loaded=self.metrics.media_done,
            count_decoded=count_decoded,
        )

    async def change_draft(self, folder: str) -> int:
        """Change the draft of all workers, and return their number. Raises ServiceError and changes none where it is
        refused."""
        if (reason := self.unavailable_reason()) is not None:
            raise reason
        return await self.pool.change_draft(folder)

    # Start and stop

    def start(self) -> None:
        self.pool.start()
        self._lifecycle_task = asyncio.create_task(self._run_lifecycle())

    async def drain(self) -> None:
        """Accept no new requests and let running ones finish, until `drain_timeout` or until this is cancelled."""
        self.draining = True
        log.info("draining: %d requests are running", self.admission.in_use)
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.admission.wait_until_empty()
        except TimeoutError:
            log.warning("%d requests did not end in time", self.admission.in_use)
        finally:
            for request in tuple(self.requests):
                request.end(_shutting_down())

    async def stop(self) -> None:
        """Stop the workers and media children, and send the last traces."""
        self.draining = True
        tasks = [task for task in (self._lifecycle_task, self._watcher_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(self.pool.stop(), self._close_tracer())
        if self.decoder is not None:
            await self.decoder.close()

    async def _close_tracer(self) -> None:
        if self.tracer is not None:
            await self.tracer.close(min(MAX_TRACES_SECONDS, self.settings.drain_timeout))

    async def _run_lifecycle(self) -> None:
        """Open when the first worker is ready. When the last one fails for good, fail all requests and end the process,
        so that whatever supervises it starts another."""
        while not self.pool.unrecoverable:
            if self.decoder is None and self.pool.info is not None and not await self._open(self.pool.info):
                return
            await self.pool.worker_changed.wait()
            self.pool.worker_changed.clear()
        reason = self.pool.load_error or "the workers died while they loaded the model"
        if self.pool.info is not None:
            reason = "every worker was given up; the log above says why each one died"
        self._on_fatal(reason)
        for request in tuple(self.requests):
            request.end(NoCapacity("no worker is left", code="no_worker"))

    async def _open(self, info: EngineInfo) -> bool:
        """Start to accept requests: only now is the geometry known to which media are decoded."""
        if info.device == "cpu":
            cores.set_batch_scheduling()  # decoding children inherit it
        self.media_limits = replace(self.media_limits, max_frames=self._max_frames(info))
        decoder = MediaDecoder(
            self.media_limits,
            info.geometry,
            self.settings.media_workers,
            self._arena,
            video_workers=self.settings.video_workers,
            spares=self.settings.spare_media_workers,
            sample_frames=self.pool.sample_frames,
        )
        try:
            await decoder.start()
        except RuntimeError as error:
            self._on_fatal(str(error))
            return False
        self.decoder = decoder
        if self.settings.metrics_aliases == "vllm":
            self.metrics.aliases = self._vllm_aliases(info)
        if self._draft_watcher is not None:
            self._watcher_task = asyncio.create_task(self._draft_watcher.run())
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

    def _vllm_aliases(self, info: EngineInfo) -> VllmAliases:
        return VllmAliases(
            self.metrics.registry,
            self.settings.model_name,
            info,
            num_engines=len(self.pool.workers),
            prefix_cache=self.settings.prefix_cache,
            memory_utilization=self.settings.memory_utilization,
        )

    def _max_frames(self, info: EngineInfo) -> int:
        """Return the frames of a video that settings and the model's context allow."""
        configured, fitting = self.settings.max_frames, max_frames(self.settings, info)
        if fitting < configured and "max_frames" in self.settings.model_fields_set:
            log.warning(
                "--max-frames is reduced from %d to %d, which fit the model's context of %d tokens",
                *(configured, fitting, info.max_model_len),
            )
        return fitting


def _shutting_down() -> NoCapacity:
    return NoCapacity("the server is shutting down", code="draining", retry_after=5.0)


def _new_arena(num_bytes: int) -> Arena | None:
    """Allocate memory shared with the workers; return None where the system has none, and media use their sockets."""
    if not num_bytes:
        return None
    try:
        return Arena(num_bytes)
    except (AttributeError, OSError) as error:
        log.warning("no shared memory, media are sent to the workers through sockets: %s", error)
        return None


def _worker_configs(settings: Settings, arena: Arena | None) -> list[WorkerConfig]:
    return [
        WorkerConfig(
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
    """Return the limits on media that the settings give."""
    return MediaLimits(
        max_bytes=settings.max_media_bytes,
        max_pixels=settings.max_pixels,
        max_video_pixels=settings.max_video_pixels,
        max_clip_pixels=settings.max_clip_pixels,
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
