"""What is asked, and by how many at once: the scenarios of `python -m loadtest run`.

Files and questions come from the bundled model's own generator of scenes, held-out seeds only, so that drafts are
accepted as often as in earnest. Knows nothing of how requests are sent or measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loadtest import media
from loadtest.asking import Question
from model.demo import captions, scenes

Kind = Literal["text", "image", "images", "dialogue", "video"]
Stages = list[tuple[float, int]]  # seconds, and the number of users during them

FIRST_SCENE = 300_000  # held-out scenes before it are those of training's and the benchmark's figures


def steady(users: int, seconds: float) -> Stages:
    return [(seconds, users)]


def burst(users: int, seconds: float) -> Stages:
    """An eighth of the users, and twice all of them out of nothing."""
    few = max(1, users // 8)
    part = seconds / 5
    return [(part, few), (part, users), (part, few), (part, users), (part, few)]


def ramp(users: int, seconds: float) -> Stages:
    """From one user to all, in steps of a second or more."""
    steps = max(1, min(users, int(seconds)))
    return [(seconds / steps, max(1, round(users * (step + 1) / steps))) for step in range(steps)]


@dataclass(frozen=True)
class Scenario:
    about: str
    mix: Mapping[Kind, int]  # what is sent how often
    stages: Callable[[int, float], Stages] = steady
    in_slices: bool = False  # whether the report tells how it went over time


MIXED: Mapping[Kind, int] = {"image": 4, "images": 1, "dialogue": 1, "video": 3, "text": 1}
SCENARIOS: dict[str, Scenario] = {
    "chat": Scenario(
        "chat about one image or two, in part with turns before", {"image": 6, "images": 2, "dialogue": 2}
    ),
    "video": Scenario("captions of short videos", {"video": 1}),
    "mixed": Scenario("chat with images, captions of videos, and a little text alone", MIXED),
    "burst": Scenario("mixed; an eighth of the users, twice suddenly all of them", MIXED, burst, in_slices=True),
    "ramp": Scenario("mixed; from one user to all of them", MIXED, ramp, in_slices=True),
    "soak": Scenario("mixed, for as long as --duration says; did anything drift?", MIXED, in_slices=True),
}


def draw(scenario: Scenario, number: int, *, seed: int, max_tokens: int) -> list[tuple[Kind, Question]]:
    """That many questions; the same for the same seed."""
    rng = random.Random(f"{seed} load")
    kinds = rng.choices(tuple(scenario.mix), tuple(scenario.mix.values()), k=number)
    first = FIRST_SCENE + seed * 1_000_000
    return [(kind, _question(kind, first + 2 * index, rng, max_tokens)) for index, kind in enumerate(kinds)]


def _question(kind: Kind, number: int, rng: random.Random, max_tokens: int) -> Question:
    sampling = {"max_tokens": max_tokens}
    if kind == "text":
        return Question(rng.choice(captions.DETAILED), (), sampling)
    if kind == "video":
        clip = scenes.random_video_scene(scenes.scene_seed("heldout", "video", number))
        return Question(captions.video_turn(clip, rng, caption=True).question, (media.scene_clip(clip),), sampling)
    first, second = (scenes.random_image_scene(scenes.scene_seed("heldout", "image", number + i)) for i in range(2))
    if kind == "images":
        files = (media.scene_image(first), media.scene_image(second))
        return Question(f"Describe the {rng.choice(('first', 'second'))} image.", files, sampling)
    file = media.scene_image(first)
    if kind == "dialogue":
        before = captions.image_turn(first, rng, caption=True)
        turn = captions.image_turn(first, rng)
        return Question(turn.question, (file,), sampling, earlier=((before.question, before.answer),))
    return Question(captions.image_turn(first, rng, caption=rng.random() < 0.7).question, (file,), sampling)
