"""Where a step's time goes, against the least it could take: `flashserve bench --profile`.

Time is taken around the calls into the native library and around the engine's own parts, each without what it calls
(so that all parts add up to the whole). A forward's floor is the larger of its bytes (weights once, keys and values of
every row's context) over the memory bandwidth and its multiplications over the matrix rate, both measured here first.
Weights that fit into the processor's caches may beat the floor of the memory.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch

from model.backends.attention import Rows, Sight
from model.backends.native.library import Matrix
from model.backends.native.stack import Stack
from model.backends.native.step import DraftStep
from model.bench import report, workload
from model.bench.arms import EngineArm
from model.bench.options import Options
from model.decoding import sampling
from model.decoding.tree import Trees
from model.engine.engine import Engine
from model.engine.native_round import NativeRound
from model.engine.scheduler import Chunk, Decoding
from model.errors import ConfigError

READ_BYTES = 1 << 30  # far beyond any cache
SQUARE = 2048  # side of the matrices that the rate is measured with
ATTEMPTS = 5
TASK = "image caption"
ROUNDS = 4  # requests at least for each one at once
AROUND = ("schedule", "tree", "sampling", "acceptance", "kv moves", "text", "between")
ROUND_PARTS = {
    "propose": "draft forward",
    "grow": "tree",
    "verify": "target forward",
    "accept": "acceptance",
    "observe": "draft forward",
}
NOTES = """\
ms: per step (decode: one pass of target and draft over all sequences; prompt: one request). floor: the least that its
bytes and multiplications take here. around: all that is not a forward, share of the step. The draft's sequential head,
a layer that runs while the tree grows, is part of its forward (but not of its floor)."""


@dataclass(frozen=True)
class Rates:
    bytes_per_second: float
    flops_per_second: float

    def floor(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


@dataclass(frozen=True)
class Cost:
    """What a forward cannot do without."""

    num_bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)


def rates(dtype: torch.dtype) -> Rates:
    """The best of several attempts each: reading memory, and multiplying square matrices."""
    left, right = torch.ones(2, READ_BYTES // 8)
    square = torch.rand(SQUARE, SQUARE).to(dtype)
    reading = min(_seconds(lambda: torch.dot(left, right)) for _ in range(ATTEMPTS))
    multiplying = min(_seconds(lambda: square @ square) for _ in range(ATTEMPTS))
    return Rates(READ_BYTES / reading, 2.0 * SQUARE**3 / multiplying)


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# -- what a call costs at least


def _stack_cost(stack: Stack, rows: Rows, *, only_held: bool = False) -> Cost:
    shape, size = stack.shape, stack.dtype.itemsize
    counts = rows.counts.astype(float)
    kept = 2 * shape.kv_heads * shape.head_dim  # numbers of a position's keys and values
    weights = kept * shape.hidden if only_held else shape.weights
    flops, num_bytes = 2.0 * weights * counts.sum(), float(weights * size)
    if not only_held:
        keys = (rows.starts + counts) * (counts > 0)
        flops += 4.0 * shape.heads * shape.head_dim * float((keys * counts).sum())
        num_bytes += kept * size * float(keys.sum())
    return Cost(stack.num_layers * num_bytes, stack.num_layers * flops)


def _matrix_cost(matrix: Matrix, rows: float) -> Cost:
    weights = matrix.inputs * matrix.outputs
    return Cost(float(weights * matrix.dtype.itemsize), 2.0 * weights * rows)


def _fused_cost(step: DraftStep, taps: torch.Tensor) -> Cost:
    return _matrix_cost(step.fuse, float(len(taps)))


def _round_costs(now: NativeRound, trees: Trees, starts: np.ndarray, drafted: np.ndarray) -> dict[str, Cost]:
    """Of a round that is just over, by its parts. starts, drafted: (slots,) int32, what both caches held before it."""
    batch, verifier, flash = len(trees.sizes), now.verifier, now.flash
    rows = Rows(now.cache, 0, trees.rows, starts[:batch], now.counts[:batch], Sight.TREE, trees.parents)
    costs = {"verify": _stack_cost(verifier.stack, rows) + _matrix_cost(verifier.head, float(rows.counts.sum()))}
    if flash is not None and flash.step is not None:
        step, kept = flash.step, now.accepted[:batch]
        drafting = (now.budgets[:batch] > 0).astype(np.int32) * np.int32(step.block)
        if each := float(drafting.sum()):
            block = Rows(flash.cache, 0, step.block, drafted[:batch], drafting, Sight.WHOLE)
            costs["propose"] = _stack_cost(step.stack, block) + _matrix_cost(step.out, each)
            costs["propose"] += _matrix_cost(step.head, each)
        told = Rows(flash.cache, 0, trees.rows, drafted[:batch], kept, Sight.CAUSAL)
        costs["observe"] = _stack_cost(step.stack, told, only_held=True) + _matrix_cost(step.fuse, float(kept.sum()))
    return costs


# -- the stopwatch


class Stopwatch:
    """Seconds of every part, of calls within calls only once, and the floor of what was computed in it."""

    def __init__(self, rates: Rates) -> None:
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)  # (decode | prompt, part)
        self.floors: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.steps: Counter[str] = Counter()
        self._rates = rates
        self._within: list[float] = []  # of each call under way: what calls inside it took
        self._kind = "prompt"  # of the step under way
        self._owner = "target"  # of forwards

    def timed(self, part: str, function: Callable[..., Any], cost: Callable[..., Cost] | None = None) -> Any:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            self._within.append(0.0)
            try:
                return function(*given, **named)
            finally:
                spent = time.perf_counter() - begun
                key = (self._kind, f"{self._owner} {part}" if cost else part)
                self.seconds[key] += spent - self._within.pop()
                if cost is not None:
                    least = cost(*given, **named)
                    self.floors[key] += self._rates.floor(least.num_bytes, least.flops)
                if self._within:  # what the stopwatch itself took is no part of anything
                    self._within[-1] += time.perf_counter() - begun

        return call

    def owned(self, owner: str, function: Callable[..., Any]) -> Any:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            before, self._owner = self._owner, owner
            try:
                return function(*given, **named)
            finally:
                self._owner = before

        return call

    def round(self, now: NativeRound) -> list[tuple[Any, str, Any]]:
        """What is to be put in place of the two halves of a round; each tells itself what its parts took."""

        held: dict[str, Any] = {}

        def taken(half: Callable[..., Any], given: tuple[Any, ...], parts: tuple[str, ...]) -> Any:
            begun = time.perf_counter()
            result = half(*given)
            spent, seconds = time.perf_counter() - begun, now.seconds
            for part in parts:
                self.seconds["decode", ROUND_PARTS[part]] += seconds[part]
                spent -= seconds[part]
            self.seconds["decode", "between"] += spent
            return result

        def look(*given: Any, plain: Any = now.look) -> Any:
            begun = time.perf_counter()
            held["starts"] = np.array(now.cache.lengths, np.int32)
            held["drafted"] = held["starts"] if now.flash is None else np.array(now.flash.cache.lengths, np.int32)
            result = taken(plain, given, ("propose", "grow", "verify"))
            held["trees"] = result[0]
            self._within[-1] += time.perf_counter() - begun
            return result

        def accept(*given: Any, plain: Any = now.accept) -> Any:
            begun = time.perf_counter()
            result = taken(plain, given, ("accept", "observe"))
            for part, least in _round_costs(now, **held).items():
                self.floors["decode", ROUND_PARTS[part]] += self._rates.floor(least.num_bytes, least.flops)
            self._within[-1] += time.perf_counter() - begun
            return result

        return [(now, "look", look), (now, "accept", accept)]

    def deciding(self, schedule: Callable[..., Chunk | Decoding | None]) -> Any:
        @wraps(schedule)
        def call(*given: Any) -> Chunk | Decoding | None:
            work = schedule(*given)
            self._kind = "decode" if isinstance(work, Decoding) else "prompt"
            self.steps[self._kind] += not isinstance(work, Chunk) or work.start == 0  # a prompt is one, however cut
            return work

        return call


@contextmanager
def watched(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """As long as this lasts, every part of the engine's steps is timed."""
    target, drafter, now = engine.target, engine.drafter, engine.round
    assert isinstance(now, NativeRound)

    def forward(owner: Any, name: str, cost: Callable[..., Cost]) -> tuple[Any, str, Any]:
        return owner, name, watch.timed("forward", getattr(owner, name), cost)

    places: list[tuple[Any, str, Any]] = [
        forward(Stack, "forward", lambda stack, _embeds, _positions, rows: _stack_cost(stack, rows)),
        forward(Stack, "hold", lambda stack, _context, _positions, rows: _stack_cost(stack, rows, only_held=True)),
        forward(Matrix, "__call__", lambda matrix, x: _matrix_cost(matrix, x.numel() / matrix.inputs)),
        forward(DraftStep, "fused", _fused_cost),
        *watch.round(now),
        (target, "encode", watch.owned("vision", target.encode)),
        (sampling, "choose", watch.timed("sampling", sampling.choose)),
        (engine.scheduler, "schedule", watch.timed("schedule", watch.deciding(engine.scheduler.schedule))),
        (engine.cache, "keep", watch.timed("kv moves", engine.cache.keep)),
        (engine, "_compact", watch.timed("kv moves", engine._compact)),
        (engine, "_emit", watch.timed("text", engine._emit)),
        (engine, "step", watch.timed("between", engine.step)),
    ]
    if drafter is not None:
        places.append((drafter, "prefill", watch.owned("draft", drafter.prefill)))
    patches = [patch.object(owner, name, replacement) for owner, name, replacement in places]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()


# -- the table


def profile(options: Options, command: str) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object. Returns that object."""
    if options.threads:
        torch.set_num_threads(options.threads)
    config = options.engine_config.resolved()
    machine = report.machine(config.device, config.dtype)
    measured = rates(getattr(torch, config.dtype))
    rows: list[dict[str, Any]] = []
    for drafter in ("off", "flash"):
        if drafter in options.arms and (drafter == "off" or config.draft is not None):
            engine = Engine(replace(config, drafter=cast("Any", drafter)))
            if not engine.target.native:
                raise ConfigError("--profile looks into the native library, which does not run this model here")
            gc.collect()
            gc.freeze()  # as the worker does: walking through model and libraries takes as long as many steps
            for batch in options.batches:
                rows += _rows(engine, drafter, batch, options, measured)
            del engine
            gc.unfreeze()
            gc.collect()
    result = {
        "machine": machine,
        "command": command,
        "memory_gb_per_second": round(measured.bytes_per_second / 1e9, 1),
        "matmul_tflops": round(measured.flops_per_second / 1e12, 3),
        "rows": rows,
    }
    rate = f"memory {result['memory_gb_per_second']} GB/s, matrices {result['matmul_tflops']} TFLOP/s"
    report.show(result, f"{_table(rows)}\n\n{NOTES}\n{rate}", options.output)
    return result


def _rows(engine: Engine, drafter: str, batch: int, options: Options, measured: Rates) -> Iterator[dict[str, Any]]:
    params = options.sampling_params
    arm, watch = EngineArm(drafter, engine), Stopwatch(measured)
    count = max(options.prompts, ROUNDS * batch)
    arm.run(workload.conversations(options, TASK, first=workload.WARM_UP, count=batch), params, in_flight=batch)
    with watched(engine, watch):
        arm.run(workload.conversations(options, TASK, count=count), params, in_flight=batch)
    for kind in ("prompt", "decode"):
        steps = watch.steps[kind]
        parts = {part: seconds for (of, part), seconds in watch.seconds.items() if of == kind}
        whole = sum(parts.values())
        around = sum(parts.get(part, 0.0) for part in AROUND)
        for part in (*sorted(parts.keys() - set(AROUND)), *(part for part in AROUND if part in parts)):
            floor = watch.floors.get((kind, part))
            yield {
                "drafter": drafter,
                "batch": batch,
                "step": kind,
                "part": part,
                "ms": round(1e3 * parts[part] / steps, 4),
                "share": round(parts[part] / whole, 4),
                "floor_ms": None if floor is None else round(1e3 * floor / steps, 4),
            }
        floor = sum(least for (of, _), least in watch.floors.items() if of == kind)
        yield {
            "drafter": drafter,
            "batch": batch,
            "step": kind,
            "part": "all",
            "ms": round(1e3 * whole / steps, 4),
            "share": 1.0,
            "floor_ms": round(1e3 * floor / steps, 4),
            "around": round(around / whole, 4),
        }


def _table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [
        ("drafter", "batch", "step", "part", "ms", "share", "floor ms", "x floor", "around")
    ]
    for row in rows:
        floor = row["floor_ms"]
        lines.append((
            row["drafter"],
            str(row["batch"]),
            row["step"],
            row["part"],
            f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
            "" if floor is None else f"{floor:.3f}",
            "" if not floor else f"{row['ms'] / floor:.2f}",
            f"{row['around']:.1%}" if "around" in row else "",
        ))  # fmt: skip
    return report.aligned(lines)
