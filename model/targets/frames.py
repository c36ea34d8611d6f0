"""Computes how many frames of a video fit the model's context. Knows nothing of how frames are sampled.

It builds prompts of blank frames, so that template, markers and sizes count as they do for a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from model.request import Medium, Message, RequestError
from model.targets.base import Target

SHARE = 0.9  # share of the context for one video; the rest is for text and the answer
BOUNDLESS = 100  # assumed scale of a file over its decoded frames, whose original size is unknown


def most_frames(target: Target, context: int) -> int:
    """Find how many frames of one video fit its share of the context at the smallest possible frame size; at least
    1."""

    if (estimate := getattr(target, "most_frames", None)) is not None:  # its processor takes a while for many frames
        return int(estimate(int(SHARE * context)))

    def fits(num_frames: int) -> bool:
        """Return whether a video of so many frames fits."""
        clip = _blank(target, Medium("video", np.empty((1, 1, 1, 3), np.uint8), 1e-3), num_frames, scale=1)
        return _takes(target, (Message("user", (clip,)),), int(SHARE * context))

    most = 1
    while fits(most):
        most *= 2
    return max(1, _largest(fits, most))


def fitting_frames(target: Target, messages: Sequence[Message], room: int) -> int:
    """Find how many frames per video a conversation can have within `room` tokens, regardless of the size of the
    videos' files.

    Returns 0 if one frame each is too much, or if there is no video; also where the target's processor resizes, since
    it would process every medium anew for every number that is tried.
    """
    if target.geometry.depends_on_file:
        return 0
    media = [part for message in messages for part in message.content if isinstance(part, Medium)]

    def fits(num_frames: int) -> bool:
        """Return whether the conversation fits with so many frames per video."""
        return _takes(target, [_with_frames(target, message, num_frames) for message in messages], room)

    return _largest(fits, max((len(medium.frames) for medium in media if medium.kind == "video"), default=0))


def _with_frames(target: Target, message: Message, num_frames: int) -> Message:
    """Replace the videos of a message by blank ones of `num_frames` frames."""
    content = (
        _blank(target, part, num_frames, scale=BOUNDLESS) if isinstance(part, Medium) and part.kind == "video" else part
        for part in message.content
    )
    return replace(message, content=tuple(content))


def _blank(target: Target, video: Medium, num_frames: int, *, scale: int) -> Medium:
    """Build a blank video of `num_frames` frames that takes no memory. If sizes go by area, frames are sized as for a
    video `scale` times as large."""
    height, width = video.frames.shape[1:3]
    if (area := target.geometry.video) is not None:
        height, width = area.fitted(scale * height, scale * width, num_frames)
    seconds, times = video.seconds_per_frame, video.frame_times
    return replace(
        video,
        frames=np.broadcast_to(np.uint8(0), (num_frames, height, width, 3)),
        seconds_per_frame=seconds and seconds * len(video.frames) / num_frames,
        frame_times=times and tuple(np.linspace(times[0], times[-1], num_frames).tolist()),
    )


def _takes(target: Target, messages: Sequence[Message], room: int) -> bool:
    """Return whether the prompt of these messages takes at most `room` tokens."""
    try:
        return len(target.prompt(tuple(messages)).ids) <= room
    except RequestError:  # positions may end before the context does
        return False


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to `most` that fits; 0 if none does. `fits` must be monotonic."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))
