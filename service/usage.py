"""The `usage`, `speculation` and `timings` fields of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.request import RequestStats
from service.schemas.answers import AnswerTokens, Speculation, Timings, Usage


def usage(stats: Sequence[RequestStats], num_prompts: int = 1, *, reasoning_tokens: int | None = None) -> Usage:
    """Sum over all choices, which belong to so many prompts in turn; each prompt is counted once, and known as soon as
    one of its choices has an output. reasoning_tokens: of chats, which know them."""
    n = len(stats) // num_prompts
    by_prompt = [stats[at : at + n] for at in range(0, len(stats), n)]
    prompt = sum(max(one.prompt_tokens for one in each) for each in by_prompt)
    completion = sum(one.completion_tokens for one in stats)
    accepted = sum(one.accepted_tokens for one in stats)
    rejected = sum(one.draft_tokens for one in stats) - accepted
    details: AnswerTokens = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    if reasoning_tokens is not None:
        details["reasoning_tokens"] = reasoning_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each[0].cached_tokens for each in by_prompt)},
        "completion_tokens_details": details,
    }


def responses_usage(of_chat: Usage) -> dict[str, Any]:
    """The same as OpenAI's Responses API names it."""
    return {
        "input_tokens": of_chat["prompt_tokens"],
        "input_tokens_details": {**of_chat["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": of_chat["completion_tokens"],
        "output_tokens_details": of_chat["completion_tokens_details"],
        "total_tokens": of_chat["total_tokens"],
    }


def anthropic_usage(of_chat: Usage) -> dict[str, Any]:
    """The same as Anthropic names it. Its `input_tokens` are those that were not in the cache."""
    details: dict[str, Any] = {**of_chat["completion_tokens_details"]}
    cached = of_chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": of_chat["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": of_chat["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": details.pop("reasoning_tokens", 0), **details},
    }


def speculation(stats: RequestStats) -> Speculation:
    """Statistics of one choice's drafts. `acceptance_length`: mean tokens per verify step with a draft, the bonus token
    included; 1 without drafts."""
    return {
        "acceptance_length": 1.0 + stats.accepted_tokens / stats.drafts if stats.drafts else 1.0,
        "drafts": stats.drafts,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }


def timings(
    *, queue: float, media: float, time_to_first_token: float, decode: float, seconds_per_token: float | None
) -> Timings:
    """All in seconds, but `tokens_per_second`, which counts decoding after the first output."""
    return {
        "queue": queue,
        "media": media,
        "time_to_first_token": time_to_first_token,
        "decode": decode,
        "tokens_per_second": 1.0 / seconds_per_token if seconds_per_token else 0.0,
    }
