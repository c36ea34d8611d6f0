"""Label motion densely: what a layer in the middle of the language model should know about every patch of a clip.

Captions alone teach motion slowly: a clip has thousands of tokens, but only a dozen words about its motion. So for each
patch with an object the model predicts where that object was before. A causal model can, because a frame's tokens
follow those of earlier frames. The head is removed after training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from model.demo.scenes import Scene, Thing
from model.demo.vision import GRID, owners

LAYER = 8  # the head reads the states after this many layers; later layers can use them
REACH = 9  # displacements are in patches, from -REACH to REACH
PLACES = 2 * REACH + 2  # the last class means "was outside the frame"
KINDS = ("still", "move", "enter", "leave", "collide")
MOTION_QUESTIONS: dict[str, int] = {
    "frame": 16,
    "x since the last frame": PLACES,
    "y since the last frame": PLACES,
    "x since the first frame": PLACES,
    "y since the first frame": PLACES,
    "what it does": len(KINDS) + 1,  # "move" counts as two, slow and quick; labelled in the last frame only
}


def _there(thing: Thing, moment: float) -> bool:
    """Return whether an object's centre is inside the frame."""
    return all(0 <= c < 1 for c in thing.at(moment))


def _moved(thing: Thing, then: float, now: float) -> tuple[int, int]:
    """Return an object's displacement in x and y from `then` to `now` as classes; the last class if it was outside."""
    if not _there(thing, then):
        return PLACES - 1, PLACES - 1
    (ax, ay), (bx, by) = thing.at(then), thing.at(now)
    steps = [min(REACH, max(-REACH, round((b - a) * GRID))) + REACH for a, b in ((ax, bx), (ay, by))]
    return steps[0], steps[1]


def motion_labels(scene: Scene, moments: list[float]) -> np.ndarray:
    """Compute the class of every question at every patch: (frames, GRID * GRID, questions) int64.

    -100 marks patches without an object and questions without an answer, such as displacements in the first frame.
    """
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
    """Sum the mean cross-entropy of each question, and compute its accuracy (NaN without labels).

    answers: (patches, sum of the questions' classes). labels: (patches, questions).
    """
    loss, right = torch.zeros(()), []
    for q, answer in enumerate(answers.float().split(list(MOTION_QUESTIONS.values()), -1)):
        labelled = labels[:, q] >= 0
        if labelled.any():
            loss = loss + F.cross_entropy(answer[labelled], labels[labelled, q])
        right.append((answer.argmax(-1) == labels[:, q])[labelled].float().mean().item())
    return loss, right
