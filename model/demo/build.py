"""Rebuild the bundled models from their seeds: tower, target, draft, evaluation. Every stage resumes an earlier run.

python -m model.demo.build [--folder runs/demo] [--install]
python -m model.demo.build --folder runs/rehearsal --rehearse

A build takes some hours on 2 cores and needs a C++ compiler. A rehearsal takes every stage through a few steps in
minutes; its models are useless. Stages can also be run alone: model.demo.vision, .target, .draft, .evaluate; and for
the second target, which is initialised from the first, .qwen_vision and .qwen_target. With --install the result
replaces the files in model/demo/weights.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from model.config import DEMO_WEIGHTS

DRAFT = ["--examples", "12000", "--steps", "1800"]
# The first draft goes on from that, on answers that follow schemas beside free ones.
SCHEMAS = ["--examples", "1600", "--schemas", "1500", "--steps", "700", "--rate", "1e-3", "--precision", "off"]
FEW_STEPS = ["--steps", "3"]
SHORT_DRAFT = ["--examples", "48", "--held-out", "1", *FEW_STEPS]
SHORT_SCHEMAS = ["--schemas", "16", *SHORT_DRAFT]
FEW_SCENES = ["--scenes", "4", "--clips", "2"]
LARGEST = 45_000_000  # bytes of all weights together, since the repository contains them


# Folder of each part in a build -> its folder in the repository.
PARTS = {"target": "target", "draft": "draft", "qwen-target": "qwen-target", "qwen/draft": "qwen-draft"}
PLOTS = shutil.ignore_patterns("*.png", "README.md")  # a draft's card describes its training, not the shipped files


def install(folder: Path, weights: Path) -> None:
    """Copy the finished targets and drafts to `weights`, or exit if together they exceed LARGEST bytes."""
    size = sum((folder / part / "model.safetensors").stat().st_size for part in PARTS)
    if size > LARGEST:
        sys.exit(f"the weights take {size} bytes, more than {LARGEST}")
    for part, name in PARTS.items():
        shutil.copytree(folder / part, weights / name, dirs_exist_ok=True, ignore=PLOTS)
    print(f"installed {size / 1e6:.1f} MB in {weights}")


def stages(folder: str, *, rehearse: bool) -> list[list[str]]:
    """List the modules to run in order, each with its options."""
    qwen, first = ["--folder", f"{folder}/qwen", "--target", f"{folder}/qwen-target"], ["--first", f"{folder}/target"]
    learn, look = (FEW_STEPS, FEW_SCENES) if rehearse else ([], [])
    draft, schemas = (SHORT_DRAFT, SHORT_SCHEMAS) if rehearse else (DRAFT, SCHEMAS)
    return [
        ["model.demo.vision", "--folder", folder, *learn],
        ["model.demo.target", "--folder", folder, *learn],
        ["model.demo.draft", "--folder", folder, "--name", "draft-free", *draft],
        ["model.demo.draft", "--folder", folder, "--init", f"{folder}/draft-free", *schemas],
        _evaluation(f"{folder}/target", look),
        ["model.demo.qwen_vision", "--folder", folder, *first, *learn],
        ["model.demo.qwen_target", "--folder", folder, *first, *learn],
        _evaluation(f"{folder}/qwen-target", look),
        ["model.demo.draft", *qwen, *draft, "--frames", "64"],
    ]


def _evaluation(checkpoint: str, look: list[str]) -> list[str]:
    """Return the stage that evaluates a checkpoint and writes evaluation.json into its folder."""
    return ["model.demo.evaluate", checkpoint, *look, "--output", f"{checkpoint}/evaluation.json"]


def main() -> None:
    """Run all stages as subprocesses, then install the result if --install is set."""
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
