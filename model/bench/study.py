"""Which shape of a FLASH draft is best: variants of one draft, each other in one thing, trained and measured alike.

    python -m model.bench.study --model demo-qwen --folder runs/study [--steps 600] [--only NAME,...]

All variants learn from the same answers in the same order for as many steps, and are measured on the same held-out
prompts: acceptance length by kind of prompt, the time of drafting and of reading the longest video, the memory of a
sequence. FOLDER keeps what was trained and measured: the same command goes on where it was stopped, and with more names
adds to it. Prints the tables and, last, the JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from model.config import EngineConfig
from model.demo import captions, prompts, scenes
from model.draft import checkpoint, presets
from model.draft.network import ALL
from model.draft.presets import Sizes
from model.engine import Engine
from model.request import Medium, Message
from model.targets.base import Target
from model.targets.base import load as load_target
from model.train.data import MAX_TOKENS, Example, write_answers
from model.train.measure import Acceptance, acceptance
from model.train.seen import Memory
from model.train.trainer import TrainConfig, train

TWO, LONG = "two images", "long video"
KINDS = (*prompts.TASKS, TWO, LONG)
LONG_FRAMES = {"demo": 24, "demo-qwen": 64}  # as many as fit, and as the issue of long videos is about
ROOM = 4096  # positions of a sequence
TRACE = 12  # prompts on which times are taken


@dataclass(frozen=True)
class Variant:
    """taps: which of the target's layers are read, as shares of its depth; None: those it offers by itself."""

    about: str
    sizes: Sizes = field(default_factory=Sizes)
    taps: tuple[float, ...] | None = None


BASE = "base"
VARIANTS = {
    BASE: Variant("the shape that the others differ from"),
    "latents-0": Variant("latents", Sizes(num_latents=0)),
    "latents-2": Variant("latents", Sizes(num_latents=2)),
    "latents-8": Variant("latents", Sizes(num_latents=8)),
    "latents-64": Variant("latents", Sizes(num_latents=64)),
    "latents-all": Variant("latents", Sizes(num_latents=ALL)),
    "pool-2": Variant("pooling", Sizes(num_latents=ALL, pooled=2)),
    "pool-16": Variant("pooling", Sizes(num_latents=ALL, pooled=16)),
    "pool-64": Variant("pooling", Sizes(num_latents=ALL, pooled=64)),
    "pool-64-latents-16": Variant("pooling", Sizes(num_latents=16, pooled=64)),
    "taps-last": Variant("target layers", taps=(1.0,)),
    "taps-middle": Variant("target layers", taps=(0.6,)),
    "taps-2": Variant("target layers", taps=(0.4, 0.8)),
    "taps-6": Variant("target layers", taps=(0.2, 0.35, 0.5, 0.65, 0.8, 1.0)),
    "block-4": Variant("block", Sizes(block=4)),
    "block-10": Variant("block", Sizes(block=10)),
    "block-15": Variant("block", Sizes(block=15)),
    "layers-1": Variant("layers", Sizes(num_layers=1)),
    "layers-3": Variant("layers", Sizes(num_layers=3)),
    "head-none": Variant("sequential head", Sizes(sequential_rank=0)),
    "head-16": Variant("sequential head", Sizes(sequential_rank=16)),
}


@dataclass(frozen=True)
class Wider:
    """Prompts by number, as `model.demo.prompts.Scenes`, and beside its tasks two images, and a long video."""

    frames: int  # of the long video

    def kind(self, number: int) -> str:
        if number >= prompts.HELD_OUT:
            return KINDS[(number - prompts.HELD_OUT) % len(KINDS)]
        return {7: TWO, 13: TWO, 17: LONG}.get(number % 20) or prompts.task_of(number)

    def held_out(self, each: int) -> dict[str, list[int]]:
        count = len(KINDS)
        return {kind: [prompts.HELD_OUT + i * count + at for i in range(each)] for at, kind in enumerate(KINDS)}

    def messages(self, number: int) -> tuple[Message, ...]:
        kind, held_out = self.kind(number), number >= prompts.HELD_OUT
        split = "heldout" if held_out else "train"
        if kind in prompts.TASKS:
            return prompts.messages(number % prompts.HELD_OUT, split=split, task=kind)  # type: ignore[arg-type]
        rng = random.Random(f"{split} {number} {kind}")
        seed = 7_000_000 + 2 * (number % prompts.HELD_OUT)
        if kind == LONG:
            clip = scenes.random_video_scene(scenes.scene_seed(split, "video", seed))
            turn = captions.video_turn(clip, rng, caption=True)
            return (
                Message("user", (Medium("video", scenes.render_clip(clip, self.frames, prompts.SIDE)), turn.question)),
            )
        pair = [scenes.random_image_scene(scenes.scene_seed(split, "image", seed + i)) for i in range(2)]
        media = [Medium("image", scenes.render(scene, prompts.SIDE)[None]) for scene in pair]
        which = rng.choice(("first", "second"))
        return (Message("user", (*media, f"Describe the {which} image.")),)


@dataclass
class Study:
    """One target's answers, and what it gave for them, shared by all variants that read the same layers."""

    model: str
    folder: Path
    config: TrainConfig
    num_examples: int
    held_out: int

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prompts = Wider(LONG_FRAMES.get(self.model, 16))
        self.plain = EngineConfig(
            model=self.model, drafter="off", dtype="bfloat16", max_num_seqs=16, max_model_len=ROOM
        ).resolved()
        self._target: Target | None = None
        self._memory = Memory(0)
        self._examples: list[Example] = []

    def target(self, taps: tuple[float, ...] | None) -> Target:
        """With these layers tapped; the one before is given up where they are others."""
        depth = load_target(self.plain).num_layers if self._target is None else self._target.num_layers
        layers = None if taps is None else tuple(min(depth - 1, round(share * depth)) for share in taps)
        if self._target is None or layers != self._layers:
            self._target, self._layers = load_target(self.plain, layers), layers
            self._memory = Memory(self.config.memory_bytes)
        return self._target

    def examples(self) -> list[Example]:
        if not self._examples:
            engine = Engine(self.plain, self.target(None))
            file = self.folder / "answers.jsonl"
            self._examples = write_answers(engine, self.prompts.messages, range(self.num_examples), file)
        return self._examples

    def trained(self, name: str) -> Path:
        """The folder of this variant's draft, which is trained unless it is there."""
        variant, draft = VARIANTS[name], self.folder / name
        if not (draft / "config.json").exists():
            examples, target = self.examples(), self.target(variant.taps)
            torch.manual_seed(self.config.seed)
            network = presets.new("flash", target, sizes=variant.sizes).train()
            print(f"{name}: {asdict(network.config)}", file=sys.stderr, flush=True)
            state = self.folder / f"{name}.pt"
            train(
                *(target, network, examples, self.prompts.messages, self.config, state, self.prompts.kind),
                memory=self._memory,
            )
            checkpoint.save(draft, network, target, drafter="flash", steps=self.config.steps)
            state.unlink()
        return draft

    def engine(self, name: str, **changed: Any) -> Engine:
        draft = str(self.trained(name))
        config = replace(self.plain, draft=draft, drafter="auto", load_aware=False, graphs=False, max_num_seqs=8)
        return Engine(replace(config, **changed).resolved(), self.target(VARIANTS[name].taps))

    def acceptance(self, name: str) -> dict[str, Any]:
        """By kind of prompt; kept beside the draft."""
        file = self.trained(name) / "acceptance.json"
        if not file.exists():
            engine = self.engine(name)
            by_kind = {
                kind: acceptance(engine, self.prompts.messages, numbers, max_tokens=MAX_TOKENS)
                for kind, numbers in self.prompts.held_out(self.held_out).items()
            }
            told = {"all": sum(by_kind.values(), Acceptance())} | by_kind
            file.write_text(json.dumps({kind: each.told() for kind, each in told.items()}, indent=1) + "\n")
        return json.loads(file.read_text())  # type: ignore[no-any-return]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-qwen")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=32)
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    config = TrainConfig(steps=given.steps, memory_bytes=10 << 30)
    study = Study(given.model, given.folder, config, given.examples, given.held_out)
    for name in given.only.split(","):
        told = study.acceptance(name)
        print(name, {kind: each["length"] for kind, each in told.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
