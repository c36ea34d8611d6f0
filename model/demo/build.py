"""Rebuild the bundled models from their seeds: tower, target, draft, evaluation. Every stage resumes where it stopped.

python -m model.demo.build [--folder runs/demo] [--install]
python -m model.demo.build --folder runs/rehearsal --rehearse

Some hours on 2 cores, with a C++ compiler at hand; a rehearsal takes every stage through a few steps, in minutes, and
what comes of it sees nothing. Stages can also be run alone: model.demo.vision, .target, .draft,
.evaluate; and for the second target, which begins as the first one's sibling, .qwen_vision and .qwen_target. With
--install the result replaces what lies in model/demo/weights.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from model.config import DEMO_WEIGHTS

DRAFT = ["--examples", "12000", "--steps", "1800"]
FEW_STEPS = ["--steps", "3"]
SHORT_DRAFT = ["--examples", "48", "--held-out", "1", *FEW_STEPS]
FEW_SCENES = ["--scenes", "4", "--clips", "2"]
LARGEST = 45_000_000  # bytes of all weights together: they live in the repository


# Where each lies in the folder of a build, and in the repository.
PARTS = {"target": "target", "draft": "draft", "qwen-target": "qwen-target", "qwen/draft": "qwen-draft"}
PLOTS = shutil.ignore_patterns("*.png", "README.md")  # a draft's card speaks of its training, not of what is shipped


def install(folder: Path, weights: Path) -> None:
    """Copy the finished targets and drafts, if together they are small enough."""
    size = sum((folder / part / "model.safetensors").stat().st_size for part in PARTS)
    if size > LARGEST:
        sys.exit(f"the weights take {size} bytes, more than {LARGEST}")
    for part, name in PARTS.items():
        shutil.copytree(folder / part, weights / name, dirs_exist_ok=True, ignore=PLOTS)
    print(f"installed {size / 1e6:.1f} MB in {weights}")


def stages(folder: str, *, rehearse: bool) -> list[list[str]]:
    """Modules with their options, in order."""
    qwen, first = ["--folder", f"{folder}/qwen", "--target", f"{folder}/qwen-target"], ["--first", f"{folder}/target"]
    learn, look = (FEW_STEPS, FEW_SCENES) if rehearse else ([], [])
    draft = SHORT_DRAFT if rehearse else DRAFT
    return [
        ["model.demo.vision", "--folder", folder, *learn],
        ["model.demo.target", "--folder", folder, *learn],
        ["model.demo.draft", "--folder", folder, *draft],
        _evaluation(f"{folder}/target", look),
        ["model.demo.qwen_vision", "--folder", folder, *first, *learn],
        ["model.demo.qwen_target", "--folder", folder, *first, *learn],
        _evaluation(f"{folder}/qwen-target", look),
        ["model.demo.draft", *qwen, *draft, "--frames", "64"],
    ]


def _evaluation(checkpoint: str, look: list[str]) -> list[str]:
    return ["model.demo.evaluate", checkpoint, *look, "--output", f"{checkpoint}/evaluation.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--install", action="store_true")
    chosen.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    for stage in stages(str(arguments.folder), rehearse=arguments.rehearse):
        print("==", *stage, flush=True)
        subprocess.run([sys.executable, "-m", *stage], check=True)  # noqa: S603
    if arguments.install:
        install(arguments.folder, DEMO_WEIGHTS)


if __name__ == "__main__":
    main()
