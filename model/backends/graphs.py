"""Records a pass once for every shape and replays it, so that a GPU does not wait for Python between two kernels.

A recording always reads the same memory and always has the same shape. So everything that differs from pass to pass is
first written into static buffers, and shapes are rounded up to a few:

    slots   0 ......... real batch) ..... a power of two, or all slots
    rows    0 ......... real rows) ...... 1, or a multiple of eight, or as many as there can be
    keys    0 ......... the longest) .... a power of two or one and a half of one, or all that fits a slot

Rows and slots that rounding adds are computed too. They are written to scratch (see KVCache): added rows behind the
real rows of their slot, added slots behind the capacity. Each added row sees at least itself, and no real row sees it.

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
from model.backends.kernels.choice import Options
from model.backends.kv_cache import KVCache
from model.transfer import pinned

MAX_ROWS = 64  # per slot: the rows that a row sees are sent as the bits of one int64
MAX_RECORDINGS = 64  # per kind of pass; shapes beyond them run unrecorded
ROW_STEP = 8
LEAST_KEYS = 256

Outputs = tuple[Tensor, ...]
# (plan, numbers (planes, batch, rows) int64, states (batch, rows, width) or None) -> tensors (batch, ...)
Compute = Callable[[AttentionTensors, Tensor, Tensor | None], Outputs]


class Recorder(Protocol):
    """Records passes."""

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Return a function that repeats `run` on the present contents of the tensors that it reads."""
        ...


class CudaGraphs:
    """Records passes as CUDA graphs. All share one memory pool, since no two of them run at the same time."""

    WARM_UPS = 2  # libraries choose and load their kernels at first use, which cannot be recorded

    def __init__(self, device: torch.device) -> None:
        """Set up the memory pool and the stream for recordings on this device."""
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Run `run` to warm up, and record it. The replay always returns the same tensors."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: CUDA calls of other threads of the process must not end up in this recording
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> Outputs:
            """Run the graph and return its output tensors."""
            graph.replay()
            return outputs

        return replay


class Again:
    """Runs the same passes over the same buffers in the same shapes, for devices without recording."""

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Return `run` itself."""
        return run


def recorder(device: torch.device) -> Recorder:
    """Return the recorder for this device."""
    return CudaGraphs(device) if device.type == "cuda" else Again()


@dataclass(frozen=True)
class Shape:
    """The shape of a recorded pass."""

    batch: int  # slots 0..
    rows: int  # per slot
    keys: int  # read of every slot
    width: int  # of the input states; 0: no states


@dataclass(frozen=True)
class _Recording:
    """The buffers of a recorded pass, and the function that runs it."""

    numbers: Tensor
    states: Tensor | None
    replay: Callable[[], Outputs]


class Replays:
    """Runs one kind of pass over slots 0.., with one recording per shape."""

    def __init__(self, compute: Compute, cache: KVCache, recorder: Recorder, *, max_rows: int) -> None:
        """Start without recordings. max_rows: most rows per slot.

        `compute` may only read its arguments and tensors that stay in place, such as the cache.
        """
        assert max_rows <= MAX_ROWS
        self._compute, self._cache, self._recorder, self._max_rows = compute, cache, recorder, max_rows
        self._recordings: dict[Shape, _Recording] = {}
        self._kinds = {  # of layers, by what is known of their attention
            (shape.width, Options(window=cache.window(shape.window) is not None, ring=cache.storage(layer)[0].wraps))
            for layer, shape in enumerate(cache.layers)
            if shape is not None
        }

    def __call__(self, rows: AttentionMetadata, numbers: np.ndarray, states: Tensor | None = None) -> Outputs:
        """Run the pass. numbers: (planes, batch, rows) int64; states: (batch, rows, width), if `compute` takes any.

        Returns the outputs of `compute` for the real slots. If the second axis of an output is rows, only the real rows
        are valid. The outputs lie in memory that the next pass of this recorder, of any kind, may overwrite: read or
        copy them before.
        """
        shape = self.shape(rows, 0 if states is None else states.shape[-1])
        recording = self._recordings.get(shape) or self._prepared(shape, len(numbers))
        recording.numbers.copy_(pinned(self._filled(shape, rows, numbers), recording.numbers.device), non_blocking=True)
        if states is not None:
            assert recording.states is not None
            recording.states[: rows.batch, : rows.num] = states
        return tuple(output[: rows.batch] for output in recording.replay())

    def prepare(self, planes: int, rows: Iterable[int], width: int = 0) -> None:
        """Record every shape of passes with so many rows now, so that no request waits for it later.

        The largest shape comes first, since the others then fit into its memory. Does nothing if shapes also depend on
        the number of keys, since they would be too many.
        """
        if not self._reads_cache:
            return
        most = self._cache.num_slots
        batches = {self._batch(number) for number in range(1, most + 1)}
        for batch in sorted(batches, reverse=True):
            for num in sorted({self._rows(number) for number in rows}, reverse=True):
                shape = Shape(batch, num, self._cache.positions, width)
                if shape not in self._recordings:
                    self._prepared(shape, planes)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the shapes recorded so far."""
        return tuple(self._recordings)

    def shape(self, rows: AttentionMetadata, width: int) -> Shape:
        """Return the smallest recordable shape that holds these rows."""
        assert rows.first_slot == 0
        assert rows.blocks is None
        assert rows.num <= self._max_rows
        num = self._rows(rows.num)
        return Shape(self._batch(rows.batch), num, self._keys(rows.longest + num - rows.num), width)

    def _batch(self, batch: int) -> int:
        """Round a batch size up to a power of two, at most all slots."""
        return min(1 << (batch - 1).bit_length(), self._cache.num_slots)

    def _rows(self, num: int) -> int:
        """Round a number of rows up to a multiple of ROW_STEP, except 1; at most `max_rows`."""
        return 1 if num == 1 else min(-(-num // ROW_STEP) * ROW_STEP, self._max_rows)

    @property
    def _reads_cache(self) -> bool:
        """Return whether attention finds the number of keys of each slot itself, regardless of the shape."""
        dtype, device = self._cache.dtype, self._cache.device
        return all(choice.tree_attention(dtype, width, device, kind) is not None for width, kind in self._kinds)

    def _keys(self, longest: int) -> int:
        """Round a number of keys up to a power of two or 1.5 times one; at most a whole slot."""
        if self._reads_cache:
            return self._cache.positions
        keys = LEAST_KEYS
        while keys < longest:
            keys = keys * 3 // 2 if keys & (keys - 1) == 0 else keys * 4 // 3
        return min(keys, self._cache.positions)

    def _filled(self, shape: Shape, rows: AttentionMetadata, numbers: np.ndarray) -> np.ndarray:
        """Combine the attention metadata and `numbers` into one array of this shape: (3 + planes, batch, rows) int64.

        Planes: starts, targets, visible rows as bits (see AttentionTensors), `numbers`. Added rows and slots are as in
        `_idle`.
        """
        filled = self._idle(shape, len(numbers))
        filled[0, : rows.batch] = rows.seen_from[:, None]
        filled[1, : rows.batch] = rows.written_from[:, None]
        bits = np.uint64(1) << np.arange(rows.num, dtype=np.uint64)
        sees = (rows.visible() * bits).sum(-1, dtype=np.uint64)
        filled[2, : rows.batch, : rows.num] = sees.view(np.int64)
        filled[3:, : rows.batch, : rows.num] = numbers
        return filled

    def _idle(self, shape: Shape, planes: int) -> np.ndarray:
        """Build the array of `_filled` for a pass in which every slot idles."""
        filled = np.zeros((3 + planes, shape.batch, shape.rows), np.int64)
        filled[1] = self._cache.capacity
        filled[2] = (np.uint64(1) << np.arange(shape.rows, dtype=np.uint64)).view(np.int64)
        return filled

    def _prepared(self, shape: Shape, planes: int) -> _Recording:
        """Allocate the input buffers of a shape and record its pass as a graph.

        Beyond MAX_RECORDINGS the pass is not recorded and runs as it is. planes: integers per row that the pass reads.
        """
        device = self._cache.device
        # Recording runs the pass, so the buffers must already point at scratch.
        buffer = torch.from_numpy(self._idle(shape, planes)).to(device)
        entering = None
        if shape.width:
            entering = torch.zeros(shape.batch, shape.rows, shape.width, dtype=self._cache.dtype, device=device)

        def run() -> Outputs:
            """Run the pass over the buffers."""
            places = torch.arange(shape.rows, device=device)
            visible = (buffer[2, :, :, None] >> places & 1).bool()
            plan = AttentionTensors(self._cache, 0, buffer[0, :, 0], buffer[1, :, 0], visible, shape.keys)
            return self._compute(plan, buffer[3:], entering)

        if len(self._recordings) >= MAX_RECORDINGS:
            return _Recording(buffer, entering, run)
        self._recordings[shape] = _Recording(buffer, entering, self._recorder.record(run))
        return self._recordings[shape]
