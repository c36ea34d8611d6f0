"""OpenAI's chat completion: what is read of it, what is refused, and the shapes of the answers.

Field by field: understood (below), refused unless they ask for nothing (NOT_BUILT), or accepted and without effect
(IGNORED). Anything else is a 400.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.errors import BadRequest
from service.schemas import sampling
from service.schemas.sampling import SamplingFields
from service.settings import Settings

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# Labels and routing hints of OpenAI's platform: they do not change an answer, so they may be there.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)


class Url(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the target has one size; every value means it


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text", tag_field="type"):
    text: str


class ImagePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image_url", tag_field="type"):
    image_url: Url


class VideoPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="video_url", tag_field="type"):
    video_url: Url


Part = TextPart | ImagePart | VideoPart


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    # An answer of ours may be sent back as it came: these are in it, and empty.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    def parts(self) -> list[Part]:
        return [TextPart(self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far, in every chunk
    include_obfuscation: bool | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None

    def asked_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def check(ask: ChatRequest, settings: Settings) -> None:
    """Every limit that can be checked without looking at media or tokens, each with its own error."""
    sampling.check_model(ask.model, settings)
    _refuse_not_built(ask)
    sampling.check_video_sampling(ask, settings)
    if ask.max_completion_tokens is not None:
        if ask.max_completion_tokens < 1:
            raise BadRequest("max_completion_tokens must be at least 1", param="max_completion_tokens")
        if ask.max_tokens not in (None, ask.max_completion_tokens):
            raise BadRequest("max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    if ask.stream_options is not None and not ask.stream:
        raise BadRequest("stream_options is for streams; set stream", param="stream_options")
    if not 1 <= len(ask.messages) <= settings.max_messages:
        raise BadRequest(f"there must be 1 to {settings.max_messages} messages", param="messages")
    if sum(len(message.parts()) for message in ask.messages) > settings.max_parts:
        raise BadRequest(f"at most {settings.max_parts} texts, images and videos are allowed", param="messages")
    num_chars = num_media = 0
    for index, message in enumerate(ask.messages):
        for part in message.parts():
            if isinstance(part, TextPart):
                num_chars += len(part.text)
                continue
            num_media += 1
            if message.role != "user":
                raise BadRequest("images and videos belong in user messages", param=f"messages[{index}].content")
    sampling.check_prompt_chars(num_chars, settings, param="messages")
    if num_media > settings.max_media:
        raise BadRequest(
            f"{num_media} images and videos; at most {settings.max_media} are allowed",
            param="messages",
            code="too_many_media",
        )


def _refuse_not_built(ask: ChatRequest) -> None:
    for name, harmless in NOT_BUILT.items():
        value = getattr(ask, name)
        if value is not None and value not in harmless:
            raise BadRequest(f"{name} is not built yet; leave it out", param=name, code="not_built")
