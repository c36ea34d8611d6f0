"""What an answer cost, in OpenAI's shape and in ours."""

from __future__ import annotations

from typing import Any

from service.answer import Answer, Choice


def usage(answer: Answer) -> dict[str, Any]:
    """The prompt is counted once, however many choices were made of it, and of which one has been heard."""
    stats = [choice.stats for choice in answer.choices]
    prompt = max(one.prompt_tokens for one in stats)
    completion = sum(one.completion_tokens for one in stats)
    accepted = sum(one.accepted_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(one.draft_tokens for one in stats) - accepted,
        },
    }


def speculation(choice: Choice) -> dict[str, Any]:
    """`acceptance_length`: tokens a verify step gave on average, the bonus token included; 1 without drafts."""
    stats = choice.stats
    return {
        "acceptance_length": 1.0 + stats.accepted_tokens / stats.drafts if stats.drafts else 1.0,
        "drafts": stats.drafts,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }


def timings(answer: Answer, choice: Choice) -> dict[str, float]:
    """Seconds; `tokens_per_second` is that of decoding, after the first output."""
    per_token = choice.seconds_per_token
    return {
        "queue": choice.stats.queue,
        "media": answer.media_seconds,
        "time_to_first_token": answer.time_to_first_token(choice),
        "decode": choice.decode_seconds,
        "tokens_per_second": 1.0 / per_token if per_token else 0.0,
    }
