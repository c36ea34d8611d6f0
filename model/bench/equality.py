"""Does every way of decoding say the same? `python -m model.bench.equality` answers for a whole model.

On held-out media and prompts of all four tasks:

    greedy, alone, without speculation   ==  transformers' `generate`
    without speculation, alone           ==  with speculation, alone
                                         ==  in a crowd: up to 16 at once that come and go at random moments, of all
                                             settings mixed, some without speculation, some aborted (these: cut short)

for greedy decoding and for seeded sampling. Every difference is listed with the position where it begins and with the
margin there, measured by transformers in one pass over the tokens before it (margins.py says what a margin is). Where
the margin is below epsilon, rounding may decide, and that is the only excuse; in float32, whatever differed is then run
again in float64, where nothing may. Exit code 1: something differs that has no excuse.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from model.bench import report
from model.bench.differences import EPSILON, Comparison, Difference, differences, summary
from model.bench.jobs import GREEDY, SETTINGS, Job, Setting, alone, crowd_of, mixed, task_of
from model.bench.options import program
from model.bench.reference import Conversation, Reference
from model.config import DRAFTERS, DTYPES, EngineConfig
from model.demo import prompts
from model.engine.engine import Engine

QUICK = (GREEDY, Setting(1.0, 0.9))
SEED = 20_26


class Check:
    """The comparisons, in one dtype."""

    def __init__(self, config: EngineConfig, max_tokens: int, *, progress: bool = True) -> None:
        self.config, self.max_tokens, self.progress = config.resolved(), max_tokens, progress
        self.reference = Reference(self.config.model, device=self.config.device, dtype=self.config.dtype)
        self.plain = Engine(replace(self.config, drafter="off", max_num_seqs=1))
        self.drafting = Engine(self.config)

    def run(self, conversations: Mapping[int, Conversation], settings: Sequence[Setting]) -> list[Comparison]:
        """All comparisons, for every case under every setting."""
        plain_jobs = [Job(case, setting, speculation=False) for setting in settings for case in conversations]
        drafted_jobs = [replace(job, speculation=True) for job in plain_jobs]
        greedy = [job for job in plain_jobs if job.setting == GREEDY]
        crowd = crowd_of(conversations, settings, seed=SEED)
        total = len(greedy) + 2 * len(plain_jobs) + len(crowd)
        with tqdm(total=total, unit="request", disable=None if self.progress else True) as bar:
            bar.set_description("without speculation, alone")
            told = alone(self.plain, plain_jobs, conversations, self.max_tokens, bar.update)
            plain = {(job.case, job.setting): answer for job, answer in zip(plain_jobs, told, strict=True)}
            bar.set_description("transformers' generate")
            generated = []
            for job in greedy:
                answers = self.reference.generate([conversations[job.case]], job.params(self.max_tokens)).tokens
                generated.append(answers[0])
                bar.update()
            bar.set_description("with speculation, alone")
            drafted = alone(self.drafting, drafted_jobs, conversations, self.max_tokens, bar.update)
            bar.set_description("in a crowd")
            together = mixed(self.drafting, crowd, conversations, self.max_tokens, seed=SEED, done=bar.update)
        return [
            Comparison("generate = plain", greedy, generated, [plain[j.case, j.setting] for j in greedy]),
            Comparison(f"plain = {self.config.drafter}, alone", drafted_jobs, told, drafted),
            Comparison("plain = in a crowd", crowd, [plain[j.case, j.setting] for j in crowd], together),
        ]


def check(config: EngineConfig, settings: Sequence[Setting], cases: int, max_tokens: int) -> dict[str, Any]:
    """The whole check; `passed` says whether nothing differs without excuse."""
    conversations = {case: prompts.messages(case, split="heldout", task=task_of(case)) for case in range(cases)}
    config = config.resolved()
    epsilon = EPSILON[config.dtype]
    machine = report.machine(config.device, config.dtype)
    comparisons = Check(config, max_tokens).run(conversations, settings)
    found: list[Difference] = []
    again = None
    if any(comparison.differing() for comparison in comparisons):
        # A finer type tells how near it truly was; for 16-bit models float32, in which large ones still fit.
        finer = "float64" if config.dtype in ("float32", "float64") else "float32"
        judge = Reference(config.model, device=config.device, dtype=finer)
        found = differences(comparisons, conversations, judge, max_tokens, epsilon)
        if config.dtype == "float32":
            excused = {d.case for d in found if d.excused}
            cases_again = excused | set(sorted({d.case for d in found} - excused)[:8])
            again = _in_float64(config, {c: conversations[c] for c in sorted(cases_again)}, settings, judge, max_tokens)
    return {
        "machine": machine,
        "cases": cases,
        "max_tokens": max_tokens,
        "epsilon": dict(zip(("greedy", "sampled"), epsilon, strict=True)),
        "comparisons": summary(comparisons),
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
    conversations: Mapping[int, Conversation],
    settings: Sequence[Setting],
    judge: Reference,
    max_tokens: int,
) -> dict[str, Any]:
    """The cases that differed in float32, once more where rounding is too small to decide anything."""
    fine = Check(replace(config, dtype="float64"), max_tokens).run(conversations, settings)
    found = differences(fine, conversations, judge, max_tokens, EPSILON["float64"])
    return {
        "cases": list(conversations),
        "comparisons": summary(fine),
        "differences": [asdict(difference) for difference in found],
    }


def show(result: dict[str, Any]) -> str:
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "model.bench.equality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="path or id of the target (default: the bundled one)")
    parser.add_argument("--drafter", default="flash", choices=DRAFTERS[1:-1], help="default: flash")
    parser.add_argument("--draft", help="path of its draft")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cases", type=int, help="media x prompts (default: 200)")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: 160)")
    parser.add_argument("--output", type=Path, help="write the figures to this file, as JSON")
    parser.add_argument("--quick", action="store_true", help="12 cases, 48 tokens, two settings")
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    if given.threads:
        torch.set_num_threads(given.threads)
    config = EngineConfig(
        model=given.model, draft=given.draft, device=given.device, dtype=given.dtype, drafter=given.drafter
    )
    result = check(
        config,
        QUICK if given.quick else SETTINGS,
        given.cases or (12 if given.quick else 200),
        given.max_tokens or (48 if given.quick else 160),
    )
    result["command"] = shlex.join(["python", "-m", "model.bench.equality", *argv])
    print(show(result))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(program(main))
