"""Measures what a step takes on a GPU, and the least that it could take: `python -m model.bench.gpu`.

Needs a GPU with torch and transformers, and no checkpoint: a target and a draft are made with random weights (see
random_weights.py). First memory bandwidth and the rate of products are measured. Then, for every batch:

    pass 1, pass 16      the target over 1 and over 16 rows per sequence, its output head and the best tokens, in
                         device time; recorded as a graph or not, with our attention kernel or torch's
    floor                the time in which the memory can be read that pass 1 must read: weights, keys and values
    draft                one proposal and one observation of the draft
    step, spec. step     a whole step of the engine, without a draft and with one, by the clock on the wall
    idle                 the share of that in which the GPU has nothing to do: it waits for Python
    attention            one layer's attention over 1 and 16 rows, by our kernel and by torch, and its floor: layers
                         that see everything, or a window (see layers.py); give a long --context to tell them apart
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.graphs import Replays, recorder
from model.backends.kernels import choice
from model.bench import layers, report
from model.bench.floor import bytes_read, measure_limits, seconds
from model.bench.layers import without_kernel
from model.bench.options import numbers, run_program
from model.bench.random_weights import SIZES, TEMPLATE, make_draft, make_target
from model.config import DTYPES, EngineConfig
from model.drafters.flash.drafter import FlashDrafter
from model.engine.engine import Engine
from model.engine.round import TorchRound
from model.request import Message, Request, SamplingParams

NODES = 16  # rows of a verified tree, the root included
RATIOS = ("pass_over_floor", "step_over_floor", "rows_16_over_1", "idle_share")


# --- clocks


def wall(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call by the wall clock: the median, after a few to warm up."""
    times = []
    for turn in range(3 + repeats):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 3:
            times.append(time.perf_counter() - begun)
    return float(np.median(times))


def busy(function: Callable[[], object], device: torch.device, repeats: int) -> float | None:
    """Seconds of one call in which the GPU computes or copies, as its profiler counts them; None without one."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / repeats


# --- an engine at work


class Batch:
    """A number of sequences of one length, all of which decode."""

    def __init__(self, engine: Engine, number: int, *, context: int, max_tokens: int, speculation: bool) -> None:
        self.engine, self.number = engine, number
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        for index in range(number):
            text = chr(ord("a") + index % 26) * context
            engine.add(Request(f"{index}", (Message("user", (text,)),), params, speculation))
        while engine.scheduler.waiting or any(s.prefilling for s in engine.scheduler.running):
            engine.step()

    def end(self) -> None:
        for index in range(self.number):
            self.engine.abort(f"{index}")

    def rows(self, num: int) -> AttentionMetadata:
        """A chain of `num` rows after each sequence's tokens."""
        starts = np.array(self.engine.cache.lengths[: self.number], np.int32)
        parents = np.tile(np.arange(-1, num - 1, dtype=np.int32), (self.number, 1))
        counts = np.full(self.number, num, np.int32)
        return AttentionMetadata(self.engine.cache, 0, num, starts, counts, MaskKind.TREE, parents)

    def run(self, num: int) -> Callable[[], object]:
        """The target's pass over `num` rows of each, to the best token of every row."""
        tokens = np.full((self.number, num), 9, np.int64)

        @torch.inference_mode()
        def run() -> object:
            rows = self.rows(num)
            positions = (rows.starts[:, None] + np.arange(num, dtype=np.int32))[None]
            logits, _ = _round(self.engine).answers(tokens, positions, rows)
            return logits.argmax(-1)

        return run

    def draft(self) -> Callable[[], object] | None:
        drafter, target = self.engine.drafter, self.engine.target
        if not isinstance(drafter, FlashDrafter):
            return None
        assert isinstance(drafter, FlashDrafter)
        newest, budgets = np.full(self.number, 9, np.int64), np.full(self.number, NODES - 1, np.int64)
        width = target.hidden_size * len(target.aux_layers)
        aux_hidden_states = torch.zeros(self.number, NODES, width, dtype=target.dtype, device=target.device)

        @torch.inference_mode()
        def run() -> object:
            lengths = drafter.cache.lengths[:]
            trees = drafter.propose(newest, budgets)
            drafter.observe(trees, [[0, 1]] * self.number, aux_hidden_states)
            drafter.cache.lengths[:] = lengths  # the next call begins where this one did
            return trees

        return run


def _round(engine: Engine) -> TorchRound:
    """What computes the target's passes one by one, in torch or, on a CPU, in the native stack."""
    if isinstance(engine.round, TorchRound):
        return engine.round
    return TorchRound(engine.target, engine.cache, engine.counters, engine.load)


def passes(engine: Engine, batch: Batch, repeats: int) -> dict[str, float]:
    """Seconds of a pass over one row of each sequence and over NODES, for every way of computing it here."""
    device, ways = engine.target.device, dict[str, tuple[Replays | None, AbstractContextManager[object]]]()
    kernel = choice.tree_attention(engine.target.dtype, engine.target.head_dim, device) is not None
    ways["plain"] = (None, nullcontext())
    if kernel:
        ways["plain, torch attention"] = (None, without_kernel())
    now = _round(engine)
    if now.passes is not None:
        ways["graph"] = (now.passes, nullcontext())
        if kernel:
            fresh = Replays(now.run, engine.cache, recorder(device), max_rows=NODES)
            ways["graph, torch attention"] = (fresh, without_kernel())
    found, recorded = {}, now.passes
    for name, (replays, context) in ways.items():
        now.passes = replays
        with context:
            for num in (1, NODES):
                found[f"{name}, {num}"] = seconds(batch.run(num), device, repeats)
    now.passes = recorded
    return found


def measure(
    engine: Engine, number: int, *, context: int, repeats: int, bandwidth: float, weights: int
) -> dict[str, Any]:
    """One row of figures, in milliseconds."""
    device, room = engine.target.device, engine.max_model_len - context - TEMPLATE
    times: dict[str, float | None] = {}
    for name, speculation in (("step", False), ("speculating step", True)):
        batch = Batch(engine, number, context=context, max_tokens=room, speculation=speculation)
        if not speculation:
            ways = passes(engine, batch, repeats)
            least = (weights + bytes_read(engine.cache, engine.cache.lengths[:number])) / bandwidth
            drafting = batch.draft()
            times["draft"] = wall(drafting, device, repeats) if drafting else None
        times[name] = wall(engine.step, device, repeats)
        times[f"{name}, busy"] = busy(engine.step, device, repeats)
        batch.end()
    best = "graph" if _round(engine).passes is not None else "plain"
    step, working = times["step"], times["step, busy"]
    assert step is not None
    return {
        "batch": number,
        "context": context,
        "milliseconds": {name: round(1e3 * value, 4) for name, value in (*ways.items(), *times.items()) if value},
        "floor_milliseconds": round(1e3 * least, 4),
        "pass_over_floor": round(ways[f"{best}, 1"] / least, 3),
        "step_over_floor": round(step / least, 3),
        "rows_16_over_1": round(ways[f"{best}, {NODES}"] / ways[f"{best}, 1"], 3),
        "idle_share": None if working is None else round(max(0.0, 1.0 - working / step), 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A column for every batch."""
    columns = [("batch", "floor ms", *(f"{n} ms" for n in rows[0]["milliseconds"]), *RATIOS)]
    for row in rows:
        times = (f"{value:.3f}" for value in (row["floor_milliseconds"], *row["milliseconds"].values()))
        ratios = ("-" if row[name] is None else f"{row[name]:.2f}" for name in RATIOS)
        columns.append((str(row["batch"]), *times, *ratios))
    return report.aligned(list(zip(*columns, strict=True)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32), help="default: 1,8,32")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence (default: 1024)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    size, batches = SIZES[args.size], args.batches
    # A speculating step may emit all of a tree. A batch is stepped 3 + repeats times by one clock and repeats times by
    # another, and its first sequence decodes while the others' prompts are read.
    room = (3 + 2 * args.repeats + max(batches)) * NODES
    config = EngineConfig(
        model=args.size,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=max(batches),
        max_model_len=args.context + room + TEMPLATE,
        max_verify_tokens=NODES * max(batches),
        max_nodes=NODES - 1,
        graphs=True,
    ).resolved()
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    with torch.inference_mode():
        limits = measure_limits(device, dtype, bytes_moved=size.bytes_moved, matrix=size.matrix, repeats=args.repeats)
    target, pass_bytes = make_target(size, config)
    with tempfile.TemporaryDirectory() as folder:
        make_draft(target, Path(folder))
        engine = Engine(replace(config, draft=folder, drafter="flash"), target)
    sizes = {"context": args.context, "repeats": args.repeats, "bandwidth": limits.bandwidth, "weights": pass_bytes}
    rows = [measure(engine, number, **sizes) for number in batches]
    attention = layers.measure(max(batches), args.context, engine, limits.bandwidth, args.repeats)
    kernel = choice.tree_attention(dtype, target.head_dim, device) is not None
    result = json.dumps({
        "machine": report.machine(config.device, config.dtype),
        "command": shlex.join(["python", "-m", "model.bench.gpu", *argv]),
        "limits": limits.rounded(),
        "bytes_read_per_pass": pass_bytes,
        "attention_kernel": kernel,
        "attention": attention,
        "rows": rows,
    })  # fmt: skip
    print(f"\n{table(rows)}\n\n{layers.table(attention)}\n\n{result}")
    if args.output:
        args.output.write_text(result + "\n")


if __name__ == "__main__":
    run_program(main)
