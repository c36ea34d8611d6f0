"""Measures how close a choice between two tokens was. Knows logits and one request's sampling, nothing of engines.

Rounding differs between shapes of a batch, so two correct engines may differ where a choice is nearly a tie, and only
there. A margin is how far the numbers must move for the other token to be chosen: where it is wide, a difference is a
bug.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from model.decoding import sampling
from model.request import SamplingParams


def margin(logits: Tensor, params: SamplingParams, position: int, tokens: tuple[int, ...]) -> float:
    """Measure how far the numbers must move for `position` of the answer to be any of `tokens`.

    logits: (vocab,) float64. Greedy: the gap between the best logit and the worst of `tokens`, as a share of the range
    of all logits; for the best two it is the top-two gap. Sampled: see `_sampled`.
    """
    if params.temperature == 0.0:
        span = float(logits.max() - logits.min())
        return float(logits.max() - logits[list(tokens)].min()) / span if span else 0.0
    return _sampled(logits, params, sampling.uniform(params.seed, position), tokens)


def _sampled(logits: Tensor, params: SamplingParams, drawn: float, tokens: tuple[int, ...]) -> float:
    """Measure, as a probability, how far u(seed, i) lies from where the furthest of `tokens` would be drawn.

    Near top-p's own cut the distribution itself is nearly another one: a token may then also be drawn under the
    neighbouring cut, at the price of the distance to it.
    """
    costs = [_distance(logits, params, drawn, token) for token in tokens]
    if params.top_p < 1.0:
        whole = sampling.distribution(logits[None], replace(params, top_p=1.0, min_p=0.0))[0]
        ordered = whole.sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        cut = float(before[(before - params.top_p).abs().argmin()])
        # A token stays while what comes before it is less than top_p: with top_p just above `cut` it stays.
        other = cut - 1e-12 if cut < params.top_p else cut + 1e-12
        if 0.0 < other <= 1.0:
            nearly = replace(params, top_p=other)
            price = abs(cut - params.top_p)
            costs = [
                min(cost, max(price, _distance(logits, nearly, drawn, token)))
                for cost, token in zip(costs, tokens, strict=True)
            ]
    return max(costs)


def _distance(logits: Tensor, params: SamplingParams, drawn: float, token: int) -> float:
    """The distance from `drawn` to the interval of the CDF that gives the token; infinite where none does."""
    probs = sampling.distribution(logits[None], params)[0]
    if probs[token] == 0:
        return math.inf
    end = probs.cumsum(0)[token]
    return max(0.0, float(end - probs[token]) - drawn, drawn - float(end))
