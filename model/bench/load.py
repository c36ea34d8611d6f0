"""Load-aware drafting against every fixed way, at few and at many requests at once.

python -m model.bench.load [--task "image caption"] [--batches 1,2,4,8,16,32,64] [--nodes 2,4,7,11,15]

In one run, taking turns: no drafting, a fixed number of draft nodes per sequence and step, and as many as pay. That
many requests are kept going until none is left; tokens/s are of whole requests. Ratios are medians over repeats of what
was taken within one. It should nowhere be below 0.98 of no drafting, nor more than 5 % behind the best fixed number.
"""

from __future__ import annotations

import argparse
import gc
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from model.bench import report
from model.bench.arms import EngineArm, in_turn
from model.bench.options import numbers, program
from model.config import EngineConfig
from model.demo import prompts
from model.engine import Engine
from model.request import SamplingParams

ROUNDS = 3  # requests for each one at once, at least
FEWEST = 12
LONGEST = 1280  # positions that hold any of these prompts and its answer: seven engines keep room for so many at once
PLAIN, AWARE = "off", "load-aware"


def _configs(plain: EngineConfig, nodes: tuple[int, ...]) -> dict[str, EngineConfig]:
    fixed = {
        f"{number} nodes": replace(
            plain, load_aware=False, max_nodes=number, max_rows=plain.max_num_seqs * (1 + number)
        )
        for number in nodes
    }
    return {PLAIN: replace(plain, drafter="off"), **fixed, AWARE: plain}


def main(argv: list[str]) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object."""
    made = argparse.ArgumentParser(
        prog="python -m model.bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="demo")
    made.add_argument("--draft", help="folder of its draft (default: the bundled one)")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--task", choices=prompts.TASKS, default="image caption")
    made.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    made.add_argument("--nodes", type=numbers, default=(2, 4, 7, 11, 15))
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--max-tokens", type=int, default=160)
    made.add_argument("--output", type=Path, help="file for the JSON object")
    asked = made.parse_args(argv)
    logging.disable_progress_bar()
    params = SamplingParams(max_tokens=asked.max_tokens)
    plain = EngineConfig(
        model=asked.model,
        draft=asked.draft,
        device=asked.device,
        dtype=asked.dtype,
        max_num_seqs=max(asked.batches),
        max_model_len=LONGEST,
        encoder_cache_bytes=0,
        prefix_cache=False,
    )
    arms = [EngineArm(name, Engine(config)) for name, config in _configs(plain, asked.nodes).items()]
    gc.collect()
    gc.freeze()  # as the worker does
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(asked.batches) * (asked.repeats + 1) * len(arms), unit="run", disable=None) as progress:
        for batch in asked.batches:
            progress.set_description(f"{batch} at once")
            count = max(FEWEST, ROUNDS * batch)
            told = [prompts.messages(number, split="heldout", task=asked.task) for number in range(count)]
            speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
            for repeat in range(asked.repeats + 1):  # the first is a warm-up
                for arm in in_turn(arms, repeat):
                    done = arm.run(told, params, in_flight=batch)
                    if repeat:
                        speeds[arm.name].append(done.tokens_per_second)
                    progress.update()
            rows += _rows(batch, speeds)
    config = arms[0].engine.config
    result = {
        "machine": report.machine(config.device, config.dtype),
        "command": shlex.join(["python", "-m", "model.bench.load", *argv]),
        "task": asked.task,
        "rows": rows,
    }
    report.show(result, _table(rows), asked.output)
    return result


def _rows(batch: int, speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    best = max((name for name in speeds if name != AWARE), key=lambda name: median(speeds[name]))

    def over(name: str, other: str) -> float:
        return round(median(one / two for one, two in zip(speeds[name], speeds[other], strict=True)), 3)

    return [
        {
            "batch": batch,
            "drafting": name,
            "tokens_per_second": round(median(each), 1),
            "over_plain": over(name, PLAIN),
            "over_best_fixed": over(name, best),
        }
        for name, each in speeds.items()
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    batches = sorted({row["batch"] for row in rows})
    found = {(row["drafting"], row["batch"]): row for row in rows}
    names = list(dict.fromkeys(row["drafting"] for row in rows))
    lines = [("x plain, at once:", *map(str, batches))]
    lines += [(name, *(f"{found[name, batch]['over_plain']:.2f}" for batch in batches)) for name in names]
    lines.append(("load-aware x best fixed", *(f"{found[AWARE, batch]['over_best_fixed']:.2f}" for batch in batches)))
    return report.aligned(lines)


if __name__ == "__main__":
    program(main)
