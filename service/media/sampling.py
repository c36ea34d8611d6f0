"""Choose the frames that are taken of a video. Runs in a decoding child; knows nothing of files or pixels.

Where the target chooses, its choice is taken. Otherwise:

- `num_frames=n`: n frames spread evenly from the first to the last, both included (n = 1: the first). A clip with fewer
  frames repeats the nearest ones, so that there are always n.
- `fps=f`: the frames on screen at the times 0, 1/f, 2/f, ... within the clip, each at most once; a rate above the
  clip's own gives every frame. With both, at most `num_frames`, spread evenly where there are more.
- neither: the target's default number, spread evenly; all frames of a list.

More than `max_frames` become `max_frames` spread evenly, so that the end of the clip is never cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.request import Geometry, VideoMetadata
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.wire import Job

ROUNDING = 1.5e-3  # seconds by which a container's times may differ from an even rate: Matroska rounds to milliseconds

# The target's choice; None: it leaves it to the job; empty: it cannot choose, and the job ends.
Choose = Callable[[VideoMetadata], Sequence[int] | None]


@dataclass(frozen=True)
class Timeline:
    """starts: (frames,) seconds at which each appears, strictly ascending from 0; end: of the last, in seconds."""

    starts: np.ndarray
    end: float

    def described(self, claimed_rate: float | None, size: tuple[int, int]) -> tuple[VideoMetadata, np.ndarray]:
        """Return the metadata of a clip with these frames, and when each appears, without the container's rounding.

        claimed_rate: frames per second as the container says, which is believed where the times agree; size: (width,
        height).
        """
        count, last = len(self.starts), float(self.starts[-1])
        numbers = np.arange(count)
        for rate in (claimed_rate, round((count - 1) / last, 6)) if count > 1 else ():
            if rate and np.abs(self.starts - numbers / rate).max() <= min(ROUNDING, 0.25 / rate):
                return VideoMetadata(count, rate, count / rate, *size), numbers / rate
        duration = self.end or None
        return VideoMetadata(count, duration and count / duration, duration, *size), self.starts


class Sampler:
    """Chooses the frames of one video as often as its timeline changes; `source`, `indices` and `times` are the last
    result."""

    def __init__(self, job: Job, limits: MediaLimits, geometry: Geometry, choose: Choose | None) -> None:
        """choose: asks the target; None: it does not choose."""
        self._job, self._max_frames, self._choose = job, most_frames(job, limits), choose
        self._default = min(geometry.default_num_frames, limits.max_frames)
        self._timeline: Timeline | None = None
        self.source: VideoMetadata
        self.indices: list[int]
        self.times: tuple[float, ...]

    def sample(self, timeline: Timeline, claimed_rate: float | None, size: tuple[int, int]) -> list[int]:
        """Return the indices of the wanted frames, ascending. See `Timeline.described` for the arguments."""
        known, self._timeline = self._timeline, timeline
        if known is not None and known.end == timeline.end and np.array_equal(known.starts, timeline.starts):
            return self.indices
        self.source, times = timeline.described(claimed_rate, size)
        chosen = self._choose(self.source) if self._choose is not None else None
        if chosen is not None and not chosen:
            raise Refusal("not_sampled")
        indices = self._by_job(timeline) if chosen is None else thinned(np.sort(chosen), self._max_frames)
        self.indices = indices.tolist()
        self.times = tuple(times[indices].tolist())
        return self.indices

    @property
    def seconds_per_frame(self) -> float | None:
        """Return the mean seconds between the sampled frames; None for a single one."""
        if self._timeline is None:
            return None
        span = float(self._timeline.starts[self.indices[-1]] - self._timeline.starts[self.indices[0]])
        return span / (len(self.indices) - 1) if span > 0 else None

    def _by_job(self, timeline: Timeline) -> np.ndarray:
        job, count = self._job, len(timeline.starts)
        if job.fps is not None:
            return at_rate(timeline.starts, timeline.end, job.fps, self._max_frames)
        return spread(count, job.num_frames or self._default)


def most_frames(job: Job, limits: MediaLimits) -> int:
    """Return how many frames may be taken at a rate."""
    return limits.max_frames if job.fps is None or job.num_frames is None else min(job.num_frames, limits.max_frames)


def spread(total: int, count: int) -> np.ndarray:
    """Return `count` indices spread evenly from 0 to `total - 1`, rounded to the nearest (halves up)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    steps, last = count - 1, total - 1
    return (2 * np.arange(count, dtype=np.int64) * last + steps) // (2 * steps)  # integers: no rounding surprises


def thinned(indices: np.ndarray, most: int) -> np.ndarray:
    """Return these indices, or `most` of them spread evenly."""
    return indices if len(indices) <= most else indices[spread(len(indices), most)]


def at_rate(starts: np.ndarray, seconds: float, fps: float, max_frames: int) -> np.ndarray:
    """Return the indices of the frames on screen at the times k / fps, at most `max_frames`.

    starts: (frames,) seconds since the first, ascending; seconds: the end of the last.
    """
    tolerance = 1e-3  # seconds; Matroska rounds times to milliseconds
    edges = np.append(starts, max(seconds, 2 * tolerance)) - tolerance  # frame i is on screen from i to i + 1
    samples = np.ceil(edges.clip(0.0) * min(fps, 1e9))  # sample times before each edge; the bound keeps them finite
    indices = np.flatnonzero(np.diff(samples))
    return indices if len(indices) <= max_frames else spread(len(starts), max_frames)
