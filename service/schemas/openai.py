"""The request of an OpenAI chat completion, and its checks.

Each field is supported, refused unless its value means "none" (NOT_BUILT), or accepted without effect (IGNORED).
Unknown fields are refused with 400.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec

from model.request import EngineInfo
from service.errors import BadRequest
from service.schemas import sampling
from service.schemas.media_options import ImageFields, MediaFields, MediaOptions
from service.schemas.sampling import SamplingFields
from service.settings import Settings

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
# The same for messages: fields of conversations with tools, audio or refusals.
NOT_BUILT_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
}
# Labels and routing hints of OpenAI's platform, which do not change an answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls"),
)


class Url(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: str | None = None  # without effect: the target has one image size


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    prompt_cache_breakpoint: Any = None  # without effect, here and below


class ImagePart(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="image_url"):
    kind: ClassVar[Literal["image"]] = "image"

    image_url: Url | str  # clients of Ollama and vLLM may send the URL alone
    prompt_cache_breakpoint: Any = None

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class VideoPart(MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="video_url"):
    kind: ClassVar[Literal["video"]] = "video"

    video_url: Url | str
    prompt_cache_breakpoint: Any = None

    @property
    def url(self) -> str:
        return self.video_url if isinstance(self.video_url, str) else self.video_url.url


Part = TextPart | ImagePart | VideoPart


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]  # the last two: not built
    content: str | list[Part] | msgspec.UnsetType | None = msgspec.UNSET
    name: str | None = None
    # A response may be sent back as it came: these fields are in it, and empty.
    refusal: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: list[Any] | None = None

    def parts(self) -> list[Part]:
        """The content as a list of parts."""
        return [TextPart(self.content)] if isinstance(self.content, str) else self.content or []


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far, in every chunk
    include_obfuscation: bool | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    parallel_tool_calls: Any = None

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def check(request: ChatRequest, settings: Settings) -> None:
    """Raise BadRequest for whatever is invalid before media are decoded and the prompt is tokenized."""
    sampling.check_model(request.model, settings)
    _refuse_not_built(request, NOT_BUILT)
    if request.max_completion_tokens is not None:
        if request.max_completion_tokens < 1:
            raise BadRequest("max_completion_tokens must be at least 1", param="max_completion_tokens")
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise BadRequest("max_tokens and max_completion_tokens differ; send one", param="max_tokens")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options is for streams; set stream", param="stream_options")
    if not 1 <= len(request.messages) <= settings.max_messages:
        raise BadRequest(f"there must be 1 to {settings.max_messages} messages", param="messages")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    if sum(len(message.parts()) for message in request.messages) > settings.max_parts:
        raise BadRequest(f"at most {settings.max_parts} texts, images and videos are allowed", param="messages")
    num_chars = num_media = 0
    for index, message in enumerate(request.messages):
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


@dataclass(frozen=True)
class ChatMediaOptions:
    """request: for all media; parts: for each medium in its turn, the request's included."""

    request: MediaOptions
    parts: tuple[MediaOptions, ...]


def media_options(request: ChatRequest, settings: Settings, info: EngineInfo | None) -> ChatMediaOptions:
    """Return what is wanted of the media. info: None before it is known. Raises BadRequest."""
    general = sampling.check_media_options(request, settings, info)
    parts: list[MediaOptions] = []
    for index, message in enumerate(request.messages):
        for number, part in enumerate(message.parts()):
            if isinstance(part, TextPart):
                continue
            path = f"messages[{index}].content[{number}]."
            own = sampling.check_media_options(part, settings, info, kind=part.kind, path=path)
            parts.append(own.over(general))
    return ChatMediaOptions(general, tuple(parts))


def _refuse_not_built(struct: ChatRequest | ChatMessage, fields: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raise BadRequest for a field with a value that is not one of those that mean "none"."""
    for name, harmless in fields.items():
        value = getattr(struct, name)
        if value is not None and value not in harmless:
            raise _not_built(f"{prefix}{name}", "leave it out")


def _check_message(message: ChatMessage, param: str) -> None:
    """Raise BadRequest for an unsupported kind of message, or one without content."""
    if message.role in ("tool", "function"):
        raise _not_built(f"{param}.role", "send the tool's result as a user's text", value=f" {message.role!r}")
    _refuse_not_built(message, NOT_BUILT_IN_MESSAGES, f"{param}.")
    if message.content is None:
        raise _not_built(f"{param}.content", 'send "" for an empty message', value=" null")
    if message.content is msgspec.UNSET:
        raise BadRequest(f"{param}.content is missing", param=f"{param}.content", code="missing_field")


def _not_built(param: str, instead: str, value: str = "") -> BadRequest:
    return BadRequest(f"{param}{value} is not supported yet; {instead}", param=param, code="not_built")
