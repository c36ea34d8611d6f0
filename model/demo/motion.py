"""Dense labels of motion: what a language model half way up should know of every patch of a clip.

Captions alone teach it to see motion as slowly as they teach a tower to see shapes: a clip has thousands of tokens, and
a dozen words about what moved. So each patch with an object is asked where that object was before. A causal model can
answer, for a frame's tokens follow those of the frames before it. The head is thrown away after training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from model.demo.scenes import Scene, Thing
from model.demo.vision import GRID, owners

LAYER = 8  # the states after this many of the language model's layers are asked; those above read the answers
REACH = 9  # displacements are told in patches, from -REACH to REACH
PLACES = 2 * REACH + 2  # and one class for "was not in the frame"
KINDS = ("still", "move", "enter", "leave", "collide")
MOTION_QUESTIONS: dict[str, int] = {
    "frame": 16,
    "x since the last frame": PLACES,
    "y since the last frame": PLACES,
    "x since the first frame": PLACES,
    "y since the first frame": PLACES,
    "what it does": len(KINDS) + 1,  # "move" is two kinds, slow and quick; asked in the last frame only
}


def _there(thing: Thing, moment: float) -> bool:
    return all(0 <= c < 1 for c in thing.at(moment))


def _moved(thing: Thing, then: float, now: float) -> tuple[int, int]:
    if not _there(thing, then):
        return PLACES - 1, PLACES - 1
    (ax, ay), (bx, by) = thing.at(then), thing.at(now)
    steps = [min(REACH, max(-REACH, round((b - a) * GRID))) + REACH for a, b in ((ax, bx), (ay, by))]
    return steps[0], steps[1]


def motion_labels(scene: Scene, moments: list[float]) -> np.ndarray:
    """Class of every question at every patch: (frames, GRID * GRID, questions) int64; -100 where nothing is asked."""
    labels = np.full((len(moments), GRID, GRID, len(MOTION_QUESTIONS)), -100, np.int64)
    for f, now in enumerate(moments):
        owner = owners(scene, now)
        for index, thing in enumerate(scene.things):
            kind = KINDS.index(thing.motion.kind) if thing.motion.speed != "quickly" else len(KINDS)
            labels[f, owner == index] = (
                min(f, MOTION_QUESTIONS["frame"] - 1),
                *(_moved(thing, moments[f - 1], now) if f else (-100, -100)),
                *(_moved(thing, moments[0], now) if f else (-100, -100)),
                kind if f == len(moments) - 1 else -100,
            )
    return labels.reshape(len(moments), GRID * GRID, -1)


def motion_loss(answers: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Mean cross-entropy over the questions, and the share of patches told right for each; NaN where none was asked.

    answers: (patches, sum of the questions' classes), labels: (patches, questions).
    """
    loss, right = torch.zeros(()), []
    for q, answer in enumerate(answers.float().split(list(MOTION_QUESTIONS.values()), -1)):
        labelled = labels[:, q] >= 0
        if labelled.any():
            loss = loss + F.cross_entropy(answer[labelled], labels[labelled, q])
        right.append((answer.argmax(-1) == labels[:, q])[labelled].float().mean().item())
    return loss, right
