"""Convert log-probabilities of tokens to OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from model.request import Likelihood, Likelihoods

MIN_LOGPROB = -9999.0  # stands for minus infinity, as at OpenAI: JSON has none


def to_openai(tokens: Iterable[Likelihoods]) -> list[dict[str, Any]]:
    return [_entry(token.chosen) | {"top_logprobs": [_entry(one) for one in token.top]} for token in tokens]


def _entry(one: Likelihood) -> dict[str, Any]:
    """The concatenated `bytes` are the text; a single `token` may be only a part of a character."""
    return {
        "token": one.said.decode(errors="replace"),
        "logprob": max(one.logprob, MIN_LOGPROB),
        "bytes": list(one.said),
    }
