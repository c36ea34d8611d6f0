"""An animated WebP, played: what PyAV has no reader for, Pillow has. Same interface as clip.py's Clip."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from service.media.clip import Deadline, Timeline
from service.media.container import webp_size
from service.media.limits import MediaLimits
from service.media.refusal import Refusal

SHORTEST, INSTEAD = 0.011, 0.1  # seconds: browsers show what is to last less for a tenth
ALPHA = 0x10  # of the flags in VP8X


class Animation:
    def __init__(self, data: bytes, limits: MediaLimits, deadline: Deadline) -> None:
        """Read the frames' headers, decode none."""
        self._data, self._limits, self._deadline = data, limits, deadline
        self.size = webp_size(data) or (0, 0)
        seconds = np.array(list(self._durations()))
        if not len(seconds):
            raise Refusal("no_frames")
        ends = np.cumsum(np.where(seconds < SHORTEST, INSTEAD, seconds))
        if ends[-1] > limits.max_video_seconds:
            raise Refusal("too_long", seconds=int(ends[-1]), max_video_seconds=int(limits.max_video_seconds))
        self.timeline = Timeline(np.append(0.0, ends[:-1]), float(ends[-1]))

    def take(
        self, choose: Callable[[Timeline], Sequence[int]], convert: Callable[[Image.Image], np.ndarray]
    ) -> tuple[Timeline, dict[int, np.ndarray]]:
        wanted = set(choose(self.timeline))
        arrays: dict[int, np.ndarray] = {}
        file = io.BytesIO(self._data)
        if self._data[12:16] == b"VP8X":  # the canvas is clear whether or not the header says that frames are
            file.seek(20)
            file.write(bytes([self._data[20] | ALPHA]))
        with Image.open(file, formats=["WEBP"]) as image:
            for index in range(max(wanted) + 1):  # each is drawn upon the one before it
                self._deadline.check()
                image.seek(index)
                if index in wanted:
                    arrays[index] = convert(image)
        return self.timeline, arrays

    def _durations(self) -> Iterator[float]:
        """Seconds of each frame: RIFF [size] "WEBP", then chunks, of which ANMF have a duration at byte 12."""
        at, count = 12, 0
        while at + 8 <= len(self._data):
            count += 1
            if count > self._limits.max_source_frames:
                raise Refusal("too_many_source_frames", max_source_frames=self._limits.max_source_frames)
            size = int.from_bytes(self._data[at + 4 : at + 8], "little")
            if self._data[at : at + 4] == b"ANMF":
                yield int.from_bytes(self._data[at + 20 : at + 23], "little") / 1000
            at += 8 + size + size % 2
