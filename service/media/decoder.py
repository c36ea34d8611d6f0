"""Files of strangers to frames at the target's geometry, through a small pool of confined child processes.

A decode waits for its turn (turns.py), borrows a warm child for it (children.py), and gives both back. Clients cannot
starve each other, for four reasons. Pictures and videos have places of their own, and some places take small pictures
only, so no file waits for one of another kind, nor a small picture for large ones. The order of those that wait depends
on their size (work.py reads it from the header), their arrival and the number of files of the same client. A picture
may use processor time in proportion to its size, so a place is soon free again, whatever a file makes of it. And there
are more children than places, so one that was killed is replaced before anybody needs it.

What goes wrong in a child (crash, hang, client gone) costs that child and that request only. An ordinary error of a
decoder costs nothing, see refusal.py. Knows nothing of HTTP; what clients are told is in refusal.py.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

import numpy as np

from model.request import Geometry, Medium
from service.errors import BadRequest, TooLarge, UnsupportedMedia
from service.media import wire
from service.media.children import Children, shutting_down
from service.media.limits import MediaLimits
from service.media.process import ChildGone, Memory
from service.media.refusal import HARMFUL, Refusal, client_error
from service.media.sniff import KIND_OF, Format, Kind, may_be, sniff, unread_format
from service.media.turns import Turns, places
from service.media.work import share_of

READABLE = "JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC images, and MP4, WebM or AVI videos"


SMALLEST_TIME = 1 / 8  # of the processor time for the largest picture: what every picture may use


@dataclass(frozen=True)
class DecoderStats:
    """Counted since `start()`, but for the first three, which are now."""

    children: tuple[int, ...] = ()  # process ids of live children
    idle: int = 0  # warm children without a job
    waiting: int = 0  # files that wait for their turn
    decoded: int = 0
    refused: int = 0  # files that gave a client error inside a child
    children_started: int = 0


class MediaDecoder:
    """`await start()`, any number of concurrent `await decode(...)`, `await close()`."""

    def __init__(
        self,
        limits: MediaLimits,
        geometry: Geometry,
        workers: int = 2,
        memory: Memory | None = None,
        *,
        video_workers: int = 0,
        spares: int = 0,
    ) -> None:
        """workers: images decoded at once. video_workers: videos at once, beside them; 0: they wait in one line.
        spares: children more than that. memory: where pixels are put, while there is room."""
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.limits = limits
        self.geometry = geometry
        self._turns = Turns(
            places(workers, video_workers), patience=limits.queue_seconds, max_waiting=limits.max_queued
        )
        self._children = Children(wire.Setup(limits, geometry), memory, workers + video_workers + spares)
        self._counts = DecoderStats()
        self._open = False

    async def start(self) -> None:
        """Start all children and wait until they are warm. Raises RuntimeError when one cannot be started."""
        await self._children.start()
        self._open = True

    async def close(self) -> None:
        """Kill every child, those at work included (their requests get NoCapacity), and wait until all are gone."""
        self._open = False
        self._turns.refuse_all(shutting_down)
        await self._children.close()

    @property
    def stats(self) -> DecoderStats:
        children = self._children
        return replace(
            self._counts,
            children=children.pids,
            idle=children.num_idle,
            waiting=self._turns.num_waiting,
            children_started=children.num_started,
        )

    async def decode(
        self, data: bytes, *, kind: Kind | None, num_frames: int | None, fps: float | None, client: str = ""
    ) -> Medium:
        """One file to one Medium: frames (1 or number of frames, height, width, 3) uint8 at the target's geometry.

        `kind` is what the client called it; None takes what it is (a GIF is an image, unless called a video).
        `num_frames` and `fps` (frames a second) say which frames of a video are taken, see video.py; images ignore
        them. `client` is whoever sent it: one with many files here waits for others with few.

        Raises BadRequest (empty, broken, too small, too slow, unusable `num_frames` / `fps`), TooLarge,
        UnsupportedMedia, and NoCapacity when there is no child to decode with, or too many files wait.
        """
        format = self._check_file(data, kind)
        kind = kind or KIND_OF[format]
        if kind == "video":
            num_frames, fps = self._check_sampling(format, num_frames, fps)
        if not self._open:
            raise shutting_down()
        share = share_of(data, kind, format, self.limits)
        job = wire.Job(kind, format, num_frames, fps, self._cpu_seconds(kind, share))
        async with self._turns.turn(kind, share, client):
            return await self._run(job, data)

    def _cpu_seconds(self, kind: Kind, share: float) -> float:
        limits = self.limits
        if kind == "video":
            return float(limits.cpu_seconds)
        return min(limits.image_seconds * max(share, SMALLEST_TIME), limits.cpu_seconds)

    def _check_file(self, data: bytes, kind: Kind | None) -> Format:
        if not data:
            raise BadRequest("the medium is empty", code="empty_media")
        if len(data) > self.limits.max_bytes:
            raise TooLarge(
                f"the medium has {len(data)} bytes; at most {self.limits.max_bytes} are allowed", code="too_many_bytes"
            )
        format = sniff(data)
        if format is None:
            name = unread_format(data)
            problem = "the medium is of no type that is read here" if name is None else f"{name} is not supported"
            raise UnsupportedMedia(f"{problem}; send {READABLE}")
        if kind is not None and not may_be(format, kind, data):
            raise UnsupportedMedia(f"the medium was sent as {kind} but is of type {format} ({KIND_OF[format]})")
        return format

    def _check_sampling(
        self, format: Format, num_frames: int | None, fps: float | None
    ) -> tuple[int | None, float | None]:
        """One of the two at most, within its limits; of a list of frames neither means all."""
        if num_frames is not None and fps is not None:
            raise BadRequest("give num_frames or fps, not both", param="fps")
        if fps is not None:
            if not (math.isfinite(fps) and fps > 0):
                raise BadRequest("fps must be a positive number", param="fps")
            return None, float(fps)
        if num_frames is None and format == "FRAME LIST":
            return None, None
        if num_frames is None:
            return min(self.geometry.default_num_frames, self.limits.max_frames), None
        if not 1 <= num_frames <= self.limits.max_frames:
            raise BadRequest(f"num_frames must be from 1 to {self.limits.max_frames}", param="num_frames")
        return num_frames, None

    async def _run(self, job: wire.Job, data: bytes) -> Medium:
        """One job through one child; one that was killed, by the kernel or an operator, is replaced, once."""
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
        """Raises Refusal, ChildGone, and NoCapacity."""
        child = await self._children.borrow()
        keep = False
        try:
            async with asyncio.timeout(self.limits.decode_seconds):
                reply, payload = await child.run(job, data, max_reply=self._max_reply(job))
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
            self._children.give_back(child, keep=keep and child.num_jobs < self.limits.decodes_per_child)

    def _max_reply(self, job: wire.Job) -> int:
        """Bytes of pixels at most; a sane child never sends more."""
        num_frames = 1 if job.kind == "image" else job.num_frames or self.limits.max_frames
        return 3 * num_frames * (self.geometry.largest(job.kind, num_frames) or self.limits.max_pixels)

    def _medium(self, kind: Kind, reply: wire.Reply, payload: np.ndarray) -> Medium:
        """Raises Refusal, and ChildGone when the answer does not fit together: nothing a child says is believed."""
        if isinstance(reply, wire.Refused):
            raise Refusal(reply.name, **reply.numbers)
        if not isinstance(reply, wire.Decoded):
            raise ChildGone(by_itself=True)
        num_frames, height, width, channels = reply.shape
        sane = min(reply.shape) > 0 and channels == 3 and math.prod(reply.shape) == payload.size
        seconds = reply.seconds_per_frame
        timed = seconds is None or (kind == "video" and 0.0 < seconds <= self.limits.max_video_seconds)
        counted = kind == "video" or num_frames == 1
        if not (sane and timed and counted and self.geometry.fits(kind, num_frames, height, width)):
            raise ChildGone(by_itself=True)
        return Medium(kind, payload.reshape(reply.shape), seconds)
