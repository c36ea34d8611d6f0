"""Checks that every way of decoding gives the same tokens: `python -m model.bench.equality`.

On held-out scenes of all four tasks, or on a user's own files (--dataset):

    greedy, alone, without speculation   ==  transformers' `generate`
    without speculation, alone           ==  with speculation, alone
                                         ==  in a crowd: up to 16 at once that come and go at random moments, of all
                                             settings mixed, some without speculation, some aborted (these: cut short)

for greedy decoding and for seeded sampling. Every difference is listed with the position where it begins and with the
margin there, measured by transformers in one pass over the tokens before it (margins.py says what a margin is). Where
the margin is below epsilon, rounding may decide, and that is the only excuse; in float32, whatever differed is then run
again in float64, where nothing may. Where the native library computes all, it promises equal bits, and nothing excuses
a difference between our own ways. Exit code 1: something differs that has no excuse.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from model.bench import report
from model.bench.differences import EPSILON, Comparison, Difference, find_differences, summarize
from model.bench.jobs import GREEDY, SETTINGS, Answer, Job, Setting, answer_alone, answer_in_crowd, crowd_of
from model.bench.options import run_program
from model.bench.reference import Reference
from model.bench.workload import Decoding, Sample, decode_items, pillow, read_dataset, scene
from model.config import DRAFTERS, DTYPES, EngineConfig
from model.demo.prompts import TASKS
from model.engine.engine import Engine

QUICK = (GREEDY, Setting(1.0, 0.9))
SEED = 20_26
PROG = "python -m model.bench.equality"


class Check:
    """The comparisons, in one dtype."""

    def __init__(self, config: EngineConfig, *, progress: bool = True) -> None:
        self.config, self.progress = config.resolved(), progress
        self.reference = Reference(self.config.model, device=self.config.device, dtype=self.config.dtype)
        self.plain = Engine(replace(self.config, drafter="off", max_num_seqs=1))
        self.drafting = Engine(self.config)

    def run(self, samples: Sequence[Sample], cases: Sequence[int], settings: Sequence[Setting]) -> list[Comparison]:
        """Make all comparisons, for each of these samples under every setting."""
        plain_jobs = [Job(case, setting, speculation=False) for setting in settings for case in cases]
        drafted_jobs = [replace(job, speculation=True) for job in plain_jobs]
        greedy = [job for job in plain_jobs if job.setting == GREEDY]
        crowd = crowd_of(cases, settings, seed=SEED)
        total = len(greedy) + 2 * len(plain_jobs) + len(crowd)
        with tqdm(total=total, unit="request", disable=None if self.progress else True) as bar:
            bar.set_description("without speculation, alone")
            alone = answer_alone(self.plain, plain_jobs, samples, bar.update)
            plain = {(job.case, job.setting): answer for job, answer in zip(plain_jobs, alone, strict=True)}
            bar.set_description("transformers' generate")
            generated: list[Answer] = []
            for job in greedy:
                sample = samples[job.case]
                generated += self.reference.generate([sample.conversation], job.params(sample)).tokens
                bar.update()
            bar.set_description("with speculation, alone")
            drafted = answer_alone(self.drafting, drafted_jobs, samples, bar.update)
            bar.set_description("in a crowd")
            crowded = answer_in_crowd(self.drafting, crowd, samples, seed=SEED, done=bar.update)
        exact = self.plain.target.native and self.drafting.target.native
        in_crowd = [plain[j.case, j.setting] for j in crowd]
        return [
            Comparison("generate = plain", greedy, generated, [plain[j.case, j.setting] for j in greedy]),
            Comparison(f"plain = {self.config.drafter}, alone", drafted_jobs, alone, drafted, exact),
            Comparison("plain = in a crowd", crowd, in_crowd, crowded, exact),
        ]


def run_check(check: Check, settings: Sequence[Setting], samples: Sequence[Sample]) -> dict[str, Any]:
    """Run the whole check; `passed` says whether nothing differs without excuse."""
    config = check.config
    epsilon = EPSILON[config.dtype]
    machine = report.machine(config.device, config.dtype)
    comparisons = check.run(samples, range(len(samples)), settings)
    found: list[Difference] = []
    again = None
    if any(comparison.differing() for comparison in comparisons):
        # A finer type tells how near it truly was; for 16-bit models float32, in which large ones still fit.
        finer = "float64" if config.dtype in ("float32", "float64") else "float32"
        judge = Reference(config.model, device=config.device, dtype=finer)
        found = find_differences(comparisons, samples, judge, epsilon)
        if config.dtype == "float32":
            excused = {d.case for d in found if d.excused}
            cases = sorted(excused | set(sorted({d.case for d in found} - excused)[:8]))
            again = _in_float64(config, samples, cases, settings, judge)
    return {
        "machine": machine,
        "cases": len(samples),
        "max_tokens": max(sample.max_tokens for sample in samples),
        "epsilon": dict(zip(("greedy", "sampled"), epsilon, strict=True)),
        "comparisons": summarize(comparisons),
        "differences": [asdict(difference) for difference in found],
        "largest_margin": {
            kind: max(
                (d.margin for d in found if d.margin is not None and (d.setting == "greedy") == greedy), default=None
            )
            for kind, greedy in (("greedy", True), ("sampled", False))
        },
        "float64": again,
        "passed": all(difference.excused for difference in found) and (again is None or not again["differences"]),
    }


def _in_float64(
    config: EngineConfig,
    samples: Sequence[Sample],
    cases: Sequence[int],
    settings: Sequence[Setting],
    judge: Reference,
) -> dict[str, Any]:
    """Repeat the cases that differed in float32 where rounding is too small to decide anything."""
    fine = Check(replace(config, dtype="float64")).run(samples, cases, settings)
    found = find_differences(fine, samples, judge, EPSILON["float64"])
    return {
        "cases": list(cases),
        "comparisons": summarize(fine),
        "differences": [asdict(difference) for difference in found],
    }


def show(result: dict[str, Any]) -> str:
    """Write the result as tables."""
    lines: list[tuple[str, ...]] = [("comparison", "setting", "requests", "tokens", "differ")]
    lines += [tuple(str(value) for value in row.values()) for row in result["comparisons"]]
    text = report.aligned(lines)
    if result["differences"]:
        lines = [tuple(Difference.__annotations__)]
        for one in result["differences"]:
            lines.append(tuple(f"{v:.2e}" if isinstance(v, float) else str(v) for v in one.values()))
        text += f"\n\nepsilon {result['epsilon']}; every difference:\n{report.aligned(lines)}"
    if result["float64"]:
        again = result["float64"]
        text += f"\n\nagain in float64, {len(again['cases'])} cases: {len(again['differences'])} differences"
    return f"{text}\n\n{'passed' if result['passed'] else 'FAILED: something differs without excuse'}"


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="demo", help="path or id of the target (default: the bundled one)")
    add("--drafter", default="flash", choices=DRAFTERS[1:-1], help="default: flash")
    add("--draft", help="path of its draft")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="float32", choices=DTYPES)
    add("--threads", type=int, help="CPU threads (default: as torch chooses)")
    add("--dataset", type=Path, metavar="FILE", help="check on these images, videos and prompts: JSONL, or a folder")
    add("--cases", type=int, help="number of prompts (default: 200 of the bundled scenes; all of --dataset)")
    add("--max-tokens", type=int, help="longest answer (default: 160)")
    add("--output", type=Path, help="write the figures to this file, as JSON")
    add("--quick", action="store_true", help="12 scenes, 48 tokens, two settings")
    return parser


def main(argv: list[str], prog: str = PROG, decoding: Decoding = pillow) -> int:
    """Run the check with these options; 0 where it passed. decoding: how the files of --dataset become media."""
    args = build_parser(prog).parse_args(argv)
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = EngineConfig(
        model=args.model, draft=args.draft, device=args.device, dtype=args.dtype, drafter=args.drafter
    )
    max_tokens = args.max_tokens or (48 if args.quick else 160)
    items = list(read_dataset(args.dataset)[: args.cases]) if args.dataset else []
    check = Check(config)
    if items:
        samples = decode_items(items, check.plain, decoding, max_tokens)
    else:
        cases = args.cases or (12 if args.quick else 200)
        samples = [scene(case, TASKS[case % len(TASKS)], max_tokens) for case in range(cases)]
    result = run_check(check, QUICK if args.quick else SETTINGS, samples)
    result["command"] = shlex.join([*prog.split(), *argv])
    print(show(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
