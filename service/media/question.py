"""Answer a decoding child's question which frames of a video are wanted, by asking the target. Knows no processes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from model.request import VideoMetadata
from service.errors import EngineFailure, ServiceError
from service.media.child_process import ChildGone
from service.media.limits import MediaLimits
from service.media.wire import Job

# Returns the indices of the frames that the target wants, given num_frames or fps; None: it leaves the choice to us.
SampleFrames = Callable[[VideoMetadata, int | None, float | None], Awaitable[Sequence[int] | None]]


class Question:
    """Answers for one job. `error` is why the target has not answered."""

    def __init__(
        self, sample_frames: SampleFrames | None, job: Job, limit: asyncio.Timeout, limits: MediaLimits
    ) -> None:
        """sample_frames: asks the target; None: no correct child asks; limit: on the time for decoding, in which
        waiting for the target does not count."""
        self.error: ServiceError | None = None
        self._sample_frames, self._job, self._limit, self._limits = sample_frames, job, limit, limits

    async def answer(self, source: VideoMetadata) -> tuple[int, ...] | None:
        """Return the indices of the wanted frames; none at all where there is an error, which ends the job.

        A target is asked for no more frames than there are, since some processors refuse to repeat any. Raises
        ChildGone for a video that no correct child can have read.
        """
        if self._sample_frames is None or not plausible(source, self._limits):
            raise ChildGone(by_itself=True)
        num_frames = None if self._job.fps is not None else self._job.num_frames
        num_frames = num_frames and min(num_frames, source.total_frames)
        end, loop = self._limit.when(), asyncio.get_running_loop()
        begun = loop.time()
        self._limit.reschedule(None)
        try:
            chosen = await self._sample_frames(source, num_frames, self._job.fps)
            if chosen is not None and not (chosen and min(chosen) >= 0 and max(chosen) < source.total_frames):
                raise EngineFailure("the model's processor chose frames that the video does not have")
        except ServiceError as error:
            self.error, chosen = error, ()
        self._limit.reschedule(end and end + loop.time() - begun)
        return chosen if chosen is None else tuple(chosen)


def plausible(source: VideoMetadata, limits: MediaLimits) -> bool:
    """Return whether a correct child may have read this from a video."""
    rate_ok, duration_ok = (value is None or 0.0 < value < math.inf for value in (source.fps, source.duration))
    sides_ok = all(0 <= side <= limits.max_side for side in (source.width, source.height))
    return rate_ok and duration_ok and sides_ok and 1 <= source.total_frames <= limits.max_source_frames
