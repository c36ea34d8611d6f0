"""Computes attention of a few rows of every slot, in Triton. It reads each slot only as far as it is filled.

torch's kernels take one key length for all slots and a mask of that length for every row. Here the length of each slot
is read on the device, so that one recording (see graphs.py) serves every length, and the only mask is which rows see
each other. Keys are split into spans that are attended to independently and then joined; otherwise a single long
sequence would keep only a few of a GPU's processors busy. The size of a span does not depend on the batch, so the
result of a row does not depend on the other slots.

    query heads that share keys: M = groups * rows, row m belongs to head m // rows and is row m % rows

Imports triton, so it may only be imported if triton is installed. See choice.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 256  # keys of a slot that one program reads
BLOCK_N = 64  # keys read at a time
NUM_STAGES = 2  # concurrent loads; three of float32 need more shared memory than an A100 has


@triton.jit
def _attend_to_span(
    q, k, v, starts, visible, parts, tops, totals, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_position, v_batch, v_head, v_position, starts_batch, visible_batch,
    num_rows, M, D, KV_HEADS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend to one span of keys.

    parts[slot and head, span, m] = sum of exp2(score - top) * value; totals: the sum of exp2(score - top); tops: the
    highest score of the span.
    """
    slot_head, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = slot_head // KV_HEADS, slot_head % KV_HEADS
    start = tl.load(starts + b * starts_batch)
    end = start + num_rows
    first = span * SPAN
    if first >= end:
        return
    last = tl.minimum(first + SPAN, end)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row, head = m % num_rows, h * (M // num_rows) + m // num_rows
    wanted = (m < M)[:, None] & (d < D)[None, :]
    queries = tl.load(
        q + b * q_batch + head[:, None] * q_head + row[:, None] * q_row + d[None, :], mask=wanted, other=0.0
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(first, last, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        in_range = n < last
        keys = tl.load(
            k + b * k_batch + h * k_head + n[None, :] * k_position + d[:, None],
            mask=in_range[None, :] & (d < D)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        behind = n - start
        among = (behind >= 0) & in_range
        seen = tl.load(
            visible + b * visible_batch + row[:, None] * num_rows + behind[None, :],
            mask=among[None, :] & (m < M)[:, None],
            other=0,
        )
        scores = tl.where((behind < 0)[None, :] & in_range[None, :] | (seen != 0), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # for a row that has seen no key yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        values = tl.load(
            v + b * v_batch + h * v_head + n[:, None] * v_position + d[None, :],
            mask=in_range[:, None] & (d < D)[None, :],
            other=0.0,
        )
        part = part * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    place = (slot_head * tl.num_programs(1) + span) * M + m
    tl.store(parts + place[:, None] * D + d[None, :], part, mask=wanted)
    tl.store(tops + place, top, mask=m < M)
    tl.store(totals + place, total, mask=m < M)


@triton.jit
def _join_spans(
    parts, tops, totals, starts, out,
    starts_batch, out_batch, out_head, out_row, num_rows, num_spans, M, D,
    KV_HEADS: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the spans of one row and head into its output."""
    slot_head, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = slot_head // KV_HEADS, slot_head % KV_HEADS
    end = tl.load(starts + b * starts_batch) + num_rows
    d = tl.arange(0, BLOCK_D)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for span in range(0, tl.cdiv(end, SPAN)):
        place = (slot_head * num_spans + span) * M + m
        theirs = tl.load(tops + place + tl.arange(0, 1))
        higher = tl.maximum(top, theirs)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - finite), tl.exp2(theirs - finite)
        mixed = mixed * shrink + tl.load(parts + place * D + d, mask=d < D, other=0.0) * weight
        total = total * shrink + tl.load(totals + place + tl.arange(0, 1)) * weight
        top = higher
    head, row = h * (M // num_rows) + m // num_rows, m % num_rows
    result = (mixed / total).to(out.dtype.element_ty)  # every row sees itself, so the total is above 0
    tl.store(out + b * out_batch + head * out_head + row * out_row + d, result, mask=d < D)


def tree_attention(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, visible: Tensor, scale: float | None = None
) -> Tensor:
    """Compute the result of `attention.attend` after the rows' own keys and values have been written.

    queries: (batch, heads, rows, head_dim); keys, values: (batch, kv heads, positions, head_dim), the whole slots;
    starts: (batch,) int64, position of the first row; visible: (batch or 1, rows, rows) bool, which rows see each
    other. Returns (batch, heads, rows, head_dim).
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, positions = keys.shape[1:3]
    assert keys.stride(-1) == values.stride(-1) == 1
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    sees = visible.contiguous().view(torch.uint8)
    m, spans = heads // kv_heads * rows, triton.cdiv(positions, SPAN)
    parts = queries.new_empty(batch * kv_heads, spans, m, dim, dtype=torch.float32)
    tops, totals = queries.new_empty(2, batch * kv_heads, spans, m, dtype=torch.float32)
    out = queries.new_empty(batch, rows, heads, dim).transpose(1, 2)  # the layout that the model's next step needs
    block_m, block_d = min(64, max(16, triton.next_power_of_2(m))), max(16, triton.next_power_of_2(dim))
    _attend_to_span[(batch * kv_heads, spans, triton.cdiv(m, block_m))](
        queries, keys, values, starts, sees, parts, tops, totals,
        (1.0 / math.sqrt(dim) if scale is None else scale) * math.log2(math.e),
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3], starts.stride(0),
        sees.stride(0) if len(sees) > 1 else 0,
        rows, m, dim, kv_heads, SPAN, block_m, BLOCK_N, block_d, num_stages=NUM_STAGES,
    )  # fmt: skip
    _join_spans[(batch * kv_heads, m)](
        parts,
        tops,
        totals,
        starts,
        out,
        starts.stride(0),
        *out.stride()[:3],
        rows,
        spans,
        m,
        dim,
        kv_heads,
        SPAN,
        block_d,
    )
    return out
