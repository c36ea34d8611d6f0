"""Shows where the time of a step goes, against the least that it could take: `flashserve bench --profile`.

The engine times its own phases (vision, prefill, draft, verify); the rest of a step is what is around them: scheduling,
sampling, text. The floor of a step is the least time of the target's pass alone: the larger of its bytes (weights once,
keys and values of every sequence) over the memory bandwidth and its operations over the matrix rate, both measured
first on the same machine. Weights that fit into the processor's caches may beat it.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from model.bench import floor, report
from model.bench.floor import Limits
from model.bench.options import Options
from model.bench.workload import Decoding, Workload, pillow
from model.engine.engine import Engine
from model.errors import ConfigError
from model.request import Request

BYTES_MOVED = 1 << 30  # far beyond any cache
MATRIX = 1024
ROUNDS = 4  # requests at least for each one at once
HEADINGS = ("drafter", "batch", "step", "part", "ms", "share", "floor ms", "x floor")
NOTES = """\
ms: per step (decode: one round of draft and verify over all sequences; prompt: one request). other: what is neither of
the phases: scheduling, sampling, text. floor: the least that the target's pass takes here."""


@dataclass
class Phases:
    """Seconds of every phase of one kind of step, and of the target's floor."""

    steps: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    floor: float = 0.0

    def add(self, phases: Iterable[tuple[str, float]], whole: float, floor: float) -> None:
        """Add the seconds that a step spent in each phase, and the rest of its `whole` seconds as "other".

        floor: the least seconds that memory and multiplication allow for the target's pass.
        """
        self.floor += floor
        self.seconds["other"] += whole
        for phase, seconds in phases:
            self.seconds[phase] += seconds
            self.seconds["other"] -= seconds


def profile(options: Options, command: str, decoding: Decoding = pillow) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object."""
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = options.engine_config.resolved()
    if config.device != "cpu":
        raise ConfigError("--profile measures processors; for a GPU there is `python -m model.bench.gpu`")
    workload = Workload(options)
    machine = report.machine(config.device, config.dtype)
    dtype = getattr(torch, config.dtype)
    limits = floor.measure_limits(torch.device("cpu"), dtype, bytes_moved=BYTES_MOVED, matrix=MATRIX)
    weights = floor.count_weights(config.model)
    rows: list[dict[str, Any]] = []
    for drafter in ("off", "flash"):
        if drafter in options.arms and (drafter == "off" or config.draft is not None):
            engine = Engine(options.config_of(drafter))
            workload.open(engine, decoding)
            gc.collect()
            gc.freeze()  # as the worker does: walking through model and libraries takes as long as many steps
            for batch in options.batches:
                count = max(options.prompts, ROUNDS * batch)
                run(engine, workload.requests(workload.tasks[0], batch, warm_up=True), batch)
                steps = run(engine, workload.requests(workload.tasks[0], count), batch, weights, limits)
                for kind, phases in steps.items():
                    rows += _rows({"drafter": drafter, "batch": batch, "step": kind}, phases)
            del engine
            gc.unfreeze()
            gc.collect()
    result = {
        "machine": machine,
        "command": command,
        "task": workload.tasks[0],
        "memory_gb_per_second": round(limits.bandwidth / 1e9, 1),
        "matmul_tflops": round(limits.operations_per_second / 1e12, 3),
        "rows": rows,
    }
    rate = f"memory {result['memory_gb_per_second']} GB/s, matrices {result['matmul_tflops']} TFLOP/s"
    report.show(result, f"{workload.tasks[0]}\n\n{_table(rows)}\n\n{NOTES}\n{rate}", options.output)
    return result


def run(
    engine: Engine, requests: list[Request], in_flight: int, weights: int = 0, limits: Limits | None = None
) -> dict[str, Phases]:
    """Answer all requests, so many at once, and time every step."""
    scheduler, size = engine.scheduler, engine.target.dtype.itemsize
    steps = {"prompt": Phases(steps=len(requests)), "decode": Phases()}
    pending = deque(requests)
    engine.pop_stats()
    while pending or engine.has_work:
        while pending and len(scheduler.waiting) + len(scheduler.running) < in_flight:
            engine.add(pending.popleft())
        context = [sequence.computed for sequence in scheduler.running]
        begun = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - begun
        stats = engine.pop_stats()
        decoding = sum(stats.batch_sizes)
        rows = decoding + stats.draft_tokens if decoding else stats.prompt_tokens
        least = 0.0
        if limits is not None:
            read = weights * size + floor.bytes_read(engine.cache, [rows, *(context if decoding else ())])
            least = max(read / limits.bandwidth, 2 * weights * rows / limits.operations_per_second)
        steps["decode" if decoding else "prompt"].add(stats.step_seconds, whole, least)
        steps["decode"].steps += bool(decoding)
    return steps


def _rows(key: dict[str, Any], phases: Phases) -> Iterator[dict[str, Any]]:
    whole = sum(phases.seconds.values())
    other = phases.seconds.pop("other")
    for part, seconds in (*phases.seconds.items(), ("other", other), ("all", whole)):
        least = phases.floor if part in ("verify", "prefill", "all") else None
        yield {
            **key,
            "part": part,
            "ms": round(1e3 * seconds / phases.steps, 4),
            "share": round(seconds / whole, 4),
            "floor_ms": None if least is None else round(1e3 * least / phases.steps, 4),
        }


def _table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        least = row["floor_ms"]
        lines.append((
            row["drafter"],
            str(row["batch"]),
            row["step"],
            row["part"],
            f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
            "" if least is None else f"{least:.3f}",
            "" if not least else f"{row['ms'] / least:.2f}",
        ))  # fmt: skip
    return report.aligned(lines)
