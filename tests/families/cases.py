"""The conversations that every family answers: text, one image of odd size, several images, several turns, a video,
an image after a video."""

from __future__ import annotations

import numpy as np

from model.request import Medium, Message
from tests.families.zoo import Family

QUESTION = "How many objects are there? Count them, then say why, and where, and when they were last seen."


def picture(seed: int, width: int, height: int, frames: int = 1) -> np.ndarray:
    """Return blocks of colour that differ for every seed: (frames, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (frames, -(-height // 12), -(-width // 12), 3), np.uint8)
    return blocks.repeat(12, 1).repeat(12, 2)[:, :height, :width]


def image(seed: int, width: int = 61, height: int = 47) -> Medium:
    """Return an image."""
    return Medium("image", picture(seed, width, height))


def video(seed: int, width: int = 84, height: int = 56, frames: int = 5) -> Medium:
    """Return a video of two frames a second, of which some frames are the same."""
    frames_ = picture(seed, width, height, frames)
    frames_[2] = frames_[1]
    return Medium("video", frames_, 0.5)


def conversations(family: Family) -> dict[str, tuple[Message, ...]]:
    """Return the conversations of a family by their names."""
    found = {
        "text": (Message("user", (QUESTION,)),),
        "image": (Message("user", (image(1), "Describe the image. What do you see?")),),
        "turns": (
            Message("system", ("Answer in few words.",)),
            Message("user", (image(4, 61, 47), "What is in the image?")),
            Message("assistant", ("A red circle to the left of a blue square.",)),
            Message("user", ("Which is larger? Say it in a few words, please.",)),
            Message("assistant", ("The square.",)),
            Message("user", (image(5, 47, 90) if family.several else "And now?", "Is it here as well?")),
        ),
    }
    if family.several:
        found["images"] = (
            Message("user", (image(2, 61, 47), "Here is one, and", image(3, 100, 33), " another. Compare them.")),
        )
    if family.video:
        found["video"] = (Message("user", (video(6), "What do you see in the video?")),)
    if family.video and family.mixed:
        found["mixed"] = (
            Message("user", (video(7, 56, 84, frames=3), "Is this picture from the clip?", image(8, 61, 47), "Say.")),
        )
    return found
