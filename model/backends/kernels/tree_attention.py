"""Computes attention of a few rows of every slot, in Triton. It reads each slot only as far as it is filled.

torch's kernels take one key length for all slots and a mask of that length for every row. Here the length of each slot
is read on the device, so that one recording (see graphs.py) serves every length, and the only mask is which rows see
each other. Keys are split into spans that are attended to independently and then joined; otherwise a single long
sequence would keep only a few of a GPU's processors busy. The size of a span does not depend on the batch, so the
result of a row does not depend on the other slots.

    query heads that share keys: M = groups * rows, row m belongs to head m // rows and is row m % rows

Layers with a window read from the block of the first key that any row sees. Arguments that are None (windows, rings,
soft caps, sinks) leave no trace in what is compiled.

Imports triton, so it may only be imported if triton is installed. See choice.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.kernels.window import Window

SPAN = 256  # keys of a slot that one program reads
BLOCK_N = 64  # keys read at a time
BLOCK_M = 64  # queries of a block at most. With keys wider than 128, blocks are smaller: see _narrower
NUM_STAGES = 2  # concurrent loads; three of float32 need more shared memory than an A100 has


@triton.jit
def _oldest(start, window):
    """Return the first position that any row sees."""
    if window is None:
        return 0
    else:
        return tl.maximum(start - window + 1, 0)


@triton.jit
def _place(position, ring, capacity):
    """Return where a position is stored."""
    if ring is None:
        return position
    else:
        return tl.where(position < capacity, position % ring, position - capacity + ring)


@triton.jit
def _attend_to_span(
    q, k, v, starts, visible, depths, parts, tops, totals, scale, softcap, window, ring, capacity,
    q_batch, q_head, q_row, k_batch, k_head, k_position, v_batch, v_head, v_position,
    starts_batch, visible_batch, depths_batch,
    num_rows, M, D, V, KV_HEADS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Attend to one span of keys: the first one is that of the first key that any row sees.

    parts[slot and head, span, m] = sum of exp2(score - top) * value; totals: the sum of exp2(score - top); tops: the
    highest score of the span.
    """
    slot_head, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = slot_head // KV_HEADS, slot_head % KV_HEADS
    start = tl.load(starts + b * starts_batch)
    end = start + num_rows
    oldest = _oldest(start, window)
    first = (oldest // SPAN + span) * SPAN
    if first >= end:
        return
    last = tl.minimum(first + SPAN, end)
    if window is not None:
        first = tl.maximum(first, oldest // BLOCK_N * BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row, head = m % num_rows, h * (M // num_rows) + m // num_rows
    queries = tl.load(
        q + b * q_batch + head[:, None] * q_head + row[:, None] * q_row + d[None, :],
        mask=(m < M)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if window is not None:
        nearest = tl.load(depths + b * depths_batch + row, mask=m < M, other=0) - window
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for at in range(first, last, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        in_range = n < last
        place = _place(n, ring, capacity)
        keys = tl.load(
            k + b * k_batch + h * k_head + place[None, :] * k_position + d[:, None],
            mask=in_range[None, :] & (d < D)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        if softcap is not None:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores / softcap * 2.8853900817779268) + 1.0))  # tanh
        behind = n - start
        among = (behind >= 0) & in_range
        seen = tl.load(
            visible + b * visible_batch + row[:, None] * num_rows + behind[None, :],
            mask=among[None, :] & (m < M)[:, None],
            other=0,
        )
        earlier = (behind < 0)[None, :] & in_range[None, :]
        if window is not None:
            earlier = earlier & (behind[None, :] > nearest[:, None])
        scores = tl.where(earlier | (seen != 0), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # for a row that has seen no key yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        values = tl.load(
            v + b * v_batch + h * v_head + place[:, None] * v_position + e[None, :],
            mask=in_range[:, None] & (e < V)[None, :],
            other=0.0,
        )
        part = part * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    at = (slot_head * tl.num_programs(1) + span) * M + m
    tl.store(parts + at[:, None] * V + e[None, :], part, mask=(m < M)[:, None] & (e < V)[None, :])
    tl.store(tops + at, top, mask=m < M)
    tl.store(totals + at, total, mask=m < M)


@triton.jit
def _join_spans(
    parts, tops, totals, starts, sinks, out, window,
    starts_batch, out_batch, out_head, out_row, num_rows, num_spans, M, V,
    KV_HEADS: tl.constexpr, SPAN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Join the spans of one row and head into its output. A sink is one more key, which has no value."""
    slot_head, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = slot_head // KV_HEADS, slot_head % KV_HEADS
    start = tl.load(starts + b * starts_batch)
    head, row = h * (M // num_rows) + m // num_rows, m % num_rows
    e = tl.arange(0, BLOCK_V)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32) * 1.4426950408889634
        total += 1.0
    mixed = tl.zeros((BLOCK_V,), tl.float32)
    for span in range(0, tl.cdiv(start + num_rows, SPAN) - _oldest(start, window) // SPAN):
        at = (slot_head * num_spans + span) * M + m
        theirs = tl.load(tops + at + tl.arange(0, 1))
        higher = tl.maximum(top, theirs)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - finite), tl.exp2(theirs - finite)
        mixed = mixed * shrink + tl.load(parts + at * V + e, mask=e < V, other=0.0) * weight
        total = total * shrink + tl.load(totals + at + tl.arange(0, 1)) * weight
        top = higher
    result = (mixed / total).to(out.dtype.element_ty)  # every row sees itself, so the total is above 0
    tl.store(out + b * out_batch + head * out_head + row * out_row + e, result, mask=e < V)


def _narrower(width: int, itemsize: int) -> int:
    """Return by what number to divide blocks so that they fit into the 163 KiB of shared memory of an A100: 1, 2, 4."""
    return max(triton.cdiv(width * itemsize, 512), 2 if width > 128 else 1)


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    visible: Tensor,
    scale: float | None = None,
    *,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the result of `attention.attend` after the rows' own keys and values have been written.

    queries: (batch, heads, rows, head_dim); keys, values: (batch, kv heads, places, width), the whole slots, keys at
    least as wide as queries; starts: (batch,) int64, position of the first row; visible: (batch or 1, rows, rows) bool,
    which rows see each other, whatever their window; sinks: (heads,). Returns (batch, heads, rows, width of values).
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, positions, width = keys.shape[1], keys.shape[2], values.shape[-1]
    assert keys.stride(-1) == values.stride(-1) == 1
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    sees = visible.contiguous().view(torch.uint8)
    m, size, ring, capacity, depths = heads // kv_heads * rows, None, None, None, None
    if window is not None:
        size, depths, ring, capacity = window
        if ring is not None and capacity is not None:
            positions += capacity - ring
        positions = min(positions, SPAN + size - 2 + rows)  # in as many spans as these can lie
    spans = triton.cdiv(positions, SPAN)
    parts = queries.new_empty(batch * kv_heads, spans, m, width, dtype=torch.float32)
    tops, totals = queries.new_empty(2, batch * kv_heads, spans, m, dtype=torch.float32)
    out = queries.new_empty(batch, rows, heads, width).transpose(1, 2)  # the layout that the model's next step needs
    block_d, block_v = (max(16, triton.next_power_of_2(number)) for number in (dim, width))
    narrower = _narrower(max(block_d, block_v), queries.element_size())
    block_m = min(BLOCK_M // narrower, max(16, triton.next_power_of_2(m)))
    log2e = math.log2(math.e)
    _attend_to_span[(batch * kv_heads, spans, triton.cdiv(m, block_m))](
        queries, keys, values, starts, sees, depths, parts, tops, totals,
        (1.0 / math.sqrt(dim) if scale is None else scale) * log2e, None if softcap is None else softcap * log2e,
        size, ring, capacity,
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3], starts.stride(0),
        sees.stride(0) if len(sees) > 1 else 0,
        depths.stride(0) if depths is not None and len(depths) > 1 else 0,
        rows, m, dim, width, kv_heads, SPAN, block_m, BLOCK_N // narrower, block_d, block_v, num_stages=NUM_STAGES,
    )  # fmt: skip
    _join_spans[(batch * kv_heads, m)](
        parts, tops, totals, starts, sinks, out, size,
        starts.stride(0), *out.stride()[:3], rows, spans, m, width, kv_heads, SPAN, block_v,
    )  # fmt: skip
    return out
