"""Loads the prompts of a run: held-out scenes of the bundled models, or a user's own images, videos and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageOps

from model.bench.options import Options
from model.bench.reference import Conversation
from model.demo import prompts
from model.engine.engine import Engine
from model.errors import ConfigError
from model.request import Grammar, Medium, Request, RequestError, SamplingParams
from model.train import manifest
from model.train.data import Unusable
from model.train.manifest import Decode, File, Forms, Item, Turn

WARM_UP = 50_000  # the first number of the scenes that are never measured
WARM_UP_TOKENS = 32
OWN_IMAGE = "own image"  # the task of --image
# Opens what turns files into media as an engine wants them.
Decoding = Callable[[Engine], AbstractContextManager[Decode]]


@dataclass(frozen=True)
class Sample:
    """One prompt. max_tokens and grammar: of its answer."""

    conversation: Conversation
    task: str
    max_tokens: int
    grammar: Grammar | None = None


class Workload:
    """The prompts of every task of a run. A user's own are decoded by `open`; the bundled scenes need none."""

    def __init__(self, options: Options) -> None:
        """Read what --dataset or --image names. Raises ConfigError where a line cannot be used."""
        self._options = options
        self._items: dict[str, list[Item]] = {}
        self._samples: dict[str, list[Sample]] = {}
        for item in _own_items(options):
            self._items.setdefault(item.kind, []).append(item)
        self.tasks = options.tasks
        if self._items:
            self.tasks = options.tasks or tuple(self._items)
            if unknown := [task for task in self.tasks if task not in self._items]:
                raise ConfigError(f"--tasks: no prompt is of {unknown[0]!r}; there are {', '.join(self._items)}")
        bound = (item.where for task in self.tasks for item in self._items.get(task, ()) if item.grammar is not None)
        if "generate" in options.arms and (where := next(bound, None)):
            raise ConfigError(
                f"{where}: transformers' generate follows no grammars: leave it out (--drafters off,flash)"
            )

    @property
    def is_own(self) -> bool:
        """Whether these are a user's own prompts, which `open` must decode."""
        return bool(self._items)

    def open(self, engine: Engine, decoding: Decoding) -> None:
        """Decode the media of as many prompts of each task as are measured, for this engine's target."""
        for task in self.tasks if self._items and not self._samples else ():
            items = self._items[task][: self._options.prompts]
            self._samples[task] = decode_items(items, engine, decoding, self._options.max_tokens)

    def samples(self, task: str, count: int, *, first: int = 0) -> list[Sample]:
        """Get `count` prompts of a task, numbered from `first`. A user's own are repeated where there are fewer."""
        numbers = range(first, first + count)
        if self._items:
            own = self._samples[task]
            return [own[number % len(own)] for number in numbers]
        return [scene(number, cast("prompts.Task", task), self._options.max_tokens) for number in numbers]

    def requests(self, task: str, count: int, *, warm_up: bool = False) -> list[Request]:
        """Get `count` prompts as requests, request i with seed i + 1; to warm up, others with short answers."""
        samples = self.samples(task, count, first=WARM_UP if warm_up else 0)
        if warm_up:
            samples = [replace(each, max_tokens=min(each.max_tokens, WARM_UP_TOKENS)) for each in samples]
        return requests_of(samples, self._options.sampling_params)


def scene(number: int, task: prompts.Task, max_tokens: int) -> Sample:
    """Draw a held-out scene of the bundled models, with its prompt."""
    return Sample(prompts.messages(number, split="heldout", task=task), task, max_tokens)


def requests_of(samples: list[Sample], params: SamplingParams) -> list[Request]:
    """Turn samples into requests; request i is sampled with seed `params.seed + i`, within the sample's grammar if it
    has one."""
    return [
        Request(
            str(i),
            each.conversation,
            replace(
                params,
                max_tokens=each.max_tokens,
                seed=params.seed + i,
                grammar=each.grammar or params.grammar,
            ),
        )
        for i, each in enumerate(samples)
    ]


def read_dataset(path: Path, forms: Forms | None = None) -> tuple[Item, ...]:
    """Read all prompts of a JSONL file or folder (see model/train/manifest.py). Raises ConfigError, which lists every
    line that cannot be used: a benchmark that left some out would not be of this data."""
    data = manifest.read(path, forms=forms)
    if data.problems:
        raise ConfigError("--dataset: " + "\n  ".join((f"{len(data.problems)} unusable:", *data.problems[:10])))
    return data.items


def decode_items(items: list[Item], engine: Engine, decoding: Decoding, max_tokens: int) -> list[Sample]:
    """Decode the media, and check that the engine can serve each prompt. Raises ConfigError, which names the line."""
    samples = []
    with decoding(engine) as decode:
        for item in items:
            try:
                sample = Sample(item.messages(decode), item.kind, item.max_tokens or max_tokens, item.grammar)
                params = SamplingParams(max_tokens=sample.max_tokens, grammar=sample.grammar)
                engine.prepare(Request(item.where, sample.conversation, params))
            except Unusable as error:
                raise ConfigError(str(error)) from error
            except RequestError as error:
                raise ConfigError(f"{item.where}: {error}") from error
            samples.append(sample)
    return samples


@contextmanager
def pillow(_: Engine) -> Iterator[Decode]:
    """Decode images where only model/ is installed. Videos need the service: `flashserve bench`."""

    def decode(path: Path, kind: Literal["image", "video"] | None) -> Medium:
        if (kind or manifest.SUFFIXES.get(path.suffix.lower())) == "video":
            raise Unusable("videos are decoded by the service: use `flashserve bench`, with --equality for the check")
        try:
            with Image.open(path) as image:
                return Medium("image", np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None])
        except OSError as error:
            raise Unusable(f"not an image that Pillow reads: {error}") from error

    yield decode


def _own_items(options: Options) -> tuple[Item, ...]:
    if options.dataset is not None:
        return read_dataset(options.dataset, options.forms)
    prompt = options.prompt or ""
    turns = [(path, Turn("user", (File(path, "image"), prompt))) for path in options.images]
    return tuple(Item((turn,), str(path), OWN_IMAGE) for path, turn in turns)
