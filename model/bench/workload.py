"""The prompts that are measured on: held-out scenes of the demo, or a user's own pictures."""

from __future__ import annotations

from typing import cast

import numpy as np
from PIL import Image

from model.bench.options import Options
from model.bench.reference import Conversation
from model.demo import prompts
from model.request import Medium, Message

WARM_UP = 50_000  # numbers from here on are never measured


def conversations(options: Options, task: str, *, first: int = 0, count: int | None = None) -> list[Conversation]:
    """`count` prompts of a task (default: as many as are asked for), numbered from `first`."""
    numbers = range(first, first + (options.prompts if count is None else count))
    if not options.images:
        return [prompts.messages(n, split="heldout", task=cast("prompts.Task", task)) for n in numbers]
    assert options.prompt is not None
    media = [Medium("image", np.asarray(Image.open(path).convert("RGB"))[None]) for path in options.images]
    return [(Message("user", (media[n % len(media)], options.prompt)),) for n in numbers]
