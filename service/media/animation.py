"""Play an animated WebP or AVIF with Pillow. Same interface as clip.py's Clip.

PyAV has no demuxer for such a WebP; of an AVIF it plays colours and transparency as two videos.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from service.media.clip import Clip, Deadline
from service.media.container import PartCounter, riff_chunks, webp_size
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sampling import Timeline
from service.media.sniff import Format

MIN_SECONDS, SECONDS_INSTEAD = 0.011, 0.1  # browsers show a frame of a shorter duration for a tenth of a second
ALPHA = 0x10  # of the flags in VP8X


class Animation:
    """An animated WebP or AVIF file."""

    def __init__(self, data: bytes, format: Format, limits: MediaLimits, deadline: Deadline) -> None:
        """Read when frames are shown, without decoding. Raises Refusal for too many or too long ones."""
        self._data, self._format, self._limits, self._deadline = data, format, limits, deadline
        if format == "AVIF":
            clip = Clip(data, format, limits, deadline)
            self.size, self.rate, self.timeline = clip.size, clip.rate, clip.announced()
        else:
            self.size, self.rate, self.timeline = webp_size(data) or (0, 0), None, self._timeline()

    def take(
        self, choose: Callable[[Timeline], Sequence[int]], convert: Callable[[Image.Image], np.ndarray]
    ) -> tuple[Timeline, dict[int, np.ndarray]]:
        """Return the timeline, and by index what `convert` makes of each frame that `choose` picks from it."""
        wanted = set(choose(self.timeline))
        arrays: dict[int, np.ndarray] = {}
        file = io.BytesIO(self._data)
        if self._data[12:16] == b"VP8X":  # the canvas is transparent even if the header denies it
            file.seek(20)
            file.write(bytes([self._data[20] | ALPHA]))
        with Image.open(file, formats=[self._format]) as image:
            for index in range(max(wanted) + 1):  # each frame depends on the previous one
                self._deadline.check()
                image.seek(index)
                if index in wanted:
                    arrays[index] = convert(image)
        return self.timeline, arrays

    def _timeline(self) -> Timeline:
        """Return when the frames of a WebP are shown. Raises Refusal."""
        seconds = np.array(list(self._durations()))
        if not len(seconds):
            raise Refusal("no_frames")
        ends = np.cumsum(np.where(seconds < MIN_SECONDS, SECONDS_INSTEAD, seconds))
        longest = self._limits.max_video_seconds
        if ends[-1] > longest:
            raise Refusal("too_long", seconds=int(ends[-1]), max_video_seconds=int(longest))
        return Timeline(np.append(0.0, ends[:-1]), float(ends[-1]))

    def _durations(self) -> Iterator[float]:
        """Yield the seconds of each frame; an ANMF chunk has its duration, in milliseconds, at byte 12."""
        counter = PartCounter("too_many_source_frames", max_source_frames=self._limits.max_source_frames)
        for name, start, _ in riff_chunks(self._data, 12, len(self._data), counter):
            if name == b"ANMF":
                yield int.from_bytes(self._data[start + 12 : start + 15], "little") / 1000
