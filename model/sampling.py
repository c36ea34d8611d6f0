"""From logits to a token, with randomness that depends on (seed, position) alone. Knows nothing of drafts or trees.

The token at position i of an answer is the inverse of the target's cumulative distribution at one uniform number
u(seed, i). However a step was drafted, batched or resumed, position i meets the same u and so the same token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.request import SamplingParams

GREEDY = SamplingParams()
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The one number in [0, 1) that decides position `position` of a request with this seed."""
    return (_mix(_mix(seed & _MASK) ^ ((position * 0xD1342543DE82EF95) & _MASK)) >> 11) * 2.0**-53


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution from which this request draws: (rows, vocab) any float -> (rows, vocab) float64.

    Temperature, then top-k, top-p and min-p, each on what the one before left, as transformers orders them.
    """
    logits = logits.double()
    below = logits - logits.max(-1, keepdim=True).values  # so that no temperature, however small, makes an infinity
    probs = (below / params.temperature).softmax(-1)
    if 0 < params.top_k < probs.shape[-1]:
        least = probs.topk(params.top_k, -1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if params.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # a token stays while what comes before it is less than top_p
        dropped = before >= params.top_p * ordered.sum(-1, keepdim=True)
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), 0.0)
    if params.min_p > 0.0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(-1, keepdim=True).values, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF in token order: (rows, vocab) float64 and (rows,) float64 -> (rows,) int64."""
    cumulative = probs.cumsum(-1)
    point = uniforms[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # Rounding can place the point on the very end; the last token with any probability is then meant.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)


def choose(
    logits: Tensor, likeliest: np.ndarray, params: Seq[SamplingParams], positions: Callable[[int], Seq[int]]
) -> np.ndarray:
    """The target's own token at every row.

    logits: (batch, rows, vocab); likeliest: (batch, rows) int64, their greedy tokens; positions(b)[r]: the answer
    position that row r of request b decides; it may be shorter than `rows`, the rest are then not looked at (their
    greedy token is returned). Returns (batch, rows) int64.
    """
    tokens = likeliest
    for b, request in enumerate(params):
        if request.temperature > 0.0 and (decided := positions(b)):
            draws = torch.tensor([uniform(request.seed, i) for i in decided], dtype=torch.float64, device=logits.device)
            drawn = invert(distribution(logits[b, : len(decided)], request), draws)
            tokens[b, : len(decided)] = drawn.cpu().numpy()
    return tokens
