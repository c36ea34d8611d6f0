"""Decode untrusted files to frames at the target's geometry, in a small pool of confined child processes.

A decode waits for a lane (decode_queue.py) and borrows a warm child (child_pool.py). Clients cannot starve each other:
images and videos have separate lanes, and some lanes accept small images only; waiting files are ordered by their size
(size_estimate.py), arrival and number of files of the same client; an image's processor time is limited in proportion
to its size, so that a lane is soon free again; and there are more children than lanes, so that a killed child is
replaced before it is needed.

A crash, a hang or a client that leaves costs one child and one request. An ordinary decoder error costs nothing, see
refusal.py. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

import numpy as np

from model.request import Geometry, Medium, RequestError
from service.errors import BadRequest, TooLarge, UnsupportedMedia
from service.media import wire
from service.media.child_pool import ChildPool, shutting_down
from service.media.child_process import ChildGone, PixelAllocator
from service.media.decode_queue import DecodeQueue, lanes
from service.media.limits import MediaLimits
from service.media.question import Question, SampleFrames, plausible
from service.media.refusal import HARMFUL, Refusal, client_error
from service.media.size_estimate import size_share
from service.media.sniff import KIND_OF, Format, Kind, may_be, sniff, unsupported_format

SUPPORTED = "JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC images, and MP4, WebM, AVI or MPEG-TS videos"
MIN_TIME_SHARE = 1 / 8  # of the processor time for the largest image, which every image may use


@dataclass(frozen=True)
class DecoderStats:
    """The first three are the present state; the others count since `start()`."""

    children: tuple[int, ...] = ()  # process ids of live children
    idle: int = 0  # warm children without a job
    waiting: int = 0  # files that wait for a lane
    decoded: int = 0
    refused: int = 0  # files that a child refused
    children_started: int = 0


class MediaDecoder:
    """`await start()`, any number of concurrent `await decode(...)`, finally `await close()`."""

    def __init__(
        self,
        limits: MediaLimits,
        geometry: Geometry,
        workers: int = 2,
        allocator: PixelAllocator | None = None,
        *,
        video_workers: int = 0,
        spares: int = 0,
        sample_frames: SampleFrames | None = None,
    ) -> None:
        """workers: images decoded at once; video_workers: videos at once, in lanes of their own (0: in the images'
        lanes); spares: further children; allocator: memory for pixels, used while it has room; sample_frames: asks the
        target which frames it wants, where the geometry says that it chooses."""
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.limits = limits
        self.geometry = geometry
        self._sample_frames = sample_frames if geometry.samples_frames else None
        self._queue = DecodeQueue(
            lanes(workers, video_workers), patience=limits.queue_seconds, max_waiting=limits.max_queued
        )
        self._children = ChildPool(wire.Setup(limits, geometry), allocator, workers + video_workers + spares)
        self._counts = DecoderStats()
        self._open = False

    async def start(self) -> None:
        """Start all children and wait until they are warm. Raises RuntimeError where one cannot be started."""
        await self._children.start()
        self._open = True

    async def close(self) -> None:
        """Kill every child, busy ones included (their requests get NoCapacity), and wait until all are gone."""
        self._open = False
        self._queue.refuse_all(shutting_down)
        await self._children.close()

    @property
    def stats(self) -> DecoderStats:
        children = self._children
        return replace(
            self._counts,
            children=children.pids,
            idle=children.num_idle,
            waiting=self._queue.num_waiting,
            children_started=children.num_started,
        )

    async def decode(
        self, data: bytes, *, kind: Kind | None, num_frames: int | None, fps: float | None, client: str = ""
    ) -> Medium:
        """Decode one file to a Medium: frames (1 or number of frames, height, width, 3) uint8 at the target's geometry.

        kind: what the client says it is; None: detect it (a GIF is then an image). num_frames, fps (frames per second):
        sampling of videos, see sampling.py; images ignore them. client: identifies the sender; files of a client with
        many wait behind those of clients with few.

        Raises BadRequest (empty, broken, too small, too slow, unusable `num_frames` / `fps`), TooLarge,
        UnsupportedMedia, and NoCapacity where no child can be started or too many files wait.
        """
        format = self._check_file(data, kind)
        kind = kind or KIND_OF[format]
        if kind == "video":
            num_frames, fps = self._check_sampling(num_frames, fps)
        if not self._open:
            raise shutting_down()
        share = size_share(data, kind, format, self.limits)
        choose = kind == "video" and format != "FRAME LIST" and self._sample_frames is not None
        job = wire.Job(kind, format, num_frames, fps, self._cpu_seconds(kind, share), choose)
        async with self._queue.lane(kind, share, client):
            return await self._run(job, data)

    def _cpu_seconds(self, kind: Kind, share: float) -> float:
        limits = self.limits
        if kind == "video":
            return float(limits.cpu_seconds)
        return min(limits.image_seconds * max(share, MIN_TIME_SHARE), limits.cpu_seconds)

    def _check_file(self, data: bytes, kind: Kind | None) -> Format:
        """Detect the format. Raises the error of a file that is not worth decoding."""
        if not data:
            raise BadRequest("the medium is empty", code="empty_media")
        if len(data) > self.limits.max_bytes:
            raise TooLarge(
                f"the medium has {len(data)} bytes; at most {self.limits.max_bytes} are allowed", code="too_many_bytes"
            )
        format = sniff(data)
        if format is None:
            name = unsupported_format(data)
            problem = "the medium's format is not known" if name is None else f"{name} is not supported"
            raise UnsupportedMedia(f"{problem}; send {SUPPORTED}")
        if kind is not None and not may_be(format, kind, data):
            raise UnsupportedMedia(f"the medium was sent as {kind} but is a {format} {KIND_OF[format]}")
        return format

    def _check_sampling(self, num_frames: int | None, fps: float | None) -> tuple[int | None, float | None]:
        """Return (num_frames, fps), within their limits."""
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise BadRequest("fps must be a positive number", param="fps")
        if num_frames is not None and not 1 <= num_frames <= self.limits.max_frames:
            raise BadRequest(f"num_frames must be from 1 to {self.limits.max_frames}", param="num_frames")
        return num_frames, None if fps is None else float(fps)

    async def _run(self, job: wire.Job, data: bytes) -> Medium:
        """Run one job; retry it once if its child was killed from outside, by the kernel or an operator."""
        try:
            try:
                medium = await self._attempt(job, data)
            except ChildGone as gone:
                if gone.by_itself:
                    raise
                medium = await self._attempt(job, data)
        except ChildGone:
            if not self._open:
                raise shutting_down() from None
            raise client_error("decoder_crashed", {}) from None
        except Refusal as refusal:
            self._counts = replace(self._counts, refused=self._counts.refused + 1)
            raise client_error(refusal.name, refusal.numbers) from None
        self._counts = replace(self._counts, decoded=self._counts.decoded + 1)
        return medium

    async def _attempt(self, job: wire.Job, data: bytes) -> Medium:
        """Run one job on one child. Raises Refusal, ChildGone and NoCapacity."""
        child = await self._children.borrow()
        keep = False
        try:
            async with asyncio.timeout(self.limits.decode_seconds) as limit:
                question = Question(self._sample_frames, job, limit, self.limits)
                reply, payload = await child.run(job, data, max_reply=self._max_reply(job), choose=question.answer)
            if question.error is not None:
                keep = isinstance(reply, wire.Failed)
                raise question.error
            medium = self._medium(job.kind, reply, payload)
            keep = True
            return medium
        except TimeoutError:
            raise Refusal("out_of_time") from None
        except Refusal as refusal:
            keep = refusal.name not in HARMFUL
            raise
        finally:
            # No await here: this also runs when the client left, and must not be cancelled half-way.
            self._children.release(child, keep=keep and child.num_jobs < self.limits.decodes_per_child)

    def _max_pixels(self, kind: Kind, num_frames: int) -> int:
        """Return how many pixels a correct child may send, all frames together."""
        if (largest := self.geometry.largest(kind, num_frames)) is not None:
            return num_frames * largest
        return self.limits.max_pixels if kind == "image" else max(num_frames, self.limits.max_clip_pixels)

    def _max_reply(self, job: wire.Job) -> int:
        """Return the largest number of bytes that a correct child may send."""
        num_frames = self.limits.max_frames if job.choose or job.num_frames is None else job.num_frames
        return 3 * self._max_pixels(job.kind, 1 if job.kind == "image" else num_frames)

    def _medium(self, kind: Kind, reply: wire.Reply, payload: np.ndarray) -> Medium:
        """Check a child's reply and turn it into a Medium. Raises Refusal, and ChildGone for an inconsistent reply."""
        if isinstance(reply, wire.Failed):
            raise Refusal(reply.name, **reply.numbers)
        if not isinstance(reply, wire.Decoded):
            raise ChildGone(by_itself=True)
        num_frames, height, width, channels = reply.shape
        shape_ok = min(reply.shape) > 0 and channels == 3 and math.prod(reply.shape) == payload.size
        size_ok = payload.size <= 3 * self._max_pixels(kind, num_frames)
        count_ok = num_frames <= self.limits.max_frames if kind == "video" else num_frames == 1
        seconds, times, source = reply.seconds_per_frame, reply.frame_times, reply.source
        times_ok = max(seconds or 0.0, *(times or (0.0,))) <= self.limits.max_video_seconds
        if kind == "image":
            times_ok = seconds is None and times is None and source is None
        elif source is not None:
            times_ok = times_ok and plausible(source, self.limits)
        if not (shape_ok and size_ok and count_ok and times_ok and self.geometry.fits(kind, num_frames, height, width)):
            raise ChildGone(by_itself=True)
        pixels = payload.reshape(reply.shape)
        try:
            return Medium(kind, pixels, seconds, times, source)
        except RequestError:  # times that cannot be
            raise ChildGone(by_itself=True) from None
