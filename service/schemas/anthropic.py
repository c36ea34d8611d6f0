"""The request of Anthropic's Messages API, and its conversion to a chat completion."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.errors import BadRequest, ServiceError
from service.schemas.conversion import FieldNames, chat_request, medium_part, missing, sampling_fields
from service.schemas.media_options import ImageFields, MediaFields
from service.schemas.openai import ChatRequest, Uuid
from service.schemas.sampling import SamplingFields, not_built
from service.settings import Settings

# Fields that ask for what this service does not do, unless their value is one of these; and what to do instead.
NOT_BUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "container": ((), "leave it out"),
    "mcp_servers": (([],), "call their tools yourself, and send them in tools"),
    "n": ((1,), "a message is one answer; send several requests"),
}
# Names of a chat completion's fields in this request.
NAMES = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "tool_choice.function": "tool_choice",
}

THINKS = "medium"  # effort, where thinking is on and nothing is said of it
ERROR_TYPES = {  # by status
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Base64Source(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="base64"
):
    media_type: str
    data: str


class UrlSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="url"):
    url: str


class TextSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    data: str
    media_type: str | None = None


class FileSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="file"):
    """Refused: there are no files here."""

    file_id: str


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    citations: Any = None  # of an answer that is sent back; without effect
    cache_control: Any = None  # without effect, here and below: prompts are always cached


class ImageBlock(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="image"):
    source: Base64Source | UrlSource | FileSource | None = None
    uuid: Uuid | None = None
    transformations: Any = None  # without effect: images of any allowed size are scaled as the model needs them
    cache_control: Any = None


class VideoBlock(MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="video"):
    """A video; Anthropic has none."""

    source: Base64Source | UrlSource | FileSource | None = None
    uuid: Uuid | None = None
    cache_control: Any = None


class DocumentBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="document"
):
    """A document, of which plain text alone is accepted."""

    source: Base64Source | UrlSource | TextSource | FileSource
    title: str | None = None
    context: str | None = None
    citations: Any = None  # without effect
    cache_control: Any = None


class ToolUseBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"
):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None  # without effect
    cache_control: Any = None


class ToolResultBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"
):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | VideoBlock | DocumentBlock] | None = None
    is_error: bool | None = None  # without effect: the content says so
    cache_control: Any = None


class ThinkingBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"
):
    thinking: str
    signature: str | None = None  # without effect


class RedactedThinkingBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="redacted_thinking"
):
    """Thinking that only Anthropic can read; it is left out."""

    data: str | None = None


Block = (
    TextBlock
    | ImageBlock
    | VideoBlock
    | DocumentBlock
    | ToolUseBlock
    | ToolResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
)


class InputMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    type: str | None = None  # "custom", as without it
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    input_examples: Any = None  # without effect, as are the next
    cache_control: Any = None
    eager_input_streaming: Any = None
    defer_loading: Any = None
    allowed_callers: Any = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None  # of a tool
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the model thinks before it answers, where its chat template has a switch for that."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None  # without effect: thinking counts as part of max_tokens
    display: str | None = None  # "omitted": it is not sent. It is never summarized


class JsonFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: str | None = None
    format: JsonFormat | None = None


class MessagesRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/messages."""

    messages: list[InputMessage]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # an earlier name of `output_config.format`
    chat_template_kwargs: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    container: Any = None
    mcp_servers: Any = None
    thread: Any = None

    metadata: Any = None  # without effect, as are the next
    cache_control: Any = None
    service_tier: Any = None
    inference_geo: Any = None
    speed: Any = None
    diagnostics: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


def error_envelope(error: ServiceError, request_id: str | None) -> dict[str, Any]:
    """Return an error as Anthropic's API sends it, with our `param` and `code` beside its fields."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    fields: dict[str, Any] = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    fields["details"] = {"error_code": error.code}  # where the official client looks for it
    return {"type": "error", "error": fields, "request_id": request_id}


def field_names() -> FieldNames:
    return FieldNames(NAMES)


def to_chat(request: MessagesRequest, names: FieldNames, settings: Settings) -> ChatRequest:
    """Convert to a chat completion. names: gets the names of its fields. Raises BadRequest for what is not supported.

    `max_tokens`, which clients must send, is lowered to what the settings allow.
    """
    for name, (harmless, instead) in NOT_BUILT.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            raise not_built(name, instead)
    if request.thread is not None:
        # The official client's tool runner tries it, knows this code, and goes on with whole conversations.
        message = "thread is not supported: messages are not stored; send the whole conversation in messages"
        raise BadRequest(message, param="thread", code="thread_unsupported_request")
    fields = sampling_fields(request) | {"messages": _Messages(names).of(request)} | _tools(request, names)
    if request.max_tokens is not None:
        fields["max_tokens"] = min(request.max_tokens, settings.max_new_tokens)
    if request.stop_sequences is not None:
        fields["stop"] = request.stop_sequences
    if request.stream:  # the first event has the length of the prompt
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    output = request.output_config or OutputConfig()
    if (form := output.format or request.output_format) is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema}}
    if (effort := _effort(request.thinking, output.effort)) is not None:
        fields["reasoning_effort"] = effort
    if request.thinking is not None and request.thinking.display == "omitted":
        fields["include_reasoning"] = False
    if request.chat_template_kwargs is not None:
        fields["chat_template_kwargs"] = request.chat_template_kwargs
    if _goes_on(fields["messages"][-1:]):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat_request(fields, names)


def _effort(thinking: Thinking | None, effort: str | None) -> str | None:
    """Return how much the model is to think, as chats have it; None where the chat template decides."""
    if thinking is None:
        return effort
    return "none" if thinking.type == "disabled" else effort or THINKS


def _goes_on(last: list[dict[str, Any]]) -> bool:
    """Return whether the answer continues the last message: an assistant's own text."""
    return any(
        message["role"] == "assistant" and message["content"] and not message.get("tool_calls") for message in last
    )


class _Messages:
    """Collects the messages of a chat completion."""

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._messages: list[dict[str, Any]] = []
        self._tool_names: dict[str, str] = {}  # of calls, by their ids

    def of(self, request: MessagesRequest) -> list[dict[str, Any]]:
        if request.system:
            self._message("system", request.system, "system")
        for index, message in enumerate(request.messages):
            param = f"messages[{index}]"
            if isinstance(message.content, str) or message.role == "system":
                self._message(message.role, message.content, f"{param}.content", param)
            elif message.role == "user":
                self._user(message.content, param)
            else:
                self._assistant(message.content, param)
        return self._messages

    def _message(self, role: str, content: Any, param: str, message_param: str | None = None) -> None:
        """Add a message of text and media alone."""
        self._add({"role": role}, message_param or param)
        self._names.add(f"{self._last}.content", param)
        if isinstance(content, str):
            self._messages[-1]["content"] = content
        else:
            for number, block in enumerate(content):
                self._append(block, f"{param}[{number}]")

    def _user(self, blocks: list[Block], param: str) -> None:
        """Add a user's message; results of tools in it become messages of their own, where they stand."""
        open_ = False
        for number, block in enumerate(blocks):
            at = f"{param}.content[{number}]"
            if isinstance(block, ToolResultBlock):
                self._result(block, at)
                open_ = False
                continue
            if not open_:
                self._add({"role": "user"}, param)
                open_ = True
            self._append(block, at)
        if not blocks:
            self._add({"role": "user", "content": []}, param)

    def _result(self, block: ToolResultBlock, param: str) -> None:
        message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content or ""}
        if (name := self._tool_names.get(block.tool_use_id)) is not None:
            message["name"] = name
        self._add(message, param)
        self._names.add(f"{self._last}.tool_call_id", f"{param}.tool_use_id")
        if isinstance(block.content, list):
            message["content"] = []
            for number, part in enumerate(block.content):
                self._append(part, f"{param}.content[{number}]")

    def _assistant(self, blocks: list[Block], param: str) -> None:
        """Add an assistant's message: its thinking, text and calls."""
        message: dict[str, Any] = {"role": "assistant", "content": None}
        self._add(message, param)
        for number, block in enumerate(blocks):
            at = f"{param}.content[{number}]"
            match block:
                case ThinkingBlock():
                    message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
                case RedactedThinkingBlock():
                    pass
                case ToolUseBlock():
                    self._call(message.setdefault("tool_calls", []), block, at)
                case _:
                    self._append(block, at)

    def _call(self, calls: list[dict[str, Any]], block: ToolUseBlock, param: str) -> None:
        at = f"{self._last}.tool_calls[{len(calls)}]"
        self._names.add(at, param)
        self._names.add(f"{at}.function", param)
        self._names.add(f"{at}.function.arguments", f"{param}.input")
        arguments = msgspec.json.encode(block.input).decode()
        calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
        self._tool_names[block.id] = block.name

    def _append(self, block: Block, param: str) -> None:
        """Append a text or medium to the last message."""
        message = self._messages[-1]
        content = message["content"] = message.get("content") or []
        self._names.add(f"{self._last}.content[{len(content)}]", param)
        content.append(_part(block, param))

    def _add(self, message: dict[str, Any], param: str) -> None:
        self._messages.append(message)
        self._names.add(self._last, param)

    @property
    def _last(self) -> str:
        """The name of the last message in the chat completion."""
        return f"messages[{len(self._messages) - 1}]"


def _part(block: Block, param: str) -> dict[str, Any]:
    """Convert a text or medium to a part of a message's content."""
    match block:
        case TextBlock():
            return {"type": "text", "text": block.text}
        case ImageBlock():
            return medium_part("image", _url(block, param), block)
        case VideoBlock():
            return medium_part("video", _url(block, param), block)
        case DocumentBlock():
            return {"type": "text", "text": _document(block, param)}
        case _:
            kind = block.__struct_config__.tag
            raise not_built(f"{param}.type", "leave it out of messages of this role", f" {kind!r}")


def _url(block: ImageBlock | VideoBlock, param: str) -> dict[str, Any] | None:
    match block.source:
        case Base64Source(media_type=media_type, data=data):
            return {"url": f"data:{media_type};base64,{data}"}
        case UrlSource(url=url):
            return {"url": url}
        case None:
            if not block.uuid:
                raise missing(f"{param}.source")
            return None
        case FileSource():
            raise not_built(f"{param}.source.type", "files are not stored; send 'base64' or 'url'", " 'file'")


def _document(block: DocumentBlock, param: str) -> str:
    if not isinstance(block.source, TextSource):
        raise not_built(f"{param}.source", "send pages as images, or the text in a source of type 'text'")
    return "\n\n".join(filter(None, (block.title, block.context, block.source.data)))


def _tools(request: MessagesRequest, names: FieldNames) -> dict[str, Any]:
    """Convert tools, the choice among them, and whether several may be called."""
    fields: dict[str, Any] = {}
    for index, tool in enumerate(request.tools or ()):
        param = f"tools[{index}]"
        if tool.type not in (None, "custom"):
            raise not_built(f"{param}.type", "only tools with an input_schema of their own are", f" {tool.type[:64]!r}")
        if tool.name is None:
            raise missing(f"{param}.name")
        if tool.input_schema is None:
            raise missing(f"{param}.input_schema")
        names.add(f"{param}.function", param)
        names.add(f"{param}.function.parameters", f"{param}.input_schema")
        function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
        function = {name: value for name, value in function.items() if value is not None}
        fields.setdefault("tools", []).append({"type": "function", "function": function})
    if (choice := request.tool_choice) is None:
        return fields
    if choice.type == "tool":
        if choice.name is None:
            raise missing("tool_choice.name")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = "required" if choice.type == "any" else choice.type
    if choice.disable_parallel_tool_use is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields
