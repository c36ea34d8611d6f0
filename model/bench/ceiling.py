"""What a draft of a given accuracy gains on a target of real size, beside what memory bandwidth allows.

    python -m model.bench.ceiling [--size 7b] [--accuracies 0.6,0.7,0.8,0.9] [--batches 1,8,32] [--nodes 4,8,15]

Needs no checkpoint: target and draft are made with random weights (untrained.py), prompts are text. A *simulation*:
`replay:A` proposes the target's known answer as a chain, each token right with probability A, at no cost; `+ flash`
pays for every pass of a FLASH draft besides. For each accuracy that length of chain is shown that was the fastest.

    of ideal     decoding speed over plain decoding, over the tokens that a verify step emitted: 1 where drafting and
                 the wider verification cost nothing
    of bound     decoding speed over what reading the target once a verify step would give (weights, keys and values)
    same         answers with the tokens of plain decoding
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from model.bench import figures, report, untrained
from model.bench.arms import Arm, EngineArm, ReplayArm, Run, in_turn
from model.bench.options import numbers, program
from model.bench.untrained import SIZES, TEMPLATE
from model.config import DTYPES, EngineConfig
from model.draft.presets import Sizes
from model.engine import Engine
from model.request import Message, SamplingParams

HEADINGS = (
    "batch", "draft", "nodes", "accept", "decode/s", "x plain", "of ideal", "of bound", "same",
)  # fmt: skip


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(argv: list[str]) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object."""
    made = argparse.ArgumentParser(
        prog="python -m model.bench.ceiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--size", choices=SIZES, default="7b")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto", choices=DTYPES)
    made.add_argument("--accuracies", type=_shares, default=(0.6, 0.7, 0.8, 0.9))
    made.add_argument("--batches", type=numbers, default=(1, 8, 32))
    made.add_argument("--nodes", type=numbers, default=(4, 8, 15), help="lengths of chains to try (default: 4,8,15)")
    made.add_argument("--vocabulary", type=int, help="tokens that the draft may propose, 0: all (default: as trained)")
    made.add_argument("--context", type=int, default=512, help="prompt tokens of each request (default: 512)")
    made.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--output", type=Path, help="file for the JSON object")
    asked = made.parse_args(argv)
    logging.disable_progress_bar()
    size, most = SIZES[asked.size], max(asked.batches)
    plain = EngineConfig(
        model=asked.size,
        device=asked.device,
        dtype=asked.dtype,
        drafter="off",
        max_num_seqs=most,
        max_model_len=asked.context + asked.tokens + TEMPLATE,
        load_aware=False,
        max_nodes=0,
    ).resolved()
    device, dtype = torch.device(plain.device), getattr(torch, plain.dtype)
    with torch.inference_mode():
        possible = untrained.limits(size, device, dtype, 10)
    target, read = untrained.make_target(size, plain)
    without = EngineArm("off", Engine(plain, target))
    arms: dict[tuple[str, int], Arm] = {("off", 0): without}
    with tempfile.TemporaryDirectory() as folder:
        untrained.make_draft(target, Path(folder), Sizes(vocabulary=asked.vocabulary))
        for nodes in asked.nodes:
            drafting = replace(plain, drafter="auto", draft=folder, max_nodes=nodes, max_rows=most * (1 + nodes))
            engine = Engine(drafting, target)
            for accuracy in asked.accuracies:
                for beside in (None, engine.drafter):
                    arm = ReplayArm(accuracy, without, engine, beside)
                    arms[arm.name, nodes] = arm
    params = SamplingParams(max_tokens=asked.tokens, ignore_eos=True)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(asked.batches) * (asked.repeats + 1) * len(arms), unit="run", disable=None) as progress:
        for batch in asked.batches:
            progress.set_description(f"{batch} at once")
            runs = _turns(arms, _prompts(batch, asked.context), params, asked.repeats, progress)
            positions = batch * (asked.context + asked.tokens // 2)
            least = untrained.floor(without.engine.cache, positions, read, untrained.bandwidth(possible))
            rows += _rows(runs, batch, least)
    result = {
        "machine": report.machine(plain.device, plain.dtype),
        "command": shlex.join(["python", "-m", "model.bench.ceiling", *argv]),
        "limits": {name: round(value) for name, value in possible.items()},
        "bytes_read_per_pass": read,
        "rows": rows,
    }
    report.show(result, _table(rows), asked.output)
    return result


def _prompts(batch: int, context: int) -> list[tuple[Message, ...]]:
    """No two alike, and each answered with other tokens."""
    return [(Message("user", (chr(ord("a") + i % 26) * (context - i // 26),)),) for i in range(batch)]


def _turns(
    arms: dict[tuple[str, int], Arm],
    prompts: list[tuple[Message, ...]],
    params: SamplingParams,
    repeats: int,
    progress: tqdm[Any],
) -> dict[tuple[str, int], list[Run]]:
    """Of every arm a run per repeat, after one that does not count."""
    runs: dict[tuple[str, int], list[Run]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name in in_turn(tuple(arms), repeat):
            done = arms[name].run(prompts, params)
            if repeat:
                runs[name].append(done)
            progress.update()
    return runs


def _rows(runs: dict[tuple[str, int], list[Run]], batch: int, least: float) -> list[dict[str, Any]]:
    """One for every arm; least: seconds in which a pass can be read."""
    plain = runs["off", 0]
    rows = []
    for (name, nodes), own in runs.items():
        row = figures.rows({"off": plain, name: own}, task="text", target="", sampling="greedy", batch=batch)[-1]
        length, speed = row["acceptance_length"], row["decode_tokens_per_second"]
        gain = row["decode_speedup_over_plain"]
        rows.append({
            "batch": batch,
            "drafter": name,
            "nodes": nodes,
            "acceptance_length": length,
            "decode_tokens_per_second": speed,
            "decode_speedup_over_plain": gain,
            "decode_speedup_over_plain_range": row["decode_speedup_over_plain_range"],
            "of_ideal": round(gain / length, 3),
            "of_bound": round(speed * least / (length * batch), 3),
            "same_tokens_as_plain": row["same_tokens_as_plain"],
        })  # fmt: skip
    return rows


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in nodes alone."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        held = found.setdefault((row["batch"], row["drafter"]), row)
        if row["decode_speedup_over_plain"] > held["decode_speedup_over_plain"]:
            found[row["batch"], row["drafter"]] = row
    return list(found.values())


def _table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in fastest(rows):
        low, high = row["decode_speedup_over_plain_range"]
        lines.append((
            str(row["batch"]),
            row["drafter"],
            str(row["nodes"]),
            f"{row['acceptance_length']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_speedup_over_plain']:.2f} [{low:.2f}-{high:.2f}]",
            f"{row['of_ideal']:.2f}",
            f"{row['of_bound']:.2f}",
            f"{row['same_tokens_as_plain']:.0%}",
        ))  # fmt: skip
    return report.aligned(lines)


if __name__ == "__main__":
    program(main)
