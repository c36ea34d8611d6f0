"""Third stage of the bundled model: its draft, trained on what the finished target says about new scenes.

Other drafters are trained the same way, on the same answers: `--drafter medusa`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from model.config import EngineConfig
from model.demo import prompts
from model.demo.prompts import TASKS, Task
from model.draft import checkpoint, presets
from model.engine import Engine
from model.request import Request, SamplingParams
from model.targets.base import load
from model.train.data import write_answers
from model.train.trainer import TrainConfig, train


def acceptance(engine: Engine, task: Task, count: int, temperature: float = 0.0) -> float:
    """Mean tokens a verify step emits, over held-out prompts of one task."""
    for i in range(count):
        params = SamplingParams(max_tokens=160, temperature=temperature, seed=i)
        engine.add(Request(str(i), prompts.messages(i, split="heldout", task=task), params))
    lengths: list[int] = []
    while engine.has_work:
        engine.step()
        lengths += engine.pop_stats().acceptance_lengths
    return round(sum(lengths) / max(1, len(lengths)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", choices=checkpoint.KINDS, default="flash")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for answers, checkpoints and the draft")
    parser.add_argument("--target", type=Path, help="the target's folder (default: FOLDER/target)")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    folder, drafter = arguments.folder, arguments.drafter
    folder.mkdir(parents=True, exist_ok=True)
    model = str(arguments.target or folder / "target")
    name = "draft" if drafter == "flash" else f"draft-{drafter}"
    plain = EngineConfig(model=model, drafter="off", dtype="bfloat16", max_num_seqs=16, max_model_len=1280).resolved()
    target = load(plain, presets.TAP_LAYERS.get(drafter))
    answers = folder / "answers.jsonl"
    examples = write_answers(Engine(plain, target), prompts.messages, range(arguments.examples), answers)
    torch.manual_seed(0)
    network = presets.new(drafter, target)
    settings = TrainConfig(steps=arguments.steps)
    train(target, network, examples, prompts.messages, settings, folder / f"{name}.pt", prompts.task_of)
    notes = {"command": "python -m model.demo.draft " + " ".join(sys.argv[1:]), "examples": len(examples)}
    checkpoint.save(folder / name, network, target, drafter=drafter, **notes)
    served = Engine(
        EngineConfig(model=model, draft=str(folder / name), max_num_seqs=8, max_model_len=1280, load_aware=False)
    )
    figures = {task: acceptance(served, task, 32) for task in TASKS}
    checkpoint.save(folder / name, network, target, drafter=drafter, **notes, acceptance_length=figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
