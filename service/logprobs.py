"""How likely an answer's tokens were, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from model.request import Likelihood, Likelihoods

LEAST = -9999.0  # JSON has no infinity; OpenAI writes this for what cannot be


def told(tokens: Iterable[Likelihoods]) -> list[dict[str, Any]]:
    return [_entry(token.chosen) | {"top_logprobs": [_entry(one) for one in token.top]} for token in tokens]


def _entry(one: Likelihood) -> dict[str, Any]:
    """`bytes` side by side are the text, where a `token` alone is a part of a character."""
    return {"token": one.said.decode(errors="replace"), "logprob": max(one.logprob, LEAST), "bytes": list(one.said)}
