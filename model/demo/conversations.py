"""Draw the conversations that the bundled targets are trained on, in batches of one kind each.

A sample is one conversation about one image, two images, or one clip. It has a caption and several questions, so that
its many visual tokens serve several answers. A target's chat template decides how it is written (`Style`). Its number
alone decides what is drawn and said, so that a resumed run sees the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from model.demo import captions, scenes
from model.demo.captions import Turn
from model.demo.training import Numbered
from model.demo.vision import SIDE, weathered

FRAME_COUNTS = ((4, 6, 8), (6, 3, 1))  # frames of a training clip, and their weights
KINDS = {"image": 0.45, "pair": 0.05, "video": 0.5}  # share of batches by kind, after the first `image_only`


@dataclass(frozen=True)
class Style:
    """Describe how a chat template writes a conversation, in token ids."""

    opening: list[int]
    before: list[int]  # before a question
    between: list[int]  # between a question and its answer
    end: list[int]  # end of an answer, which the model writes too
    after: list[int]  # after an answer
    media: Callable[[str, int], list[int]]  # (kind of the sample, number of frames) -> tokens
    text_tokens: int = 176  # most text tokens of one sample
    frame_counts: tuple[tuple[int, ...], tuple[int, ...]] = FRAME_COUNTS


@dataclass
class Drawn:
    """Hold one batch before it is converted to tensors: a row of tokens and labels for each sample, and its frames."""

    kind: str
    num_frames: int
    rows: list[tuple[list[int], list[int]]]
    clips: list[np.ndarray]  # (frames, SIDE, SIDE, 3); an image is a clip of one frame
    moments: list[list[tuple[scenes.Scene, float]]]  # scene and time of every frame
    rng: random.Random


def _turns(scene: scenes.Scene, rng: random.Random, kind: str) -> Iterator[Turn]:
    """Yield questions about one scene without end; the first is likely to ask for a caption."""
    make = captions.image_turn if kind == "image" else captions.video_turn
    yield make(scene, rng, caption=rng.random() < 0.7)
    while True:
        yield make(scene, rng, caption=rng.random() < 0.2)


def _pair_turns(first: scenes.Scene, second: scenes.Scene, rng: random.Random) -> Iterator[Turn]:
    """Yield questions about one of two images without end."""
    while True:
        word, scene = rng.choice((("first", first), ("second", second)))
        if rng.random() < 0.6:
            yield Turn(f"Describe the {word} image.", captions.detailed_caption(scene, rng))
        else:
            turn = captions.image_turn(scene, rng)
            yield Turn(f"In the {word} image: {turn.question}", turn.answer)


class Conversations(Numbered[dict[str, torch.Tensor]]):
    """Yield batches without end from number `first` on; those before number `image_only` have single images only."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, style: Style, first: int, image_only: int, image_batch: int = 16
    ) -> None:
        self.tokenizer, self.style, self.first = tokenizer, style, first
        self.image_only, self.image_batch = image_only, image_batch

    def _text(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def sample(self, media: list[int], turns: Iterator[Turn], rng: random.Random) -> tuple[list[int], list[int]]:
        """Write one conversation that begins with the media's tokens.

        Returns token ids and labels of equal length; labels are -100 except on answers. Turns are added while they fit
        into `style.text_tokens`.
        """
        style = self.style
        tokens, labels = [*style.opening], [-100] * len(style.opening)
        room, seen = style.text_tokens, set[str]()
        around = len(style.before) + len(style.between) + len(style.after) + 1
        attempts = 0
        for turn in turns:
            attempts += 1
            if turn.question in seen:
                if attempts > 25:
                    break
                continue
            seen.add(turn.question)
            question, answer = self._text(turn.question), [*self._text(turn.answer), *style.end]
            if len(question) + len(answer) + around > room:
                break
            room -= len(question) + len(answer) + around
            content = question if len(seen) > 1 else (question + media if rng.random() < 0.12 else media + question)
            prompt = [*style.before, *content, *style.between]
            tokens += prompt + answer + style.after
            labels += [-100] * len(prompt) + answer + [-100] * len(style.after)
        return tokens, labels

    def draw(self, index: int) -> Drawn:
        """Draw batch `index`: its kind, its scenes and its conversations."""
        rng = random.Random(index * 7919 + 5)
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0] if index >= self.image_only else "image"
        count = self.image_batch if kind == "image" else self.image_batch // 2
        num_frames = {"image": 1, "pair": 2}.get(kind) or rng.choices(*self.style.frame_counts)[0]
        drawn = Drawn(kind, num_frames, [], [], [], rng)
        media = self.style.media(kind, num_frames)
        for j in range(count):
            number = index * 64 + j * 2
            if kind == "video":
                scene = scenes.random_video_scene(scenes.scene_seed("train", "video", number))
                clip = scenes.render_clip(scene, num_frames, SIDE)
                drawn.clips.append(np.stack([weathered(f, rng) for f in clip]))
                drawn.moments.append([(scene, i / (num_frames - 1)) for i in range(num_frames)])
                turns = _turns(scene, rng, "video")
            else:
                seen = [
                    scenes.random_image_scene(scenes.scene_seed("train", "image", number + k))
                    for k in range(num_frames)
                ]
                drawn.clips += [weathered(scenes.render(s, SIDE), rng)[None] for s in seen]
                drawn.moments += [[(s, 0.0)] for s in seen]
                turns = _turns(seen[0], rng, "image") if kind == "image" else _pair_turns(seen[0], seen[1], rng)
            drawn.rows.append(self.sample(media, turns, rng))
            if kind == "image" and j == 0 and rng.random() < 0.3:  # some conversations have no media
                drawn.clips.pop()
                drawn.moments.pop()
                talk = iter(rng.sample(captions.SMALL_TALK, len(captions.SMALL_TALK)))
                drawn.rows[-1] = self.sample([], talk, rng)
        return drawn

    def padded(self, rows: list[tuple[list[int], list[int]]], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and labels, (batch, tokens) each, padded to the longest row or to `width`."""
        width = max(width, *(len(tokens) for tokens, _ in rows))
        ids = torch.tensor([t + [self.tokenizer.pad_token_id] * (width - len(t)) for t, _ in rows])
        return ids, torch.tensor([v + [-100] * (width - len(v)) for _, v in rows])
