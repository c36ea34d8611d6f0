"""A whole training: answers, draft, figures, model card. Done again with the same settings it goes on where it was.

    OUTPUT/                  what is served: config.json, model.safetensors; README.md (the model card) and its pictures
    OUTPUT/run/              what is needed to go on: settings.json, answers*.jsonl, state.pt, log.jsonl

Knows nothing of files of media: what is asked comes from `model.train.data.Prompts`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from model import __version__
from model.config import EngineConfig
from model.drafters import checkpoint, presets
from model.drafters.checkpoint import DraftShape, Network
from model.drafters.presets import Sizes
from model.engine.engine import Engine
from model.errors import ConfigError
from model.targets.base import Target
from model.targets.registry import load_target
from model.train import card, plots
from model.train.data import (
    MAX_TOKENS,
    TEMPERATURES,
    Example,
    Interrupted,
    Prompts,
    by_kind,
    frequent,
    read_answers,
    unusable,
)
from model.train.data import write_answers as write
from model.train.measure import Acceptance, acceptance, miscalibration
from model.train.team import Team
from model.train.trainer import Row, TrainConfig, train

LOGITS = (
    1 << 28
)  # numbers in a step's drafted logits; where many tokens may be proposed fewer drafts are begun for that
MOST_ANCHORS = 24


@dataclass(frozen=True)
class Settings:
    """target: who answers and is drafted for. Of `train`, `sizes` and the rest all that shapes the result must be the
    same when a training is taken up again."""

    target: EngineConfig  # resolved, drafter "off"
    drafter: str
    output: Path
    command: str
    train: TrainConfig = field(default_factory=TrainConfig)
    sizes: Sizes = field(default_factory=Sizes)
    temperatures: tuple[float, ...] = TEMPERATURES
    max_tokens: int = MAX_TOKENS  # of an answer
    sampling: dict[str, Any] = field(default_factory=dict)  # how videos are read; only to tell settings apart
    strict: bool = False  # a prompt that cannot be used is an error
    evaluate_prompts: int = 16  # while it trains
    evaluate_seconds: float = 20.0
    final_prompts: int = 64  # at the end, of each kind
    work: Path | None = None  # in place of OUTPUT/run
    answers: Path | None = None  # in place of OUTPUT/run/answers.jsonl, to be shared by several trainings

    @property
    def run(self) -> Path:
        return self.work or self.output / "run"

    @property
    def answers_file(self) -> Path:
        return self.answers or self.run / "answers.jsonl"


def open_target(config: EngineConfig, drafter: str) -> Target:
    """The target of a resolved config, with the layers tapped that this kind of draft reads."""
    return load_target(config, presets.TAP_LAYERS.get(drafter))


def anchors(batch: int, shape: DraftShape) -> int:
    """Drafts begun per answer and step, where nobody says how many: as many as memory is likely to hold."""
    return max(1, min(MOST_ANCHORS, LOGITS // (batch * shape.block * (shape.vocabulary or shape.vocab_size))))


def run(
    settings: Settings,
    target: Target,
    prompts: Prompts,
    team: Team,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, measure and write the draft; figures by kind of prompt. Raises ConfigError, and Interrupted after having
    saved."""
    torch.manual_seed(settings.train.seed)
    network = presets.new(settings.drafter, target, sizes=settings.sizes).to(target.device).train()
    claim(settings, target, network, prompts, team)
    examples = answer(settings, target, prompts, team, stop)
    if network.offered is not None:
        chosen = frequent(examples, len(network.offered), target.eos_ids)
        network.offered.copy_(torch.tensor(chosen))

    def evaluate(_: int) -> dict[str, Any] | None:
        engine = served(settings, target, network, settings.run / "draft")
        numbers = spread(prompts.held_out, settings.evaluate_prompts)
        limit = {"max_tokens": settings.max_tokens, "seconds": settings.evaluate_seconds}
        measured = acceptance(engine, prompts.messages, numbers, stop=stop, **limit)  # type: ignore[arg-type]
        return None if stop() else measured.as_json()

    file = settings.run / "state.pt"
    history = train(
        *(target, network, examples, prompts.messages, settings.train, file, prompts.kind),
        team=team,
        evaluate=evaluate,
        stop=stop,
    )
    figures: dict[str, Any] = {}
    if team.rank == 0:
        figures = finish(settings, target, network, prompts, len(examples), history, stop)
    team.wait()
    return figures


# --- so that a training goes on only as what it began as


def claim(settings: Settings, target: Target, network: Network, prompts: Prompts, team: Team) -> None:
    """Take the output folder for this training. ConfigError where it holds one of other settings."""
    # Through JSON and back: what is compared is what was written.
    wanted = json.loads(json.dumps(identity(settings, target, network, prompts, team)))
    file = settings.run / "settings.json"
    begun = file.exists()
    team.wait()  # nobody writes before all have looked
    if begun:
        stored = json.loads(file.read_text())
        changed = [
            f"{name} was {stored.get(name)}, now {wanted.get(name)}"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{str(settings.run)!r} holds a training of other settings ({'; '.join(changed)}): "
                "go on with those, or choose another output folder"
            )
    elif team.rank == 0:
        settings.run.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=2) + "\n")
    team.wait()


def identity(settings: Settings, target: Target, network: Network, prompts: Prompts, team: Team) -> dict[str, Any]:
    """All that shapes what comes out."""
    config = asdict(settings.train)
    shaping = ("steps", "batch", "anchors", "rate", "gamma", "warmup", "seed", "autocast")
    return {
        "target": checkpoint.fingerprint(target),
        "drafter": settings.drafter,
        "draft": asdict(network.config),
        "data": prompts.digest,
        **{name: config[name] for name in shaping},
        "batches per step": settings.train.accumulate * team.size,
        "temperatures": settings.temperatures,
        "max_tokens": settings.max_tokens,
        "dtype": settings.target.dtype,
        "sampling": settings.sampling,
    }


# --- the stages


def answer(settings: Settings, target: Target, prompts: Prompts, team: Team, stop: Callable[[], bool]) -> list[Example]:
    """What the target says to every prompt; each process of a team asks its share and reads what all have got."""
    file = settings.answers_file
    file.parent.mkdir(parents=True, exist_ok=True)
    before = {n for each in answer_files(file) for n in [*(e.number for e in read_answers(each)), *unusable(each)]}
    missing = [number for number in prompts.train if number not in before]
    team.wait()  # nobody writes before all have seen what is missing
    if missing[team.rank :: team.size]:
        write(
            Engine(settings.target, target),
            prompts.messages,
            missing[team.rank :: team.size],
            file if team.rank == 0 else file.with_stem(f"{file.stem}-{team.rank}"),
            temperatures=settings.temperatures,
            max_tokens=settings.max_tokens,
            seed=settings.train.seed,
            stop=stop,
        )
    team.wait()
    if settings.strict and (bad := [reason for each in answer_files(file) for reason in unusable(each).values()]):
        raise ConfigError(f"{len(bad)} prompts cannot be used, and --strict: {bad[0]}")
    known = {e.number: e for each in answer_files(file) for e in read_answers(each)}
    examples = [known[number] for number in prompts.train if number in known]
    if not any(len(e.answer) > 2 for e in examples):
        raise ConfigError("no prompt got an answer of three tokens or more: there is nothing to learn from")
    return examples


def answer_files(file: Path) -> list[Path]:
    return [file, *sorted(file.parent.glob(f"{file.stem}-[0-9]*{file.suffix}"))]


def served(settings: Settings, target: Target, network: Network, folder: Path) -> Engine:
    """An engine with the draft as it is now, written to `folder` and read again, as it will be served."""
    checkpoint.save(folder, network, target, drafter=settings.drafter)
    few = min(8, settings.target.max_num_seqs)
    config = replace(
        settings.target, draft=str(folder), drafter="auto", adaptive_drafting=False, graphs=False, max_num_seqs=few
    )
    return Engine(config, target)


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """So many of them, from all over; the same ones each time."""
    places = random.Random(0).sample(range(len(numbers)), min(count, len(numbers)))
    return [numbers[place] for place in sorted(places)]


def finish(
    settings: Settings,
    target: Target,
    network: Network,
    prompts: Prompts,
    num_examples: int,
    history: list[Row],
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Measure on what was held out, then write the draft with its card."""
    engine = served(settings, target, network, settings.run / "draft")
    measured: dict[str, Acceptance] = {}
    for kind, numbers in sorted(by_kind(prompts).items()):
        some = spread(numbers, settings.final_prompts)
        measured[kind] = acceptance(engine, prompts.messages, some, max_tokens=settings.max_tokens, stop=stop)
        if stop():
            raise Interrupted
    whole, calibration = sum(measured.values(), Acceptance()), engine.load.calibration()
    figures = {
        kind: each.as_json() for kind, each in ({"all": whole} | (measured if len(measured) > 1 else {})).items()
    }
    with (settings.run / "log.jsonl").open("w") as log:
        log.writelines(json.dumps(row) + "\n" for row in history)
    files = answer_files(settings.answers_file)
    wanted = set(prompts.train)
    left_out = [reason for each in files for number, reason in unusable(each).items() if number in wanted]
    notes: dict[str, Any] = {
        "command": settings.command,
        "data": prompts.summary,
        "examples": num_examples,
        "steps": settings.train.steps,
        "seed": settings.train.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "acceptance_length": {kind: each["length"] for kind, each in figures.items()},
        "acceptance_by_position": figures["all"]["positions"],
        "miscalibration": round(miscalibration(calibration), 3),
    }
    checkpoint.save(settings.output, network, target, drafter=settings.drafter, **notes)
    hidden = ("target_hidden_size", "vocab_size", "aux_layers", "rope_theta")
    shape = ", ".join(f"{name} {value}" for name, value in asdict(network.config).items() if name not in hidden)
    card.write(
        settings.output,
        {
            **notes,
            "drafter": settings.drafter,
            "model": settings.target.model,
            "folder": settings.output,
            "target_fingerprint": checkpoint.fingerprint(target)[:16],
            "temperatures": ", ".join(map(str, settings.temperatures)),
            "max_tokens": settings.max_tokens,
            "batch": settings.train.batch * settings.train.accumulate,
            "anchors": settings.train.anchors,
            "rate": settings.train.rate,
            "shape": shape,
            "flashserve_version": __version__,
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
        },
        figures,
        plots.draw(history, figures["all"]["positions"], calibration, settings.output),
        left_out,
    )
    return figures
