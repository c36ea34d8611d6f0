"""Files of strangers to frames at the target's geometry, through a small pool of confined child processes.

The pool is a queue of slots, each with one warm child; a decode borrows a slot. What goes wrong in a child (crash,
hang, broken file, client gone) costs that child and that request only: the slot gets a new child in the background.
Knows nothing of HTTP; what clients are told is in refusal.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np

from model.request import Geometry, Medium
from service.errors import BadRequest, NoCapacity, ServiceError, TooLarge, UnsupportedMedia
from service.media import wire
from service.media.limits import MediaLimits
from service.media.process import Child, ChildGone, Memory
from service.media.refusal import HARMLESS, Refusal, client_error
from service.media.sniff import KIND_OF, Format, Kind, sniff

READABLE = "JPEG, PNG, WebP, GIF or BMP images, and MP4, WebM or AVI videos"


@dataclass
class _Slot:
    child: Child | None = None


@dataclass(frozen=True)
class DecoderStats:
    """Counted since `start()`, but for `children` and `idle`, which are now."""

    children: tuple[int, ...] = ()  # process ids of live children
    idle: int = 0  # slots that wait for a job
    decoded: int = 0
    refused: int = 0  # files that gave a client error inside a child
    children_started: int = 0


class MediaDecoder:
    """`await start()`, any number of concurrent `await decode(...)`, `await close()`."""

    def __init__(self, limits: MediaLimits, geometry: Geometry, workers: int = 2, memory: Memory | None = None) -> None:
        """memory: where pixels are put, while there is room."""
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.limits = limits
        self.geometry = geometry
        self._setup, self._memory = wire.Setup(limits, geometry), memory
        self._slots = tuple(_Slot() for _ in range(workers))
        self._free: asyncio.Queue[_Slot] = asyncio.Queue()
        self._renewals: set[asyncio.Task[None]] = set()
        self._counts = DecoderStats()
        self._open = False

    async def start(self) -> None:
        """Start all children and wait until they are warm. Raises RuntimeError when one cannot be started."""
        results = await asyncio.gather(*(self._start_child(slot) for slot in self._slots), return_exceptions=True)
        for slot in self._slots:
            self._free.put_nowait(slot)
        self._open = True
        if failed := [result for result in results if isinstance(result, BaseException)]:
            await self.close()
            raise RuntimeError("media decoding children do not start; see standard error") from failed[0]

    async def close(self) -> None:
        """Kill every child, those at work included (their requests get NoCapacity), and wait until all are gone."""
        if not self._open:
            return
        self._open = False
        for slot in self._slots:
            if slot.child is not None:
                slot.child.kill()
        # Waiting decodes come before us in the queue; each sees that we are closed and passes its slot on.
        for _ in self._slots:
            slot = await self._free.get()
            await self._discard(slot)
        for task in tuple(self._renewals):
            await task

    @property
    def stats(self) -> DecoderStats:
        children = tuple(slot.child.pid for slot in self._slots if slot.child is not None and slot.child.alive)
        return replace(self._counts, children=children, idle=self._free.qsize())

    async def decode(self, data: bytes, *, kind: Kind | None, num_frames: int | None, fps: float | None) -> Medium:
        """One file to one Medium: frames (1 or number of frames, height, width, 3) uint8 at the target's geometry.

        `kind` is what the client called it; None takes what it is (a GIF is an image, unless called a video).
        `num_frames` and `fps` (frames a second) say which frames of a video are taken, see video.py; images ignore
        them.

        Raises BadRequest (empty, broken, too small, too slow, unusable `num_frames` / `fps`), TooLarge,
        UnsupportedMedia, and NoCapacity when there is no child to decode with.
        """
        format = self._check_file(data, kind)
        kind = kind or KIND_OF[format]
        if kind == "video":
            num_frames, fps = self._check_sampling(format, num_frames, fps)
        return await self._run(wire.Job(kind, format, num_frames, fps), data)

    def _check_file(self, data: bytes, kind: Kind | None) -> Format:
        if not data:
            raise BadRequest("the medium is empty", code="empty_media")
        if len(data) > self.limits.max_bytes:
            raise TooLarge(
                f"the medium has {len(data)} bytes; at most {self.limits.max_bytes} are allowed", code="too_many_bytes"
            )
        format = sniff(data)
        if format is None:
            raise UnsupportedMedia(f"the medium is of no type that is read here; send {READABLE}")
        if kind is not None and KIND_OF[format] != kind and (format, kind) != ("GIF", "video"):
            raise UnsupportedMedia(f"the medium was sent as {kind} but is a {format} {KIND_OF[format]}")
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
        if not self._open:
            raise self._closed()
        slot = await self._free.get()
        keep = False
        try:
            for last_try in (False, True):
                child = await self._ready_child(slot)
                try:
                    async with asyncio.timeout(self.limits.decode_seconds):
                        reply, payload = await child.run(job, data, max_reply=self._max_reply(job))
                    medium = self._medium(job.kind, reply, payload)
                except TimeoutError:
                    raise client_error("out_of_time", {}) from None
                except ChildGone as gone:
                    if not self._open:
                        raise self._closed() from None
                    if gone.by_itself or last_try:
                        raise client_error("decoder_crashed", {}) from None
                    await self._discard(slot)
                else:
                    keep = child.num_jobs < self.limits.decodes_per_child
                    self._counts = replace(self._counts, decoded=self._counts.decoded + 1)
                    return medium
            raise AssertionError("the last try returns or raises")
        except Refusal as refusal:
            keep = refusal.name in HARMLESS and child.num_jobs < self.limits.decodes_per_child
            self._counts = replace(self._counts, refused=self._counts.refused + 1)
            raise client_error(refusal.name, refusal.numbers) from None
        finally:
            # No await here: this also runs when the client left, and must not be cancelled half-way.
            self._give_back(slot, keep=keep and self._open)

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

    async def _ready_child(self, slot: _Slot) -> Child:
        """The slot's child, or a new one where it has none or a dead one."""
        if not self._open:
            raise self._closed()
        if slot.child is not None and slot.child.alive:
            return slot.child
        try:
            return await self._start_child(slot)
        except (OSError, ChildGone):
            raise NoCapacity("media cannot be decoded at the moment") from None

    async def _start_child(self, slot: _Slot) -> Child:
        """Raises OSError (TimeoutError is one) or ChildGone. The slot has its child from the first moment on, so that
        `close()` can kill it while it starts."""
        await self._discard(slot)
        slot.child = child = await Child.spawn(self._setup, self._memory)
        try:
            async with asyncio.timeout(self.limits.start_seconds):
                await child.ready()
        except (OSError, ChildGone):
            await self._discard(slot)
            raise
        self._counts = replace(self._counts, children_started=self._counts.children_started + 1)
        return child

    def _give_back(self, slot: _Slot, *, keep: bool) -> None:
        """Return a slot to the queue: at once with its child, or in the background with a new one."""
        if keep:
            self._free.put_nowait(slot)
            return
        if slot.child is not None:
            slot.child.kill()
        task = asyncio.create_task(self._renew(slot))
        self._renewals.add(task)
        task.add_done_callback(self._renewals.discard)

    async def _renew(self, slot: _Slot) -> None:
        try:
            await self._discard(slot)
            if self._open:
                with contextlib.suppress(OSError, ChildGone):
                    await self._start_child(slot)  # failing that, the next decode tries again
        finally:
            self._free.put_nowait(slot)

    async def _discard(self, slot: _Slot) -> None:
        """Kill and reap the slot's child, if it has one."""
        if slot.child is not None:
            slot.child.kill()
            await slot.child.reap()
            slot.child = None

    @staticmethod
    def _closed() -> ServiceError:
        return NoCapacity("the service is shutting down")
