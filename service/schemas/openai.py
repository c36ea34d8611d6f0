"""The request of an OpenAI chat completion, and its checks.

Each field is supported, refused unless its value means "none" (NOT_BUILT), or accepted without effect (IGNORED).
Unknown fields are ignored with a warning (service/unknown_fields.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import msgspec

from model.request import EngineInfo, ToolCall
from service.errors import BadRequest
from service.schemas import sampling
from service.schemas.media_options import ImageFields, MediaFields, MediaOptions
from service.schemas.tools import ToolFields
from service.settings import Settings

# By field, the values that ask for nothing.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    # vLLM's
    "best_of": (1,),
    "echo": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template": ("",),
    **sampling.NOT_BUILT,
}
# The same for messages.
NOT_BUILT_IN_MESSAGES: dict[str, tuple[Any, ...]] = {"audio": (), "prefix": (False,), "partial": (False,)}
# Labels and routing hints of OpenAI's platform and others, which do not change an answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *("length_penalty", "spaces_between_special_tokens", "stream_interval"),
)
Uuid = Annotated[str, msgspec.Meta(max_length=256)]


class ImageUrl(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str | None = None
    detail: Any = None  # without effect: the model's processor decides on the size


class VideoUrl(MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str | None = None
    detail: Any = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    cache_control: Any = None  # without effect, as is the next, here and below
    prompt_cache_breakpoint: Any = None


class ImagePart(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="image_url"):
    kind: ClassVar[Literal["image"]] = "image"

    image_url: ImageUrl | str | None = None  # clients of Ollama and vLLM may send the URL alone
    uuid: Uuid | None = None
    modalities: Any = None  # SGLang's, without effect: the number of images tells how they are read
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @property
    def url(self) -> str | None:
        return _url(self.image_url)


class VideoPart(MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="video_url"):
    kind: ClassVar[Literal["video"]] = "video"

    video_url: VideoUrl | str | None = None
    uuid: Uuid | None = None
    modalities: Any = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @property
    def url(self) -> str | None:
        return _url(self.video_url)


class AudioPart(msgspec.Struct, frozen=True, tag_field="type", tag="input_audio"):
    """A kind of part that is refused by its name, as are the next ones."""


class AudioUrlPart(msgspec.Struct, frozen=True, tag_field="type", tag="audio_url"):
    pass


class FilePart(msgspec.Struct, frozen=True, tag_field="type", tag="file"):
    pass


Part = TextPart | ImagePart | VideoPart
RefusedPart = AudioPart | AudioUrlPart | FilePart


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] | str | None = None  # JSON text; Ollama's clients send the object
    parsed_arguments: Any = None  # without effect: openai's parse helper leaves it
    provider_specific_fields: Any = None  # without effect, here and below: LiteLLM leaves them


class CallField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of a tool in a message of the history."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None  # without effect: left by clients that put streams together
    provider_specific_fields: Any = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part | RefusedPart] | msgspec.UnsetType | None = msgspec.UNSET
    name: str | None = None
    tool_calls: list[CallField] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as vLLM and OpenRouter name it
    refusal: str | None = None  # what an assistant's message without content says
    audio: Any = None
    prefix: Any = None
    partial: Any = None
    # Without effect: labels, and what only answers have.
    id: Any = None
    annotations: Any = None
    parsed: Any = None
    provider_specific_fields: Any = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    def parts(self) -> list[Part]:
        """The content as a list of parts. Call it only after `check`."""
        if isinstance(self.content, str):
            return [TextPart(self.content)]
        if not self.content and self.refusal:
            return [TextPart(self.refusal)]
        return cast("list[Part]", self.content or [])


class ChatRequest(ToolFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None

    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    best_of: Any = None
    echo: Any = None
    add_special_tokens: Any = None
    documents: Any = None
    chat_template: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    length_penalty: Any = None
    spaces_between_special_tokens: Any = None
    stream_interval: Any = None

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def check(request: ChatRequest, settings: Settings) -> None:
    """Raise BadRequest for whatever is invalid before media are decoded and the prompt is tokenized."""
    sampling.check_model(request.model, settings)
    sampling.refuse_not_built(request, NOT_BUILT)
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
        num_chars += len(reasoning(message) or "")
        num_chars += sum(len(call.name) + len(call.arguments) for call in calls(message, f"messages[{index}]"))
        for number, part in enumerate(message.parts()):
            if isinstance(part, TextPart):
                num_chars += len(part.text)
                continue
            num_media += 1
            if part.url is None and not part.uuid:
                param = f"messages[{index}].content[{number}].{part.kind}_url"
                raise BadRequest(f"{param} is missing", param=param, code="missing_field")
    sampling.check_prompt_chars(num_chars, settings, param="messages")
    if num_media > settings.max_media:
        raise BadRequest(
            f"{num_media} images and videos; at most {settings.max_media} are allowed",
            param="messages",
            code="too_many_media",
        )


def reasoning(message: ChatMessage) -> str | None:
    """Return what the assistant thought before this message of the history."""
    return message.reasoning_content or message.reasoning or None


def calls(message: ChatMessage, path: str) -> tuple[ToolCall, ...]:
    """Return the calls of tools in a message. path: of the message in the request. Raises BadRequest."""
    if message.function_call is not None:
        return (ToolCall("", message.function_call.name, _arguments(message.function_call, f"{path}.function_call")),)
    return tuple(
        ToolCall(call.id or "", call.function.name, _arguments(call.function, f"{path}.tool_calls[{index}].function"))
        for index, call in enumerate(message.tool_calls or ())
    )


def _arguments(function: FunctionCall, path: str) -> str:
    """Return the arguments of a call as the text of a JSON object."""
    arguments = function.arguments or {}
    if isinstance(arguments, str):
        try:
            msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError):
            param = f"{path}.arguments"
            raise BadRequest(f"{param} is not a JSON object", param=param) from None
        return arguments
    return msgspec.json.encode(arguments).decode()


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
            if isinstance(url := part.image_url if isinstance(part, ImagePart) else part.video_url, ImageFields):
                at = f"{path}{part.kind}_url."
                own = sampling.check_media_options(url, settings, info, kind=part.kind, path=at).over(own)
            parts.append(own.over(general))
    return ChatMediaOptions(general, tuple(parts))


def _url(value: ImageUrl | VideoUrl | str | None) -> str | None:
    """Return the URL of a part, or None where it is absent, null or empty."""
    return (value if isinstance(value, str) or value is None else value.url) or None


def _check_message(message: ChatMessage, path: str) -> None:
    """Raise BadRequest for a message that has what is not supported, or no content."""
    sampling.refuse_not_built(message, NOT_BUILT_IN_MESSAGES, f"{path}.")
    if message.content is msgspec.UNSET and not (message.tool_calls or message.function_call or message.refusal):
        raise BadRequest(f"{path}.content is missing", param=f"{path}.content", code="missing_field")
    if message.role != "assistant":
        for name in ("tool_calls", "function_call"):
            if getattr(message, name):
                raise BadRequest(f"{path}.{name} belongs in an assistant's message", param=f"{path}.{name}")
    for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if isinstance(part, RefusedPart):
            kind = type(part).__struct_config__.tag
            raise sampling.not_built(f"{path}.content[{index}].type", "send text, images or videos", value=f" {kind!r}")
