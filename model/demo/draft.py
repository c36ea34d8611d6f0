"""Third stage of the bundled model: train its draft on the finished target's answers about new scenes.

Other drafters are trained in the same way on the same answers, for example with `--drafter medusa`. This is `flashserve
train` on prompts that are drawn by number; see `model/train/run.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from model.config import EngineConfig
from model.demo.prompts import LONG_FRAMES, ROOM, Scenes
from model.drafters import checkpoint
from model.train import interrupt, team
from model.train.data import Interrupted
from model.train.run import Settings, open_target, run
from model.train.trainer import TrainConfig


def main() -> None:
    """Parse the options, train the draft and print its acceptance lengths by kind of prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", choices=checkpoint.KINDS, default="flash")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for answers, checkpoints and the draft")
    parser.add_argument("--target", type=Path, help="the target's folder (default: FOLDER/target)")
    parser.add_argument("--init", type=Path, help="a draft to go on from (default: an untrained one)")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--schemas", type=int, default=0, help="further examples, whose answers follow JSON schemas")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=TrainConfig.rate)
    parser.add_argument("--precision", choices=("bf16", "off"), default="bf16", help="mixed, or float32")
    parser.add_argument("--name", help="of the draft's folder in FOLDER (default: draft, or draft-DRAFTER)")
    parser.add_argument("--save-every", type=float, default=45.0, help="seconds")
    parser.add_argument("--frames", type=int, default=LONG_FRAMES["demo"], help="of a long video (default: 24)")
    parser.add_argument("--held-out", type=int, default=32, help="prompts of each kind to measure on")
    arguments = parser.parse_args()
    folder, drafter = arguments.folder, arguments.drafter
    model = str(arguments.target or folder / "target")
    name = arguments.name or ("draft" if drafter == "flash" else f"draft-{drafter}")
    plain = EngineConfig(model=model, drafter="off", dtype="bfloat16", max_num_seqs=16, max_model_len=ROOM).resolved()
    together = team.gather()
    settings = Settings(
        target=plain,
        drafter=drafter,
        output=folder / name,
        command="python -m model.demo.draft " + " ".join(sys.argv[1:]),
        train=TrainConfig(
            steps=arguments.steps,
            batch=arguments.batch,
            rate=arguments.rate,
            seed=arguments.seed,
            save_every=arguments.save_every,
            evaluate_every=300,
            autocast=arguments.precision == "bf16",
        ),
        init=arguments.init,
        work=folder / f"run-{name}",
        answers=folder / "answers.jsonl",
        final_prompts=arguments.held_out,
    )
    prompts = Scenes(arguments.examples, arguments.frames, arguments.held_out, arguments.schemas)
    with interrupt.on_signals() as stop:
        try:
            figures = run(settings, open_target(plain, drafter), prompts, together, stop)
        except Interrupted:
            sys.exit("stopped, and saved: the same command goes on")
    print(json.dumps({task: each["length"] for task, each in figures.items()}))


if __name__ == "__main__":
    main()
