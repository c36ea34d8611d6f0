"""What the routes answer, as types: the routes are checked against them, and the OpenAPI document describes them."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from model.request import FinishReason

# Parts of several answers


class CachedTokens(TypedDict):
    cached_tokens: int


class PredictionTokens(TypedDict):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Tokens of the prompt, counted once, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictionTokens


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


# POST /v1/completions


class CompletionLogprobs(TypedDict):
    """One entry per token in each column."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """An answer, or a chunk of a stream; the last chunk before `[DONE]` may have usage and no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


# POST /v1/generate


class Speculation(TypedDict):
    acceptance_length: float
    drafts: int
    draft_tokens: int
    accepted_tokens: int


class Timings(TypedDict):
    """Seconds, and tokens per second."""

    queue: float
    media: float
    time_to_first_token: float
    decode: float
    tokens_per_second: float
