"""One run of the benchmark: load every arm once, let them take turns on the same prompts, print what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from model.bench import figures, report, workload
from model.bench.arms import Arm, EngineArm, GenerateArm, ReplayArm, Run, in_turn, joined
from model.bench.options import REPLAY, Options
from model.bench.reference import Conversation, Reference
from model.config import EngineConfig
from model.engine.engine import Engine
from model.request import SamplingParams

WARM_UP_TOKENS = 32
NOTES = """\
tokens/s: whole requests, all tokens / all seconds (tokenising, vision and prefill included); its "x" are the headline.
decode/s: tokens after each first one / seconds without vision and prefill.   accept: tokens per verify step.
x: median [min-max] of ratios within a repeat.   vision/...: shares of the time. same: requests with `off`'s tokens."""


def run(options: Options, command: str) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object."""
    machine, rows = measure(options)
    result = {"machine": machine, "command": command, "rows": rows}
    report.show(result, f"{report.table(rows)}\n\n{NOTES}", options.output)
    return result


def measure(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine, and a row for every task, batch size and arm."""
    logging.disable_progress_bar()  # ours is enough
    if options.threads:
        torch.set_num_threads(options.threads)
    config = options.config_of("off").resolved()
    machine = report.machine(config.device, config.dtype)
    rows: list[dict[str, Any]] = []
    arms = [_arm(name, options, config) for name in options.arms]
    sampling = "greedy" if options.sampling == "greedy" else "seeded (temperature 1)"
    for task, batch, runs in _measured(options, arms):
        target = report.target_name(options.model)
        rows += figures.rows(runs, task=task, target=target, sampling=sampling, batch=batch)
    return machine, rows


def _arm(name: str, options: Options, plain: EngineConfig) -> Arm:
    if name == "generate":
        return GenerateArm(Reference(plain.model, device=plain.device, dtype=plain.dtype))
    if name.startswith(REPLAY):
        without = EngineArm("off", Engine(plain))
        return ReplayArm(float(name.removeprefix(REPLAY)), without, Engine(plain, without.engine.target))
    return EngineArm(name, Engine(options.config_of(name)))


def _measured(options: Options, arms: Sequence[Arm]) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """Every task at every batch size: the runs of each arm, one per repeat."""
    total = len(options.tasks) * len(options.batches) * (options.repeats + 1) * len(arms)
    params = options.sampling_params
    with tqdm(total=total, unit="run", disable=None) as progress:
        for task in options.tasks:
            measured = workload.conversations(options, task)
            warm_up = workload.conversations(options, task, first=workload.WARM_UP, count=max(options.batches))
            for batch in options.batches:
                progress.set_description(f"{task}, {batch} at once")
                few = replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens))
                for arm in arms:
                    arm.run(warm_up[:batch], few)
                    progress.update()
                runs: dict[str, list[Run]] = {arm.name: [] for arm in arms}
                for repeat in range(options.repeats):
                    for arm in in_turn(arms, repeat):
                        runs[arm.name].append(_rounds(arm, measured, batch, params))
                        progress.update()
                yield task, batch, runs


def _rounds(arm: Arm, conversations: list[Conversation], batch: int, params: SamplingParams) -> Run:
    """Every prompt once, `batch` at a time; prompts come again from the first where the last round needs more."""
    count = -(-len(conversations) // batch) * batch
    cycled = [conversations[i % len(conversations)] for i in range(count)]
    return joined([
        arm.run(cycled[start : start + batch], replace(params, seed=params.seed + start))
        for start in range(0, count, batch)
    ])  # fmt: skip
