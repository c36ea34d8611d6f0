"""Convert log-probabilities of tokens to OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from model.request import TokenLogprob, TokenLogprobs

MIN_LOGPROB = -9999.0  # stands for minus infinity, as at OpenAI: JSON has none


def to_openai(tokens: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    return [_entry(token.chosen) | {"top_logprobs": [_entry(one) for one in token.top]} for token in tokens]


def _entry(one: TokenLogprob) -> dict[str, Any]:
    """The concatenated `bytes` are the text; a single `token` may be only a part of a character."""
    return {
        "token": one.bytes.decode(errors="replace"),
        "logprob": max(one.logprob, MIN_LOGPROB),
        "bytes": list(one.bytes),
    }
