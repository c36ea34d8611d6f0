"""Generate prompts about the demo's scenes by number, for training and for measuring drafts.

Numbers are split by kind, so that a batch can have one kind: image caption, image question, video caption, video
question. Drafts also train on two images at once, on long videos, and on answers that follow a JSON schema, which
serving brings.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.demo import captions, scenes, schemas
from model.request import Grammar, Medium, Message

Split = Literal["train", "heldout"]

Task = Literal["image caption", "image question", "video caption", "video question"]
Form = Literal["image, JSON", "video, JSON"]  # answers that follow a schema
Kind = Task | Form | Literal["two images", "long video"]
TASKS: tuple[Task, ...] = ("image caption", "image question", "video caption", "video question")
# Tasks of ten successive prompts. Captions are long, so they make up most of the tokens.
_CYCLE: tuple[Task, ...] = (
    "image caption", "video caption", "image question", "image caption", "video caption",
    "image caption", "video question", "image caption", "video caption", "image question",
)  # fmt: skip
SIDE = 192
NUM_FRAMES = 6
KINDS: tuple[Kind, ...] = (*TASKS, "two images", "long video")
FORMS: tuple[Form, ...] = ("image, JSON", "video, JSON")
LONG_FRAMES = {"demo": 24, "demo-qwen": 64}  # as many as fit into each model's context
ROOM = 4096  # positions of a sequence with that many frames


def task_of(number: int) -> Task:
    """Return the task of a training prompt."""
    return _CYCLE[number % len(_CYCLE)]


def messages(number: int, *, split: Split = "train", task: Task | None = None) -> tuple[Message, ...]:
    """Return the conversation of prompt `number`: one medium and one question about it."""
    rng = random.Random(f"{split} {number} {task}")
    task = task or task_of(number)
    kind: Literal["image", "video"] = "image" if task.startswith("image") else "video"
    # The target was trained on lower numbers, so the draft learns its answers about new scenes.
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


def two_images(number: int, split: Split) -> tuple[Message, ...]:
    """Return a prompt with two images that asks for a description of one of them."""
    rng = random.Random(f"{split} {number} two images")
    seed = 7_000_000 + 2 * number
    pair = [scenes.random_image_scene(scenes.scene_seed(split, "image", seed + i)) for i in range(2)]
    media = [Medium("image", scenes.render(scene, SIDE)[None]) for scene in pair]
    return (Message("user", (*media, f"Describe the {rng.choice(('first', 'second'))} image.")),)


def long_video(number: int, split: Split, frames: int) -> tuple[Message, ...]:
    """Return a prompt that asks for a caption of a clip of `frames` frames."""
    rng = random.Random(f"{split} {number} long video")
    clip = scenes.random_video_scene(scenes.scene_seed(split, "video", 7_000_000 + 2 * number))
    turn = captions.video_turn(clip, rng, caption=True)
    return (Message("user", (Medium("video", scenes.render_clip(clip, frames, SIDE)), turn.question)),)


def in_json(number: int, split: Split, form: Form) -> tuple[Message, ...]:
    """Return a prompt whose answer follows a schema. Some mention that, as people do."""
    rng = random.Random(f"{split} {number} {form}")
    tasks: tuple[Task, Task] = ("image caption", "image question")
    if form == "video, JSON":
        tasks = "video caption", "video question"
    (message,) = messages(number, split=split, task=tasks[rng.random() >= 0.8])
    medium, question = message.content
    return (Message("user", (medium, f"{question}{rng.choice(('', '', rng.choice(_MENTIONS)))}")),)


_MENTIONS = (" Answer in JSON.", " Return JSON.", " Answer with a JSON object.")
FORMED = 500_000_000  # the number of the first training prompt whose answer follows a schema
HELD_OUT = 1_000_000_000  # the number of the first held-out prompt
_WIDER: dict[int, Kind] = {7: "two images", 13: "two images", 17: "long video"}  # in every twenty training prompts


@dataclass(frozen=True)
class Scenes:
    """Offer drawn scenes as `model.train.data.Prompts`.

    examples: number of training prompts with free answers. frames: frames of a long video. each: number of held-out
    prompts of each kind. formed: number of training prompts whose answers follow schemas.
    """

    examples: int
    frames: int
    each: int = 32
    formed: int = 0

    @property
    def train(self) -> Sequence[int]:
        """Return the numbers of the training prompts."""
        return [*range(self.examples), *range(FORMED, FORMED + self.formed)]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds that prompts are of."""
        return KINDS + FORMS if self.formed else KINDS

    @property
    def held_out(self) -> range:
        """Return the numbers of the held-out prompts, of all kinds in turn."""
        return range(HELD_OUT, HELD_OUT + len(self.kinds) * self.each)

    @property
    def digest(self) -> str:
        """Identify the prompts by their parameters."""
        formed = f", {self.formed} under schemas" if self.formed else ""
        return f"scenes {self.examples}, long videos of {self.frames} frames{formed}"

    @property
    def summary(self) -> str:
        """Describe the data in one line for the model card."""
        formed = f"; {self.formed} more whose answers follow JSON schemas" if self.formed else ""
        return (
            f"{self.examples} drawn scenes with questions, of them a tenth with two images, and one of twenty a video "
            f"of {self.frames} frames{formed}; {self.each} others of each kind held out"
        )

    def messages(self, number: int) -> tuple[Message, ...]:
        """Return the conversation of prompt `number`, training or held-out."""
        split: Split = "heldout" if number >= HELD_OUT else "train"
        place = (number - HELD_OUT) // len(self.kinds) if split == "heldout" else number
        match self.kind(number):
            case "two images":
                return two_images(place, split)
            case "long video":
                return long_video(place, split, self.frames)
            case ("image, JSON" | "video, JSON") as form:
                return in_json(place, split, form)
            case task:
                return messages(place, split=split, task=task if split == "heldout" else None)

    def grammar(self, number: int) -> Grammar | None:
        """Return the schema that the answer to prompt `number` follows, if it does: another one for each prompt."""
        if self.kind(number) not in FORMS:
            return None
        return Grammar("json_schema", json.dumps(schemas.drawn(random.Random(f"schema {number}"))))

    def kind(self, number: int) -> Kind:
        """Return the kind of prompt `number`."""
        if number >= HELD_OUT:
            return self.kinds[(number - HELD_OUT) % len(self.kinds)]
        if number >= FORMED:
            return "video, JSON" if number % 4 == 3 else "image, JSON"
        return _WIDER.get(number % 20) or task_of(number)
