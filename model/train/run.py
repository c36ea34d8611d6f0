"""Run a whole training: answers, draft, figures, model card. The same settings resume an interrupted run.

    OUTPUT/                  the draft: config.json, model.safetensors; its model card, README.md, and plots
    OUTPUT/run/              the state to resume from: settings.json, answers*.jsonl, state.pt, log.jsonl

This module reads no media files; prompts come from `model.train.data.Prompts`.
"""

from __future__ import annotations

import hashlib
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
from model.request import Grammar, RequestError
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
from model.train.seen import grammars_of
from model.train.team import Team
from model.train.trainer import Row, TrainConfig, train

# Most elements in the drafted logits of a step: a larger draft vocabulary leaves room for fewer drafts.
LOGITS = 1 << 28
MOST_ANCHORS = 24


@dataclass(frozen=True)
class Settings:
    """Hold the settings of one training.

    target: config of the model that answers and is drafted for. A resumed training must have the same settings wherever
    they shape the result; see `identity`.
    """

    target: EngineConfig  # resolved, drafter "off"
    drafter: str
    output: Path
    command: str
    train: TrainConfig = field(default_factory=TrainConfig)
    init: Path | None = None  # a draft to go on from; None: an untrained one
    sizes: Sizes = field(default_factory=Sizes)
    temperatures: tuple[float, ...] = TEMPERATURES
    max_tokens: int = MAX_TOKENS  # of an answer
    sampling: dict[str, Any] = field(default_factory=dict)  # of video frames; only compared when a run resumes
    strict: bool = False  # a prompt that cannot be used is an error
    evaluate_prompts: int = 16  # for each evaluation during training
    evaluate_seconds: float = 20.0
    final_prompts: int = 64  # of each kind, for the final figures
    work: Path | None = None  # replaces OUTPUT/run
    answers: Path | None = None  # replaces OUTPUT/run/answers.jsonl, to be shared by several trainings

    @property
    def run(self) -> Path:
        """Return the folder of the resumable state."""
        return self.work or self.output / "run"

    @property
    def answers_file(self) -> Path:
        """Return the file of the target's answers."""
        return self.answers or self.run / "answers.jsonl"


def open_target(config: EngineConfig, drafter: str) -> Target:
    """Load the target of a resolved config, set up to capture the hidden states that this drafter reads."""
    return load_target(config, presets.TAP_LAYERS.get(drafter))


def check_grammars(grammars: Sequence[Grammar], target: Target) -> None:
    """Raise ConfigError for a grammar that cannot be compiled for this target."""
    compiler = grammars_of(target)
    for grammar in grammars:
        try:
            compiler.begin(grammar)
        except RequestError as error:
            raise ConfigError(str(error)) from error


def anchors(batch: int, shape: DraftShape) -> int:
    """Choose the default number of drafts per answer and step, so that their logits are likely to fit into memory."""
    return max(1, min(MOST_ANCHORS, LOGITS // (batch * shape.block * (shape.vocabulary or shape.vocab_size))))


def run(
    settings: Settings,
    target: Target,
    prompts: Prompts,
    team: Team,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, measure and write the draft.

    Returns figures by kind of prompt, in the process of rank 0; other processes return an empty dict. Raises
    ConfigError if the output folder belongs to other settings, and Interrupted after having saved.
    """
    torch.manual_seed(settings.train.seed)
    network = first(settings, target).train()
    claim(settings, target, network, prompts, team)
    examples = answer(settings, target, prompts, team, stop)
    if network.offered is not None and settings.init is None:
        chosen = frequent(examples, len(network.offered), target.eos_ids)
        network.offered.copy_(torch.tensor(chosen))

    def evaluate(_: int) -> dict[str, Any] | None:
        """Return the acceptance length and its parts on a few held-out prompts; None if the training was stopped."""
        engine = served(settings, target, network, settings.run / "draft")
        numbers = spread(prompts.held_out, settings.evaluate_prompts)
        limit = {"max_tokens": settings.max_tokens, "seconds": settings.evaluate_seconds}
        measured = acceptance(engine, prompts.messages, numbers, grammar=prompts.grammar, stop=stop, **limit)  # type: ignore[arg-type]
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


def first(settings: Settings, target: Target) -> Network:
    """Create the network that the training begins with: an untrained one, or a copy of the draft in `settings.init`.

    Raises ConfigError if that draft cannot be read, was trained for another target, or is of another drafter or shape.
    """
    if settings.init is None:
        return presets.new(settings.drafter, target, sizes=settings.sizes).to(target.device)
    if (found := checkpoint.described(settings.init).drafter) != settings.drafter:
        raise ConfigError(f"--init: draft {str(settings.init)!r} is of --drafter {found}, not {settings.drafter}")
    chosen = [name for name, value in asdict(settings.sizes).items() if value is not None]
    if chosen:
        raise ConfigError(f"--init keeps the shape of its draft: leave out the option for its {chosen[0]}")
    network: Network = checkpoint.load(settings.init, target).float().requires_grad_(True)
    return network


# --- a run resumes only with the settings that it began with


def claim(settings: Settings, target: Target, network: Network, prompts: Prompts, team: Team) -> None:
    """Reserve the output folder for this training.

    Raises ConfigError if it holds a training of other settings; the message lists each difference.
    """
    # Tuples become lists in JSON, so the comparison needs the same round trip.
    wanted = json.loads(json.dumps(identity(settings, target, network, prompts, team)))
    file = settings.run / "settings.json"
    begun = file.exists()
    team.wait()  # no process may write before all have looked
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
    """List all settings that shape the result."""
    config = asdict(settings.train)
    shaping = ("steps", "batch", "anchors", "rate", "gamma", "warmup", "seed", "autocast")
    return {
        "target": checkpoint.fingerprint(target),
        "drafter": settings.drafter,
        "draft": asdict(network.config),
        "init": settings.init and hashlib.sha256((settings.init / "model.safetensors").read_bytes()).hexdigest()[:16],
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
    """Collect the target's answers to all training prompts.

    Each process of a team answers its share, then reads the answers of all. Raises ConfigError if `settings.strict` is
    set and a prompt cannot be used, or if no answer has three tokens or more.
    """
    file = settings.answers_file
    file.parent.mkdir(parents=True, exist_ok=True)
    before = {n for each in answer_files(file) for n in [*(e.number for e in read_answers(each)), *unusable(each)]}
    missing = [number for number in prompts.train if number not in before]
    team.wait()  # no process may write before all know what is missing
    if missing[team.rank :: team.size]:
        write(
            Engine(settings.target, target),
            prompts.messages,
            missing[team.rank :: team.size],
            file if team.rank == 0 else file.with_stem(f"{file.stem}-{team.rank}"),
            grammar=prompts.grammar,
            temperatures=settings.temperatures,
            max_tokens=settings.max_tokens,
            seed=settings.train.seed,
            stop=stop,
        )
    team.wait()
    if settings.strict and (bad := [reason for each in answer_files(file) for reason in unusable(each).values()]):
        raise ConfigError(f"{len(bad)} prompts cannot be used, and --strict: {bad[0]}")
    known = {e.number: e for each in answer_files(file) for e in read_answers(each)}
    examples = [replace(known[n], grammar=prompts.grammar(n)) for n in prompts.train if n in known]
    if not any(len(e.answer) > 2 for e in examples):
        raise ConfigError("no prompt got an answer of three tokens or more: there is nothing to learn from")
    return examples


def answer_files(file: Path) -> list[Path]:
    """List the answers file of rank 0 (which may not exist) and those of the other processes."""
    return [file, *sorted(file.parent.glob(f"{file.stem}-[0-9]*{file.suffix}"))]


def served(settings: Settings, target: Target, network: Network, folder: Path) -> Engine:
    """Write the current draft to `folder` and load it into an engine, exactly as serving does."""
    checkpoint.save(folder, network, target, drafter=settings.drafter)
    few = min(8, settings.target.max_num_seqs)
    config = replace(
        settings.target, draft=str(folder), drafter="auto", adaptive_drafting=False, graphs=False, max_num_seqs=few
    )
    return Engine(config, target)


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Pick up to `count` numbers at random from all over the list; every call picks the same ones."""
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
    """Measure the draft on held-out prompts, then write it with its model card and plots.

    Returns figures by kind of prompt. Raises Interrupted if `stop()` becomes true while it measures.
    """
    engine = served(settings, target, network, settings.run / "draft")
    measured: dict[str, Acceptance] = {}
    for kind, numbers in sorted(by_kind(prompts).items()):
        some = spread(numbers, settings.final_prompts)
        measured[kind] = acceptance(
            engine, prompts.messages, some, grammar=prompts.grammar, max_tokens=settings.max_tokens, stop=stop
        )
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
