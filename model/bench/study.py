"""Which shape of a FLASH draft is best: variants of one draft, each other in one thing, trained and measured alike.

    python -m model.bench.study --model demo-qwen --folder runs/study [--only NAME,...] [--output model/bench/drafters]

All variants learn from the same answers in the same order for as many steps, and are measured on the same held-out
prompts: acceptance length by kind of prompt, and by how much the chances are off that a draft gives its nodes; then,
for one request at a time, how long drafting takes, and reading the longest video, and what the draft then holds of it.
What concerns serving alone (nodes verified, a chain in place of a tree) is measured on the base variant. FOLDER keeps
what was trained and measured: the same command goes on where it was stopped. Prints the table and, last, the JSON
object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import torch
from transformers.utils import logging

from model.bench.options import program
from model.bench.report import aligned, machine
from model.config import EngineConfig
from model.demo.prompts import KINDS, LONG_FRAMES, ROOM, TASKS, Scenes
from model.draft import checkpoint, presets
from model.draft.network import ALL
from model.draft.presets import Sizes
from model.engine import Engine
from model.request import Request, SamplingParams
from model.targets.base import Target
from model.targets.base import load as load_target
from model.train.data import MAX_TOKENS, Example, by_kind, write_answers
from model.train.measure import Acceptance, acceptance, miscalibration
from model.train.seen import Memory
from model.train.trainer import TrainConfig, train

if TYPE_CHECKING:
    from model.drafters.flash import FlashDrafter

TRACE = 12  # prompts on which times are taken
SHAPE = Sizes(num_layers=2, block=7, pooled=0, num_latents=16, sequential_rank=64)  # that the others differ from


@dataclass(frozen=True)
class Variant:
    """taps: which of the target's layers are read, as shares of its depth; None: those it offers by itself."""

    about: str
    sizes: Sizes = SHAPE
    taps: tuple[float, ...] | None = None


BASE = "base"
VARIANTS = {
    BASE: Variant("the shape that the others differ from"),
    "latents-0": Variant("latents", replace(SHAPE, num_latents=0)),
    "latents-2": Variant("latents", replace(SHAPE, num_latents=2)),
    "latents-8": Variant("latents", replace(SHAPE, num_latents=8)),
    "latents-64": Variant("latents", replace(SHAPE, num_latents=64)),
    "latents-all": Variant("latents", replace(SHAPE, num_latents=ALL)),
    "pool-2": Variant("pooling", replace(SHAPE, num_latents=ALL, pooled=2)),
    "pool-16": Variant("pooling", replace(SHAPE, num_latents=ALL, pooled=16)),
    "pool-64": Variant("pooling", replace(SHAPE, num_latents=ALL, pooled=64)),
    "pool-64-latents-16": Variant("pooling", replace(SHAPE, num_latents=16, pooled=64)),
    "taps-last": Variant("target layers", taps=(1.0,)),
    "taps-middle": Variant("target layers", taps=(0.6,)),
    "taps-2": Variant("target layers", taps=(0.4, 0.8)),
    "taps-last-pool-16": Variant("target layers", replace(SHAPE, num_latents=ALL, pooled=16), taps=(1.0,)),
    "taps-2-last-pool-16": Variant("target layers", replace(SHAPE, num_latents=ALL, pooled=16), taps=(0.6, 1.0)),
    "taps-6": Variant("target layers", taps=(0.2, 0.35, 0.5, 0.65, 0.8, 1.0)),
    "block-4": Variant("block", replace(SHAPE, block=4)),
    "block-10": Variant("block", replace(SHAPE, block=10)),
    "block-15": Variant("block", replace(SHAPE, block=15)),
    "layers-1": Variant("layers", replace(SHAPE, num_layers=1)),
    "layers-3": Variant("layers", replace(SHAPE, num_layers=3)),
    "head-none": Variant("sequential head", replace(SHAPE, sequential_rank=0)),
    "head-16": Variant("sequential head", replace(SHAPE, sequential_rank=16)),
}


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
        self.prompts = Scenes(self.num_examples, LONG_FRAMES.get(self.model, 16), self.held_out)
        self.plain = EngineConfig(
            model=self.model, drafter="off", dtype="bfloat16", max_num_seqs=16, max_model_len=ROOM
        ).resolved()
        self._target = load_target(self.plain)
        self._taps: tuple[float, ...] | None = None
        self._memory = Memory(self.config.memory_bytes)
        self._examples: list[Example] = []

    def target(self, taps: tuple[float, ...] | None) -> Target:
        """With these layers tapped; the one before is given up where they are others."""
        if taps != self._taps:
            depth = self._target.num_layers
            layers = None if taps is None else tuple(min(depth - 1, round(share * depth)) for share in taps)
            self._target, self._taps = load_target(self.plain, layers), taps
            self._memory = Memory(self.config.memory_bytes)
        return self._target

    def examples(self) -> list[Example]:
        if not self._examples:
            engine = Engine(self.plain, self.target(None))
            file = self.folder / "answers.jsonl"
            wanted = self.prompts.messages, self.prompts.train
            self._examples = write_answers(engine, *wanted, file, max_tokens=MAX_TOKENS)
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
            lengths = {
                kind: acceptance(engine, self.prompts.messages, numbers, max_tokens=MAX_TOKENS)
                for kind, numbers in by_kind(self.prompts).items()
            }
            told = {"all": sum(lengths.values(), Acceptance())} | lengths
            figures = {kind: each.told() for kind, each in told.items()}
            calibration = engine.load.calibration()
            figures["all"] |= {"calibration": calibration, "miscalibration": round(miscalibration(calibration), 3)}
            file.write_text(json.dumps(figures, indent=1) + "\n")
        return json.loads(file.read_text())

    def cost(self, name: str) -> dict[str, Any]:
        """Of a draft at batch 1, medians: ms of a round's drafting, ms of reading the longest video, and what the draft
        holds of that one, KiB and rows."""
        engine = self.engine(name, max_num_seqs=1)
        drafter, reading, rows = cast("FlashDrafter", engine.drafter), list[float](), 0
        read, drafting, readings = drafter.prefill, list[float](), list[float]()

        def timed(*given: Any) -> None:
            begun = time.perf_counter()
            read(*given)
            reading.append(time.perf_counter() - begun)

        with patch.object(drafter, "prefill", timed):
            for number in by_kind(self.prompts)["long video"][:TRACE]:
                reading.clear()
                engine.add(Request(str(number), self.prompts.messages(number), SamplingParams(max_tokens=MAX_TOKENS)))
                while engine.has_work:
                    engine.step()
                    rows = max(rows, max(drafter.cache.lengths))
                readings.append(sum(reading))
                drafting += [took for phase, took in engine.pop_stats().step_seconds if phase == "draft"]
        config = drafter.network.config
        held = 2 * config.num_layers * config.hidden_size * rows * drafter.cache.data.element_size()
        figures = {"draft_ms": 1e3 * median(drafting), "reading_ms": 1e3 * median(readings), "held_kib": held / 1024}
        return {key: round(value, 3) for key, value in figures.items()} | {"rows": rows}

    def served(self, nodes: int, *, chain: bool = False) -> dict[str, Any]:
        """Of the base variant, image captions one at a time, with so many nodes."""
        engine = self.engine(BASE, max_num_seqs=1, max_nodes=nodes, **({"tree_width": 1} if chain else {}))
        numbers = by_kind(self.prompts)[TASKS[0]]
        acceptance(engine, self.prompts.messages, numbers[:4], max_tokens=MAX_TOKENS)
        begun = time.perf_counter()
        told = acceptance(engine, self.prompts.messages, numbers, max_tokens=MAX_TOKENS)
        seconds = time.perf_counter() - begun
        return {"nodes": nodes, "chain": chain, "length": round(told.length, 3), "seconds": round(seconds, 2)}


def text(variants: dict[str, dict[str, Any]], served: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [
        ("variant", "of", *("all", *KINDS), "off by", "draft ms", "reading ms", "rows", "KiB")
    ]
    for name, told in variants.items():
        lengths = (f"{told['acceptance'][kind]['length']:.2f}" for kind in ("all", *KINDS))
        cost = told["cost"]
        off = f"{told['acceptance']['all']['miscalibration']:.3f}"
        costs = (
            off,
            f"{cost['draft_ms']:.3f}",
            f"{cost['reading_ms']:.2f}",
            str(cost["rows"]),
            f"{cost['held_kib']:.0f}",
        )
        lines.append((name, VARIANTS[name].about, *lengths, *costs))
    nodes: list[tuple[str, ...]] = [("nodes", "form", "acceptance", "seconds")]
    nodes += [
        (str(row["nodes"]), "chain" if row["chain"] else "tree", f"{row['length']:.2f}", f"{row['seconds']:.2f}")
        for row in served
    ]
    return f"{aligned(lines)}\n\n{aligned(nodes)}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-qwen")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default=",".join(VARIANTS), metavar="NAME,...")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=32, help="prompts of each kind (default: 32)")
    parser.add_argument("--output", type=Path, help="folder for study.txt and study.json")
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    names = given.only.split(",")
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"there are no variants {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    config = TrainConfig(steps=given.steps, memory_bytes=10 << 30)
    study = Study(given.model, given.folder, config, given.examples, given.held_out)
    variants: dict[str, dict[str, Any]] = {}
    for name in names:
        variants[name] = {"acceptance": study.acceptance(name)}
        lengths = {kind: each["length"] for kind, each in variants[name]["acceptance"].items()}
        print(name, lengths, file=sys.stderr, flush=True)
    for name in names:
        variants[name]["cost"] = study.cost(name)
    served = [study.served(nodes) for nodes in (3, 7, 11, 15, 23, 31)] + [study.served(7, chain=True)]
    command = shlex.join(["python", "-m", "model.bench.study", *argv])
    told = {"machine": machine("cpu", study.plain.dtype), "command": command, "variants": variants, "served": served}
    shown = text(variants, served)
    print(shown)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "study.txt").write_text(shown + "\n")
        (given.output / "study.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    program(main)
