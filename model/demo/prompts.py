"""Prompts about the demo's scenes by number: what the draft is trained on, and what is measured on.

Numbers are split by kind so that a batch can be of one kind: image caption, image question, video caption, video
question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from model.demo import captions, scenes
from model.request import Medium, Message

Task = Literal["image caption", "image question", "video caption", "video question"]
TASKS: tuple[Task, ...] = ("image caption", "image question", "video caption", "video question")
# Of every ten prompts; captions are long, so they are most of the tokens.
_CYCLE: tuple[Task, ...] = (
    "image caption", "video caption", "image question", "image caption", "video caption",
    "image caption", "video question", "image caption", "video caption", "image question",
)  # fmt: skip
SIDE = 192
NUM_FRAMES = 6


def task_of(number: int) -> Task:
    return _CYCLE[number % len(_CYCLE)]


def messages(
    number: int, *, split: Literal["train", "heldout"] = "train", task: Task | None = None
) -> tuple[Message, ...]:
    """The conversation of prompt `number`: one medium and one question about it."""
    rng = random.Random(f"{split} {number} {task}")
    task = task or task_of(number)
    kind: Literal["image", "video"] = "image" if task.startswith("image") else "video"
    # Far from the scenes that the target was trained on, so that the draft sees what the target does with new ones.
    seed = scenes.scene_seed(split, kind, number + (5_000_000 if split == "train" else 100_000))
    if kind == "image":
        scene = scenes.random_image_scene(seed)
        frames = scenes.render(scene, SIDE)[None]
        turn = captions.image_turn(scene, rng, caption=task == "image caption")
    else:
        scene = scenes.random_video_scene(seed)
        frames = scenes.render_clip(scene, NUM_FRAMES, SIDE)
        turn = captions.video_turn(scene, rng, caption=task == "video caption")
    return (Message("user", (Medium(kind, frames), turn.question)),)


HELD_OUT = 1_000_000_000  # the first number of a held-out prompt; they take turns by task


@dataclass(frozen=True)
class Scenes:
    """`model.train.data.Prompts`: so many to learn from, and so many of each task to measure on."""

    examples: int
    each: int = 32

    @property
    def train(self) -> range:
        return range(self.examples)

    @property
    def held_out(self) -> range:
        return range(HELD_OUT, HELD_OUT + len(TASKS) * self.each)

    @property
    def digest(self) -> str:
        return f"scenes {self.examples}"

    @property
    def summary(self) -> str:
        return f"{self.examples} drawn scenes with questions; {self.each} others of each task held out"

    def messages(self, number: int) -> tuple[Message, ...]:
        if number < HELD_OUT:
            return messages(number)
        return messages((number - HELD_OUT) // len(TASKS), split="heldout", task=self.kind(number))

    def kind(self, number: int) -> Task:
        return task_of(number) if number < HELD_OUT else TASKS[(number - HELD_OUT) % len(TASKS)]
