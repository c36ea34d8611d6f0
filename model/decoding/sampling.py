"""Chooses tokens from logits, with randomness that depends on (seed, position) alone. Knows nothing of drafts or trees.

The token at position i of an answer is the inverse of the target's cumulative distribution at one uniform number
u(seed, i). Position i gets the same u, and so the same token, however its step was drafted, batched or resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.request import SamplingParams
from model.transfer import upload

GREEDY = SamplingParams()
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that decides position `position` of a request with this seed."""
    return (_mix(_mix(seed & _MASK) ^ ((position * 0xD1342543DE82EF95) & _MASK)) >> 11) * 2.0**-53


def distribution(logits: Tensor, params: SamplingParams | Seq[SamplingParams]) -> Tensor:
    """Compute the distributions that requests draw from: (rows, vocab) any float -> (rows, vocab) float64.

    params: those of all rows, or one for each row. Temperature, top-k, top-p and min-p apply in this order, each to the
    result of the one before, as in transformers. On a CPU the bits of a row do not depend on the other rows or on the
    number of threads. On a GPU the last bits may, since sums are divided by the number of rows.
    """
    each = (params,) if isinstance(params, SamplingParams) else params
    vocab = logits.shape[-1]
    settings = [(p.temperature, p.top_k if 0 < p.top_k < vocab else vocab, p.top_p, p.min_p) for p in each]
    most = max((k for _, k, _, _ in settings if k < vocab), default=0)
    # Settings are one number for all rows, or a column with one for each row. CUDA divides by a number and by a column
    # with different results, so there it is always columns: the bits of a request are the same alone and in a batch.
    columns = len(settings) > 1 or logits.is_cuda
    temperature, top_k, top_p, min_p = _columns(settings, len(logits), logits.device) if columns else settings[0]
    logits = logits.double()
    below = logits - logits.max(-1, keepdim=True).values  # so that even the smallest temperature makes no infinity
    probs = (below / temperature).softmax(-1)
    if most:
        least = probs.topk(most, -1).values
        least = least.gather(-1, top_k.long().clamp(max=most) - 1) if isinstance(top_k, Tensor) else least[:, -1:]
        probs = probs.masked_fill((probs < least) & (top_k < vocab), 0.0)
    if any(p.top_p < 1.0 for p in each):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        upto = ordered.cumsum(-1)
        before = upto - ordered  # a token stays while the sum before it is less than top_p
        dropped = (before >= top_p * upto[:, -1:]) & (top_p < 1.0)
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), 0.0)
    if any(p.min_p > 0.0 for p in each):
        probs = probs.masked_fill(probs < min_p * probs.max(-1, keepdim=True).values, 0.0)
    return probs / probs.cumsum(-1)[:, -1:]  # sums in order: torch splits the sum of a long row among threads


def _columns(settings: list[tuple[float, int, float, float]], rows: int, device: torch.device) -> Tensor:
    """Upload the settings of all rows, or of each row, as columns: (4, rows, 1) float64."""
    return upload(np.array(settings, np.float64).T[:, :, None].copy(), device).expand(-1, rows, -1)


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distributions, in token order: (rows, vocab) float64 and (rows,) float64 -> (rows,)
    int64."""
    cumulative = probs.cumsum(-1)
    point = uniforms[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # Rounding can place the point at the very end: choose the last token that has any probability.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)


def choose(
    logits: Tensor,
    params: Seq[SamplingParams],
    positions: Callable[[int], Seq[int]],
    likeliest: np.ndarray | None = None,
    process: Callable[[int, Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Choose the target's own token at every row: (batch, rows) int64.

    logits: (batch, rows, vocab); positions(b)[r]: the answer position that row r of request b decides. It may be
    shorter than `rows`; the rows beyond it get their greedy token. likeliest: (batch, rows) int64, the greedy tokens if
    they are known; process(b, logits (rows, vocab)): applies the logits processors of request b (processors.py).
    """
    batch, num = logits.shape[:2]
    tokens = logits.argmax(-1) if likeliest is None else torch.from_numpy(likeliest)
    decided = {b: positions(b) for b in range(batch) if params[b].temperature > 0.0 or params[b].processes}
    for b in [b for b, places in decided.items() if places and params[b].processes]:
        places = decided.pop(b)
        assert process is not None
        processed, row = process(b, logits[b, : len(places)]), tokens[b, : len(places)]
        if params[b].temperature:
            draws = upload(np.array([uniform(params[b].seed, i) for i in places]), logits.device)
            row[:] = invert(distribution(processed, params[b]), draws)
        else:
            row[:] = processed.argmax(-1)
    # Requests that use the same filters go together, so that no vocabulary is sorted without need.
    for group in _alike([b for b, places in decided.items() if places], params):
        drawn = [(params[b], i) for b in group for i in decided[b]]
        draws = upload(np.array([uniform(p.seed, i) for p, i in drawn]), logits.device)
        if len(group) == 1:
            b, count = group[0], len(drawn)
            tokens[b, :count] = invert(distribution(logits[b, :count], params[b]), draws)
        else:
            rows = upload(np.array([b * num + r for b in group for r in range(len(decided[b]))]), logits.device)
            probs = distribution(logits.flatten(0, 1).index_select(0, rows), [p for p, _ in drawn])
            tokens.view(-1).index_copy_(0, rows, invert(probs, draws))
    result: np.ndarray = tokens.cpu().numpy()
    return result


def _alike(requests: Seq[int], params: Seq[SamplingParams]) -> list[list[int]]:
    """Group requests by whether they use top-k and top-p."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for b in requests:
        groups.setdefault((params[b].top_k > 0, params[b].top_p < 1.0), []).append(b)
    return list(groups.values())


def likeliest_of(logits: Tensor, chosen: Seq[int], num: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Compute for each row the natural log-probability of the chosen token, and the `num` likeliest tokens with theirs.

    logits: (rows, vocab) any float. Among equally likely tokens the lowest id comes first.
    """
    logs = logits.double().log_softmax(-1).cpu()
    own = logs.gather(-1, torch.tensor(chosen)[:, None])[:, 0].tolist()
    num = min(num, logs.shape[-1])
    found = []
    for row, log in enumerate(logs):
        ids = torch.nonzero(log >= log.topk(num).values[-1])[:, 0] if num else torch.empty(0, dtype=torch.int64)
        values, order = log[ids].sort(descending=True, stable=True)
        found.append((own[row], list(zip(ids[order[:num]].tolist(), values[:num].tolist(), strict=True))))
    return found
