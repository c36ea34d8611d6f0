"""Third stage of the bundled model: the FLASH draft, trained on what the finished target says about new scenes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from model.config import EngineConfig
from model.demo import prompts
from model.demo.prompts import TASKS, Task
from model.draft import checkpoint
from model.draft.network import DraftConfig, DraftNetwork
from model.engine import Engine
from model.request import Request, SamplingParams
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
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    engine = Engine(
        EngineConfig(model=str(folder / "target"), drafter="off", dtype="bfloat16", max_num_seqs=16, max_model_len=1280)
    )
    target = engine.target
    examples = write_answers(engine, prompts.messages, range(arguments.examples), folder / "answers.jsonl")
    del engine
    torch.manual_seed(0)
    config = DraftConfig(
        hidden_size=256,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        tap_layers=target.tap_layers,
    )
    network = DraftNetwork(config)
    train(
        target,
        network,
        examples,
        prompts.messages,
        TrainConfig(steps=arguments.steps),
        folder / "draft.pt",
        prompts.task_of,
    )
    command = "python -m model.demo.draft " + " ".join(sys.argv[1:])
    checkpoint.save(folder / "draft", network, target, command=command)
    served = Engine(
        EngineConfig(model=str(folder / "target"), draft=str(folder / "draft"), max_num_seqs=8, max_model_len=1280)
    )
    figures = {task: acceptance(served, task, 32) for task in TASKS}
    checkpoint.save(
        folder / "draft", network, target, command=command, examples=len(examples), acceptance_length=figures
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
