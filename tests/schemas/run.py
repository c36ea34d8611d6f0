"""Proves structured output: 500 requests with 20 schemas and other grammars, on several models, in every way to run.

    python -m tests.schemas.run [--requests 500] [--subjects demo,scripted] [--modes "off, 16;trees, 16"]

Prints a table with, for each model and mode: requests, those that ended by themselves and how many of these are valid,
those that were cut and how many of these begin a document, and how many differ from the answer alone without a draft.
Exits with 1 if one is not as it should be, and lists it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

from tests.schemas import proof
from tests.schemas.proof import MODES, Counts, Subject

# Each with its share of the requests.
SUBJECTS: Mapping[str, tuple[float, Callable[[Path, int], Subject]]] = {
    "demo": (0.2, lambda _, number: proof.bundled("demo", number)),
    "demo-qwen": (0.16, lambda _, number: proof.bundled("demo-qwen", number)),
    "torch": (0.16, proof.in_torch),
    "scripted": (0.28, proof.by_script),
    "unsure": (0.2, lambda folder, number: proof.by_script(folder, number, margin=8.0)),
}
HEAD = ("model", "mode", "requests", "ended", "valid", "cut", "prefix", "different", "tokens", "drafted", "accepted")


def row(subject: str, mode: str, counts: Counts) -> str:
    numbers = (counts.requests, counts.ended, counts.valid, counts.cut, counts.begun, counts.different, counts.tokens)
    return f"| {' | '.join((subject, mode, *map(str, (*numbers, counts.drafted, counts.accepted))))} |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.schemas.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=500, help="in all; each runs in every mode")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="separated by commas")
    parser.add_argument("--modes", default=";".join(MODES), help="separated by semicolons")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    rows, faults = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)], []
    for name in options.subjects.split(","):
        share, make = SUBJECTS[name]
        with tempfile.TemporaryDirectory() as folder:
            subject = make(Path(folder), round(options.requests * share))
            for mode in options.modes.split(";"):
                begun = time.perf_counter()
                counts = subject.proven(MODES[mode])
                rows.append(row(subject.name, mode, counts))
                faults += [f"{subject.name}, {mode}: {fault}" for fault in counts.faults]
                seconds = time.perf_counter() - begun
                print(f"{rows[-1]} {seconds:.0f} s, {len(counts.faults)} faults", file=sys.stderr, flush=True)
    print("\n".join([*rows, "", *faults, f"{len(faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
