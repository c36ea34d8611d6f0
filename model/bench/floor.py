"""What a machine can do at best, measured, and the least time in which a pass of the target can be computed there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from model.backends.kv_cache import KVCache


@dataclass(frozen=True)
class Limits:
    """Bytes a second that are read, and that are read and written by a copy; operations a second of square matrices, a
    multiplication and an addition being two."""

    read_bytes_per_second: float
    copy_bytes_per_second: float
    operations_per_second: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the better of reading and copying."""
        return max(self.read_bytes_per_second, self.copy_bytes_per_second)

    def rounded(self) -> dict[str, int]:
        return {name: round(value) for name, value in asdict(self).items()}


def measure_limits(
    device: torch.device, dtype: torch.dtype, *, bytes_moved: int, matrix: int, repeats: int = 5
) -> Limits:
    """Measure them with so many bytes, which must not fit into a cache, and with matrices of so many rows."""
    source = torch.ones(bytes_moved // 4, device=device)
    left, right = source.chunk(2)
    copy = torch.empty_like(source)
    square = torch.randn(matrix, matrix, device=device)
    # Weights of 16 bits can be widened to float32, which is faster where the processor multiplies nothing narrower.
    kinds = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
    products = [partial(torch.matmul, square.to(kind), square.to(kind)) for kind in kinds]
    return Limits(
        read_bytes_per_second=bytes_moved / seconds(lambda: torch.dot(left, right), device, repeats),
        copy_bytes_per_second=2 * bytes_moved / seconds(lambda: copy.copy_(source), device, repeats),
        operations_per_second=2 * matrix**3 / min(seconds(product, device, repeats) for product in products),
    )


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call, after a few that do not count: on a processor, which others use too, the shortest of several; on a
    GPU the mean of several that follow one another without a wait, in device time."""
    for _ in range(3):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return min(times)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def count_weights(model: str) -> int:
    """Count the weights of a checkpoint that every pass reads: decoder layers, last norm and lm_head. Of the embedding
    table a pass reads a few rows."""
    with torch.device("meta"):
        target = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model))
    decoder = target.get_decoder()
    parts = (decoder.layers, decoder.norm, target.get_output_embeddings())
    return sum(weight.numel() for part in parts for weight in part.parameters())


def bytes_read(cache: KVCache, lengths: Iterable[int]) -> int:
    """Count the bytes of keys and values that attention must read of sequences of these lengths, in all layers."""
    shapes = [shape for shape in cache.layers if shape is not None]
    read = sum(
        shape.heads * shape.width * (length if shape.window is None else min(length, shape.window))
        for length in lengths
        for shape in shapes
    )
    return 2 * read * cache.dtype.itemsize
