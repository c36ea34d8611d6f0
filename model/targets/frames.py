"""How many frames of videos a model's context has room for. Knows nothing of how they are sampled.

Prompts are made of blank frames, so that template, markers and sizes count as they do for a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from model.request import Medium, Message, RequestError
from model.targets.base import Target

SHARE = 0.9  # of the context, that one video may take: the rest is for words and the answer
BOUNDLESS = 100  # times the size of a frame that was scaled down: how large the file was, nobody knows


def most_frames(target: Target, context: int) -> int:
    """Find how many frames of one video take no more than their share of the context, each as small as it may be; at
    least 1."""

    def fits(num_frames: int) -> bool:
        clip = _blank(target, Medium("video", np.empty((1, 1, 1, 3), np.uint8), 1e-3), num_frames, scale=1)
        return _takes(target, (Message("user", (clip,)),), int(SHARE * context))

    most = 1
    while fits(most):
        most *= 2
    return max(1, _largest(fits, most))


def fitting_frames(target: Target, messages: Sequence[Message], room: int) -> int:
    """Find with how many frames of each of its videos a conversation takes no more than `room` tokens, whatever size
    the videos have; 0 where it takes more with one frame of each, or has no video."""
    media = [part for message in messages for part in message.content if isinstance(part, Medium)]

    def fits(num_frames: int) -> bool:
        return _takes(target, [_with_frames(target, message, num_frames) for message in messages], room)

    return _largest(fits, max((len(medium.frames) for medium in media if medium.kind == "video"), default=0))


def _with_frames(target: Target, message: Message, num_frames: int) -> Message:
    content = (
        _blank(target, part, num_frames, scale=BOUNDLESS) if isinstance(part, Medium) and part.kind == "video" else part
        for part in message.content
    )
    return replace(message, content=tuple(content))


def _blank(target: Target, video: Medium, num_frames: int, *, scale: int) -> Medium:
    """So many frames for those of a video, which take no memory; where sizes go by area, as of one so much larger."""
    height, width = video.frames.shape[1:3]
    if (area := target.geometry.video) is not None:
        height, width = area.fitted(scale * height, scale * width, num_frames)
    seconds = video.seconds_per_frame
    return Medium(
        "video",
        np.broadcast_to(np.uint8(0), (num_frames, height, width, 3)),
        seconds and seconds * len(video.frames) / num_frames,
    )


def _takes(target: Target, messages: Sequence[Message], room: int) -> bool:
    try:
        return len(target.prompt(tuple(messages)).ids) <= room
    except RequestError:  # positions may end before the context does
        return False


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, of those that do until one does not; 0 where none does."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))
