"""What the routes answer, as types: the routes are checked against them, and the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from model.request import FinishReason, TokenSource

# Parts of several answers


class CachedTokens(TypedDict):
    cached_tokens: int


class AnswerTokens(TypedDict):
    reasoning_tokens: NotRequired[int]  # of chats
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Tokens of the prompt, counted once, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: AnswerTokens


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
    prompt_token_ids: NotRequired[
        list[int]
    ]  # vLLM's, with `return_token_ids`; in a stream in each choice's first chunk
    token_ids: NotRequired[list[int]]


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
    function_calling: bool
    reasoning: bool


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


class GeneratedToken(TypedDict):
    id: int
    text: str
    source: TokenSource


class Generated(TypedDict):
    id: str
    model: str
    text: str
    finish_reason: FinishReason | None
    logprobs: NotRequired[list[ChatLogprob]]
    usage: Usage
    speculation: Speculation
    timings: Timings


class TokenEvent(TypedDict):
    """What one step added."""

    type: Literal["token"]
    text: str
    tokens: list[GeneratedToken]
    logprobs: NotRequired[list[ChatLogprob]]


class DoneEvent(Generated):
    """The whole answer, at the end of a stream."""

    type: Literal["done"]


# POST /v1/chat/completions


class CalledFunction(TypedDict):
    name: str
    arguments: str  # JSON text


class CallOfTool(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]  # the same, by vLLM's and OpenRouter's name
    tool_calls: NotRequired[list[CallOfTool]]
    function_call: NotRequired[CalledFunction]  # OpenAI's former way, where `functions` were sent


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


ChatFinishReason = FinishReason | Literal["tool_calls", "function_call"]


class ChatChoice(TypedDict):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: NotRequired[list[int]]  # vLLM's, with `return_token_ids`


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: NotRequired[str]


class CallDelta(TypedDict):
    """A call that begins, or a piece of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]
    function_call: NotRequired[FunctionDelta]


class ChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """A part of a streamed answer; the last one before `[DONE]` may have usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]  # in the first chunks


# POST /v1/responses


class ResponseObject(TypedDict):
    """OpenAI's Response object; further fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]  # items: message, reasoning, function_call
    usage: dict[str, Any] | None


class ResponseEvent(TypedDict):
    """An event of OpenAI's Responses API; its type says which fields follow."""

    type: str
    sequence_number: int


# POST /v1/messages


class AnthropicMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]  # blocks: text, thinking, tool_use
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class AnthropicEvent(TypedDict):
    """An event of Anthropic's Messages API; its type says which fields follow."""

    type: str


class AnthropicErrorBody(TypedDict):
    type: str
    message: str
    param: str | None
    code: str | None


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str | None


# Operations


class Status(TypedDict):
    status: str


class WorkerHealth(TypedDict):
    worker: int
    state: str
    pid: int | None
    restarts: int
    requests: int


class DraftHealth(TypedDict):
    name: str
    since: str | None
    changes: int


class Health(TypedDict):
    """Where a key is needed and missing, `status` alone."""

    status: str
    model: NotRequired[str]
    requests: NotRequired[int]
    uploads: NotRequired[int]
    workers: NotRequired[list[WorkerHealth]]
    engine: NotRequired[dict[str, Any] | None]
    draft: NotRequired[DraftHealth | None]


class Version(TypedDict):
    name: str
    version: str
    python: str


class DraftChanged(TypedDict):
    drafter: str | None
    draft: str
    workers: int
    seconds: float
