"""Passes recorded once for every shape and replayed: a GPU then waits for no Python between two kernels.

A recording always reads the same memory and always has the same shape. So what differs from pass to pass is written
into static buffers first, and passes are rounded up to few shapes:

    slots   0 ......... real batch) ..... a power of two, or all slots
    rows    0 ......... real rows) ...... 1, or a multiple of eight, or as many as there can be
    keys    0 ......... the longest) .... a power of two or one and a half of one, or all that fits a slot

AttentionMetadata and slots that rounding adds are computed as well. They are written to scratch (see KVCache): rows
behind the real ones of their slot, whole slots behind the capacity. Each sees itself at least, and no real row sees
them.

Knows nothing of models or trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, AttentionTensors
from model.backends.kernels import choice
from model.backends.kv_cache import KVCache
from model.transfer import pinned

MAX_ROWS = 64  # per slot: what they see of each other is sent as the bits of one int64 each
MAX_RECORDINGS = 64  # per kind of pass; shapes beyond them run unrecorded
ROW_STEP = 8
LEAST_KEYS = 256

Outputs = tuple[Tensor, ...]
# (plan, numbers (planes, batch, rows) int64, states (batch, rows, width) or None) -> tensors (batch, ...)
Compute = Callable[[AttentionTensors, Tensor, Tensor | None], Outputs]


class Recorder(Protocol):
    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A function that does again what `run` does, with what the tensors it reads hold by then."""
        ...


class CudaGraphs:
    """Every recording is a CUDA graph. All share one pool of memory: no two of them run at the same time."""

    WARM_UPS = 2  # libraries choose and load their kernels at first use, which cannot be recorded

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what another thread of the process asks of CUDA meanwhile is none of this recording's
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class Again:
    """Where nothing can be recorded: the same passes over the same buffers in the same shapes, run anew each time."""

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return run


def recorder(device: torch.device) -> Recorder:
    return CudaGraphs(device) if device.type == "cuda" else Again()


@dataclass(frozen=True)
class Shape:
    batch: int  # slots 0..
    rows: int  # per slot
    keys: int  # read of every slot
    width: int  # of the states that go in; 0: none do


@dataclass(frozen=True)
class _Recording:
    numbers: Tensor
    states: Tensor | None
    replay: Callable[[], Outputs]


class Replays:
    """One kind of pass over slots 0.., in as many recordings as it has met shapes."""

    def __init__(self, compute: Compute, cache: KVCache, recorder: Recorder, *, max_rows: int) -> None:
        """`compute` reads nothing that changes but its arguments and what stays where it is, as the cache does; at most
        `max_rows` rows per slot."""
        assert max_rows <= MAX_ROWS
        self._compute, self._cache, self._recorder, self._max_rows = compute, cache, recorder, max_rows
        self._recordings: dict[Shape, _Recording] = {}

    def __call__(self, rows: AttentionMetadata, numbers: np.ndarray, states: Tensor | None = None) -> Outputs:
        """Run it. numbers: (planes, batch, rows) int64; states: (batch, rows, width), if it takes any.

        What is returned lies in memory that the next pass of this recorder, of whatever kind, may use: it is to be
        read, or copied, before. It holds what `compute` gives for the real slots: of a
        tensor with the pass's rows for its second axis, those of the real rows alone are of use.
        """
        shape = self.shape(rows, 0 if states is None else states.shape[-1])
        recording = self._recordings.get(shape) or self._prepared(shape, len(numbers))
        recording.numbers.copy_(pinned(self._filled(shape, rows, numbers), recording.numbers.device), non_blocking=True)
        if states is not None:
            assert recording.states is not None
            recording.states[: rows.batch, : rows.num] = states
        return tuple(output[: rows.batch] for output in recording.replay())

    def prepare(self, planes: int, rows: Iterable[int], width: int = 0) -> None:
        """Record every shape of passes over so many rows now, for nobody to wait for it later: the largest first, in
        whose memory the others then find room. Where the number of keys makes a shape, they are too many for that."""
        if not self._reads_cache:
            return
        most = self._cache.num_slots
        batches = {self._batch(number) for number in range(1, most + 1)}
        for batch in sorted(batches, reverse=True):
            for num in sorted({self._rows(number) for number in rows}, reverse=True):
                shape = Shape(batch, num, self._cache.stride, width)
                if shape not in self._recordings:
                    self._prepared(shape, planes)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those recorded so far."""
        return tuple(self._recordings)

    def shape(self, rows: AttentionMetadata, width: int) -> Shape:
        """The smallest one to hold these rows."""
        assert rows.first_slot == 0
        assert rows.num <= self._max_rows
        num = self._rows(rows.num)
        return Shape(self._batch(rows.batch), num, self._keys(rows.longest + num - rows.num), width)

    def _batch(self, batch: int) -> int:
        return min(1 << (batch - 1).bit_length(), self._cache.num_slots)

    def _rows(self, num: int) -> int:
        return 1 if num == 1 else min(-(-num // ROW_STEP) * ROW_STEP, self._max_rows)

    @property
    def _reads_cache(self) -> bool:
        """Whether attention reads as many keys of a slot as there are, whatever number it is offered."""
        data = self._cache.data
        return choice.tree_attention(data.dtype, data.shape[-1], data.device) is not None

    def _keys(self, longest: int) -> int:
        if self._reads_cache:
            return self._cache.stride
        keys = LEAST_KEYS
        while keys < longest:
            keys = keys * 3 // 2 if keys & (keys - 1) == 0 else keys * 4 // 3
        return min(keys, self._cache.stride)

    def _filled(self, shape: Shape, rows: AttentionMetadata, numbers: np.ndarray) -> np.ndarray:
        """The plan and `numbers` as one array of this shape: (3 + planes, batch, rows) int64, zero where nothing is
        real. Planes: starts, targets, what the rows see as bits (see AttentionTensors), `numbers`."""
        filled = self._idle(shape, len(numbers))
        filled[0, : rows.batch] = rows.seen_from[:, None]
        filled[1, : rows.batch] = rows.written_from[:, None]
        bits = np.uint64(1) << np.arange(rows.num, dtype=np.uint64)
        sees = (rows.visible() * bits).sum(-1, dtype=np.uint64)
        filled[2, : rows.batch, : rows.num] = sees.view(np.int64)
        filled[3:, : rows.batch, : rows.num] = numbers
        return filled

    def _idle(self, shape: Shape, planes: int) -> np.ndarray:
        """The same for a pass in which every slot idles."""
        filled = np.zeros((3 + planes, shape.batch, shape.rows), np.int64)
        filled[1] = self._cache.capacity
        filled[2] = (np.uint64(1) << np.arange(shape.rows, dtype=np.uint64)).view(np.int64)
        return filled

    def _prepared(self, shape: Shape, planes: int) -> _Recording:
        """Buffers for this shape, and what is to be run over them."""
        device = self._cache.data.device
        # Recording runs the pass: by then the buffers must say where scratch is.
        buffer = torch.from_numpy(self._idle(shape, planes)).to(device)
        entering = self._cache.data.new_zeros(shape.batch, shape.rows, shape.width) if shape.width else None

        def run() -> Outputs:
            places = torch.arange(shape.rows, device=device)
            visible = (buffer[2, :, :, None] >> places & 1).bool()
            plan = AttentionTensors(self._cache, 0, buffer[0, :, 0], buffer[1, :, 0], visible, shape.keys)
            return self._compute(plan, buffer[3:], entering)

        if len(self._recordings) >= MAX_RECORDINGS:
            return _Recording(buffer, entering, run)
        self._recordings[shape] = _Recording(buffer, entering, self._recorder.record(run))
        return self._recordings[shape]
