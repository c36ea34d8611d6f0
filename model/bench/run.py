"""Runs the benchmark: loads every arm once, lets them take turns on the same prompts, prints table and JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from model.bench import figures, report
from model.bench.arms import Arm, EngineArm, GenerateArm, ReplayArm, Run, combined, rotated
from model.bench.options import REPLAY, Options
from model.bench.reference import Reference
from model.bench.workload import Decoding, Workload, pillow
from model.config import EngineConfig
from model.engine.engine import Engine
from model.request import Request

NOTES = """\
tokens/s: whole requests, all tokens / all seconds (tokenising, vision and prefill included); its "x" are the headline.
decode/s: tokens after each first one / seconds without vision and prefill.   accept: tokens per verify step.
x: median [min-max] of ratios within a repeat.   vision/...: shares of the time. same: requests with `off`'s tokens."""


def run(options: Options, command: str, decoding: Decoding = pillow) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object.

    decoding: how the files of --dataset and --image become media.
    """
    logging.disable_progress_bar()  # ours is enough
    if options.threads:
        torch.set_num_threads(options.threads)
    workload = Workload(options)
    config = options.config_of("off").resolved()
    machine = report.machine(config.device, config.dtype)
    arms = [_arm(name, options, config) for name in options.arms]
    if workload.is_own:
        engines = (arm.engine for arm in arms if isinstance(arm, EngineArm))
        workload.open(next(engines, None) or Engine(config), decoding)
    rows: list[dict[str, Any]] = []
    sampling = "greedy" if options.sampling == "greedy" else "seeded (temperature 1)"
    target = report.target_name(options.model)
    for task, batch, runs in _measure(options, workload, arms):
        rows += figures.rows(runs, task=task, target=target, sampling=sampling, batch=batch)
    result = {"machine": machine, "command": command, "rows": rows}
    report.show(result, f"{report.table(rows)}\n\n{NOTES}", options.output)
    return result


def _arm(name: str, options: Options, plain: EngineConfig) -> Arm:
    if name == "generate":
        return GenerateArm(Reference(plain.model, device=plain.device, dtype=plain.dtype))
    if name.startswith(REPLAY):
        without = EngineArm("off", Engine(plain))
        return ReplayArm(float(name.removeprefix(REPLAY)), without, Engine(plain, without.engine.target))
    return EngineArm(name, Engine(options.config_of(name)))


def _measure(
    options: Options, workload: Workload, arms: Sequence[Arm]
) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """Measure every task at every batch size; yields the runs of each arm, one per repeat."""
    total = len(workload.tasks) * len(options.batches) * (options.repeats + 1) * len(arms)
    with tqdm(total=total, unit="run", disable=None) as progress:
        for task in workload.tasks:
            requests = workload.requests(task, options.prompts)
            warm_up = workload.requests(task, max(options.batches), warm_up=True)
            for batch in options.batches:
                progress.set_description(f"{task}, {batch} at once")
                for arm in arms:
                    arm.run(warm_up[:batch])
                    progress.update()
                runs: dict[str, list[Run]] = {arm.name: [] for arm in arms}
                for repeat in range(options.repeats):
                    for arm in rotated(arms, repeat):
                        runs[arm.name].append(_rounds(arm, requests, batch))
                        progress.update()
                yield task, batch, runs


def _rounds(arm: Arm, requests: list[Request], batch: int) -> Run:
    """Answer every request once, `batch` at a time; the first ones fill up the last round, with other seeds."""
    count = -(-len(requests) // batch) * batch
    seed = requests[0].params.seed
    filled = [
        replace(request, request_id=str(i), params=replace(request.params, seed=seed + i))
        for i, request in enumerate(requests[i % len(requests)] for i in range(count))
    ]
    return combined([arm.run(filled[start : start + batch]) for start in range(0, count, batch)])
