"""What the routes answer, as types: the routes are checked against them, and the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

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


# GET /v1/models


class Architecture(TypedDict):
    modality: str
    input_modalities: list[str]
    output_modalities: list[str]


class Capabilities(TypedDict):
    completion: bool
    completion_chat: bool
    vision: bool
    video: bool
    structured_output: bool


class ModelLimits(TypedDict):
    max_completion_tokens: int
    max_media: int  # images and videos of a request
    max_frames: int  # of a video


class Model(TypedDict):
    """The served model. What is null is not known before it is loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    permission: list[Any]
    type: str
    max_model_len: int | None
    context_length: int | None
    architecture: Architecture
    capabilities: Capabilities
    limits: ModelLimits
    supported_parameters: list[str]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


# POST /tokenize, /detokenize


class Tokenized(TypedDict):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str
    content: str  # the same, by llama.cpp's name


# POST /v1/responses/input_tokens


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


# POST /v1/messages/count_tokens


class CountedTokens(TypedDict):
    input_tokens: int


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
