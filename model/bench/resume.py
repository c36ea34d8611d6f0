"""Does a training that is killed at random moments end where it would have ended? Of the bundled target, by seed.

    python -m model.bench.resume --seeds 3 --steps 12 --examples 12 --held-out 2 --batch 2 --kills 2 --save-every 2

For each seed `model.demo.draft` is run once to its end, and once killed (SIGKILL) at moments drawn from the time that
the first took, the first of them while it learns, then run again until it is done. Prints both held-out acceptance
lengths, and how many weights differ.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from model.config import DEMO_WEIGHTS


def command(folder: Path, seed: int, options: argparse.Namespace) -> list[str]:
    pace = ["--batch", str(options.batch), "--save-every", str(options.save_every)]
    sizes = ["--examples", str(options.examples), "--steps", str(options.steps), "--held-out", str(options.held_out)]
    where = ["--folder", str(folder), "--target", str(DEMO_WEIGHTS / "target"), "--seed", str(seed)]
    return [sys.executable, "-m", "model.demo.draft", *where, *sizes, *pace]


def compare(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, object]:
    begun = time.time()
    whole, killed = folder / f"whole-{seed}", folder / f"killed-{seed}"
    subprocess.run(command(whole, seed, options), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    done = time.time()
    # First between two steps that it learns in, which are few of the seconds of a short training; then at any moment.
    learning = [(whole / file).stat().st_mtime - begun for file in ("answers.jsonl", "run-draft/state.pt")]
    anywhere = [part * (done - begun) for part in (0.2, 0.9)]
    rng, hit = random.Random(seed), []
    for number in range(options.kills):
        process = subprocess.Popen(  # noqa: S603
            command(killed, seed, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(*(anywhere if number else learning)))
            break  # it was done before its time
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hit.append(_reached(killed))
    subprocess.run(command(killed, seed, options), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    one, other = (load_file(each / "draft" / "model.safetensors") for each in (whole, killed))
    lengths = [
        json.loads((each / "draft" / "config.json").read_text())["acceptance_length"] for each in (whole, killed)
    ]
    return {
        "seed": seed,
        "killed": ", ".join(hit) or "never",
        "whole": lengths[0]["all"],
        "resumed": lengths[1]["all"],
        "weights that differ": sum(int((one[name] != other[name]).sum()) for name in one),
    }


def _reached(folder: Path) -> str:
    """What the killed one had saved."""
    import torch

    state = folder / "run-draft" / "state.pt"
    if state.exists():
        return f"after step {torch.load(state, weights_only=True)['step']} was saved"
    answers = folder / "answers.jsonl"
    return f"after {len(answers.read_text().splitlines())} answers" if answers.exists() else "while it started"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=2, help="of each training, at most")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--save-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--held-out", type=int, default=8, help="prompts of each task")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            rows.append(compare(Path(folder), seed, options))
            print(json.dumps(rows[-1]), flush=True)
    names = list(rows[0])
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
