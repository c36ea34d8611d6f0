"""Measures the attention of one decoder layer, by our kernel and by torch, for layers of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from model.backends.attention import AttentionMetadata, MaskKind, attend
from model.backends.graphs import Outputs, recorder
from model.backends.kernels import choice
from model.backends.kernels.choice import Options
from model.backends.kv_cache import KVCache, LayerShape
from model.bench import report
from model.bench.floor import bytes_read, seconds
from model.engine.engine import Engine

ROWS = 16  # of a verified tree, the root included
# Query heads, what is stored, and whether there are sinks: of Gemma 3 4B, gpt-oss and Qwen2.5 7B.
LAYERS = {
    "gemma 3, window": (8, LayerShape(4, 256, 1024), False),
    "gemma 3, all": (8, LayerShape(4, 256), False),
    "gpt-oss, window": (64, LayerShape(8, 64, 128), True),
    "qwen 2.5": (28, LayerShape(4, 128), False),
}
Times = dict[str, dict[str, float]]  # milliseconds by layer and way


@contextmanager
def without_kernel() -> Iterator[None]:
    """Compute attention in torch as long as this lasts."""
    kernel = choice.tree_attention
    choice.tree_attention = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        choice.tree_attention = kernel


@torch.inference_mode()
def measure(batch: int, context: int, engine: Engine, bandwidth: float, repeats: int) -> Times:
    """Time one and ROWS rows of each sequence against `context` positions, recorded as a graph where possible."""
    device, dtype, found = engine.target.device, engine.target.dtype, Times()
    for name, (heads, shape, with_sinks) in LAYERS.items():
        cache = KVCache(
            layers=[shape], num_slots=batch, capacity=context + ROWS, margin=ROWS,
            rows=engine.config.prefill_chunk, dtype=dtype, device=device,
        )  # fmt: skip
        options = Options(
            window=cache.window(shape.window) is not None, ring=cache.storage(0)[0].wraps, sinks=with_sinks
        )
        ways: dict[str, AbstractContextManager[None]] = {"torch": without_kernel()}
        if choice.tree_attention(dtype, shape.width, device, options) is not None:
            ways["kernel"] = nullcontext()
        sinks = torch.zeros(heads, dtype=dtype, device=device) if with_sinks else None
        times = {"floor": 1e3 * bytes_read(cache, [context] * batch) / bandwidth}
        for way, context_manager in ways.items():
            with context_manager:
                for num in (1, ROWS):
                    times[f"{way}, {num}"] = 1e3 * seconds(_pass(cache, context, num, heads, sinks), device, repeats)
        found[name] = {way: round(value, 4) for way, value in times.items()}
    return found


def _pass(cache: KVCache, context: int, num: int, heads: int, sinks: torch.Tensor | None) -> Callable[[], Outputs]:
    """Return a function that attends with `num` rows of every slot, chains behind `context` positions."""
    batch, (shape,) = cache.num_slots, cache.layers
    assert shape is not None
    starts, counts = np.full(batch, context, np.int32), np.full(batch, num, np.int32)
    parents = np.tile(np.arange(-1, num - 1, dtype=np.int32), (batch, 1))
    plan = AttentionMetadata(cache, 0, num, starts, counts, MaskKind.TREE, parents).plan
    queries, keys, values = (
        torch.randn(batch, number, num, shape.width, dtype=cache.dtype, device=cache.device)
        for number in (heads, shape.heads, shape.heads)
    )

    def run() -> Outputs:
        """Attend once."""
        return (attend(plan, 0, queries, keys, values, window=shape.window, sinks=sinks),)

    return recorder(cache.device).record(run)


def table(times: Times) -> str:
    """Format the times: a row for every way, a column for every layer."""
    ways = dict.fromkeys(way for by_way in times.values() for way in by_way)
    rows = [
        (f"{way} ms", *(f"{by_way[way]:.3f}" if way in by_way else "-" for by_way in times.values())) for way in ways
    ]
    return report.aligned([("attention", *times), *rows])
