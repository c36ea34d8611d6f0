"""Draw the requests of a soak from a seed: of every kind, size and variant, some invalid, some dropped by the client.

There are fewer questions than requests, so that each is sent several times, in other variants and beside other
requests: its answers must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loadtest import media
from loadtest.client import Disconnect, Question, Variant
from loadtest.media import File

SIDES = (24, 64, 160, 320, 640, 1280)
PROMPTS = (
    "Describe the image.",
    "What is there?",
    "How many objects are there, and where is the largest one?",
    "What do you see in the video? Tell me of everything that moves, and of what it meets on its variant.",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "<image> is what I typed, and <|end|> too.",
)
INVALID_SHARE = 0.06
# Relative frequency of each kind of question.
KINDS = {"text": 2, "image": 4, "images": 2, "video": 2}


@dataclass(frozen=True)
class Planned:
    """One request of the soak, and the HTTP statuses that it may get."""

    kind: str
    question: Question
    variant: Variant
    statuses: frozenset[int] = frozenset({200})
    disconnect: Disconnect | None = None

    @property
    def valid(self) -> bool:
        return 200 in self.statuses


class Mixture:
    def __init__(self, seed: int, *, num_questions: int, num_frames: int, max_tokens: int) -> None:
        self._rng = rng = random.Random(seed)
        self._max_tokens, self._num_frames = max_tokens, num_frames
        self._images = [self._image(i) for i in range(max(4, num_questions // 2))]
        self._videos = [self._video(i) for i in range(max(3, num_questions // 12))]
        kinds = rng.choices(tuple(KINDS), tuple(KINDS.values()), k=num_questions)
        self._questions = [(kind, self._question(kind)) for kind in kinds]

    def plans(self, number: int, *, abort_share: float) -> list[Planned]:
        """Draw `number` requests, of which the client drops exactly this share."""
        dropped = set(self._rng.sample(range(number), round(number * abort_share)))
        return [self._plan(index in dropped) for index in range(number)]

    def _plan(self, dropped: bool) -> Planned:
        rng = self._rng
        if not dropped and rng.random() < INVALID_SHARE:
            return self._invalid()
        kind, question = rng.choice(self._questions)
        if not dropped:
            return Planned(kind, question, self._variant(stream=rng.random() < 0.5))
        # Long answers, so that the client leaves before their end.
        longest = {"max_tokens": self._max_tokens, "ignore_eos": True, "stop": []}
        disconnect = self._disconnect()
        variant = self._variant(stream=disconnect.at == "stream" or rng.random() < 0.5)
        return Planned(
            kind, Question(question.prompt, question.files, question.sampling | longest), variant, disconnect=disconnect
        )

    def _variant(self, *, stream: bool) -> Variant:
        rng = self._rng
        route: Literal["chat", "generate"] = rng.choice(("chat", "generate"))
        n = rng.choice((1, 1, 1, 2, 3)) if route == "chat" else 1
        return Variant(route, stream, rng.choice(("auto", "auto", "off")), n)

    def _disconnect(self) -> Disconnect:
        """Draw when to disconnect. The soak multiplies the amount of a wait by the usual time of an answer."""
        at: Literal["upload", "wait", "stream"] = self._rng.choice(("upload", "wait", "wait", "stream"))
        amount = {"upload": self._rng.random(), "wait": self._rng.random(), "stream": self._rng.randrange(4)}[at]
        return Disconnect(at, amount)

    def _question(self, kind: str) -> Question:
        rng = self._rng
        sampling: dict[str, Any] = {"max_tokens": rng.randint(1, self._max_tokens), "ignore_eos": rng.random() < 0.3}
        if rng.random() < 0.5:
            sampling |= {"temperature": rng.choice((0.3, 0.7, 1.0)), "seed": rng.randrange(2**31)}
            sampling |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        if rng.random() < 0.2:
            penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.2, "min_tokens": 1}
            sampling |= dict([rng.choice(list(penalties.items()))])
        if rng.random() < 0.2:
            sampling["stop"] = rng.choice(("the", ["ring", "blue"], "e"))
        files: tuple[File, ...] = ()
        if kind in ("image", "images"):
            files = tuple(rng.choices(self._images, k=1 if kind == "image" else rng.randint(2, 4)))
        elif kind == "video":
            files = (rng.choice(self._videos),)
            sampling["num_frames"] = rng.randint(1, self._num_frames)
        return Question(rng.choice(PROMPTS), files, sampling)

    def _image(self, seed: int) -> File:
        width, height = self._rng.choices(SIDES, k=2)
        return media.image(seed, width, height, self._rng.choice(("JPEG", "PNG", "WEBP", "GIF", "BMP")))

    def _video(self, seed: int) -> File:
        width, height = self._rng.choices(SIDES[1:5], k=2)
        format = self._rng.choice(("mp4", "webm", "avi"))
        return media.video(seed, width, height, format, num_frames=self._rng.randint(8, 40))

    def _invalid(self) -> Planned:
        rng, prompt = self._rng, "Describe the image."
        image, video = rng.choice(self._images), rng.choice(self._videos)
        short = {"max_tokens": 4}
        wrong: tuple[Callable[[], tuple[Question, set[int]]], ...] = (
            lambda: (Question(prompt, (), short | {"temperature": 3}), {400}),
            lambda: (Question(prompt, (), short | {"model": "another"}), {404}),
            lambda: (Question(prompt, (), short | {"repetition_penalty": 0}), {400}),
            lambda: (Question(prompt, (), {"max_tokens": 10**6}), {400}),
            lambda: (Question("word " * 6000, (), short), {400}),
            lambda: (Question(prompt, (image,) * 30, short), {400}),
            lambda: (Question(prompt, (image.cut(rng.uniform(0.05, 0.5)),), short), {400, 413, 415}),
            lambda: (Question(prompt, (video.cut(rng.uniform(0.05, 0.5)),), short), {400, 413, 415}),
            lambda: (Question(prompt, (image, File("image", image.mime, rng.randbytes(500))), short), {415}),
            lambda: (Question(prompt, (File("image", image.mime, b""),), short), {400}),
        )
        question, statuses = rng.choice(wrong)()
        route: Literal["chat", "generate"] = rng.choice(("chat", "generate"))
        return Planned("invalid", question, Variant(route, rng.random() < 0.5), frozenset(statuses))
