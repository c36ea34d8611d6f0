"""The request of OpenAI's Responses API, and its conversion to a chat completion.

Nothing is stored here: what refers to stored responses, prompts, files or conversations is refused, and so are the
tools that OpenAI runs itself.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.errors import BadRequest
from service.schemas.conversion import FieldNames, chat_request, medium_part, missing, sampling_fields
from service.schemas.media_options import ImageFields, MediaFields
from service.schemas.openai import ChatRequest, Uuid
from service.schemas.sampling import SamplingFields, not_built

# Fields that ask for what this service does not do, unless their value is one of these; and what to do instead.
NOT_BUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), "responses are not stored; send the earlier items in input"),
    "conversation": ((), "conversations are not stored; send the earlier items in input"),
    "background": ((False,), "leave it out and wait, or stream"),
    "prompt": ((), "prompts are not stored; send instructions and input"),
    "context_management": (([],), "leave it out, and shorten input yourself"),
    "moderation": ((), "leave it out"),
    "n": ((1,), "a response is one answer; send several requests"),
}
# Names of a chat completion's fields in this request.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
}
LOGPROBS = "message.output_text.logprobs"  # in `include`


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    text: str
    annotations: Any = None  # of an answer that is sent back; without effect, as are the next ones
    logprobs: Any = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None


class InputText(Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="input_text"):
    pass


class OutputText(Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="output_text"):
    pass


class PlainText(Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="text"):
    pass


class ReasoningText(Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reasoning_text"):
    pass


class SummaryText(Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="summary_text"):
    pass


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


class InputImage(
    ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="input_image"
):
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None  # without effect
    uuid: Uuid | None = None
    prompt_cache_breakpoint: Any = None  # without effect


class InputVideo(
    MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="input_video"
):
    """A video; OpenAI has none."""

    video_url: str | None = None
    uuid: Uuid | None = None


class InputFile(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_file"):
    """Refused: there are no files here."""


class InputAudio(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_audio"):
    """Refused: the model does not hear."""


Part = (
    InputText
    | OutputText
    | PlainText
    | ReasoningText
    | SummaryText
    | Refusal
    | InputImage
    | InputVideo
    | InputFile
    | InputAudio
)


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message, a call of a tool, its output, or reasoning. One without `type` is a message."""

    type: str | None = None
    id: str | None = None
    status: str | None = None
    # a message
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    phase: str | None = None
    # a call and its output
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    # reasoning
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function by its name, or the tools that may be called."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None  # without effect, as are the next: reasoning is sent whole
    generate_summary: str | None = None
    context: Any = None
    mode: Any = None


class Format(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None  # without effect


class ResponsesRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    # Without effect. Nothing is stored, whatever `store` says; what does not fit is never truncated.
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: int | None = None  # counts calls of OpenAI's own tools
    user: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    background_options: Any = None
    access_programs: Any = None
    image: Any = None


def field_names() -> FieldNames:
    return FieldNames(NAMES)


def to_chat(request: ResponsesRequest, names: FieldNames) -> ChatRequest:
    """Convert to a chat completion. names: gets the names of its fields.

    Raises BadRequest for what is not supported.
    """
    for name, (harmless, instead) in NOT_BUILT.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            raise not_built(name, instead)
    fields = sampling_fields(request) | {"messages": _Messages(names).of(request)} | _tools(request, names)
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
        names.add("max_tokens", "max_output_tokens")
    if LOGPROBS in (request.include or ()) or request.top_logprobs:
        fields["logprobs"] = True
    if request.reasoning is not None and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.chat_template_kwargs is not None:
        fields["chat_template_kwargs"] = request.chat_template_kwargs
    text = request.text or TextOptions()
    if text.verbosity not in (None, "medium"):
        fields["verbosity"] = text.verbosity
    if text.format is not None and text.format.type != "text":
        if "response_format" in fields:
            raise BadRequest("response_format and text.format differ; send one", param="response_format")
        fields["response_format"] = _response_format(text.format)
    return chat_request(fields, names)


def echo(request: ResponsesRequest) -> dict[str, Any]:
    """Return the fields of a response that repeat its request."""
    text = request.text or TextOptions()
    reasoning = request.reasoning or Reasoning()
    form = _sent(text.format) if text.format else {"type": "text"}
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": form, "verbosity": text.verbosity or "medium"},
        "tool_choice": _sent(request.tool_choice) or "auto",
        "tools": [{"parameters": None, "strict": None, **_sent(tool)} for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


class _Messages:
    """Collects the messages of a chat completion. Reasoning, text and calls that follow each other are one message."""

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._messages: list[dict[str, Any]] = []
        self._tool_names: dict[str, str] = {}  # of calls, by their ids
        self._turn: dict[str, Any] | None = None  # the assistant's message that may be added to

    def of(self, request: ResponsesRequest) -> list[dict[str, Any]]:
        if request.instructions:
            self._add({"role": "system", "content": request.instructions}, "instructions")
        if isinstance(request.input, str):
            self._add({"role": "user", "content": request.input}, "input")
        else:
            for index, item in enumerate(request.input):
                self._item(item, f"input[{index}]")
        for message in self._messages:
            if "tool_calls" not in message:
                message.setdefault("content", None)  # of reasoning alone
        return self._messages

    def _item(self, item: Item, param: str) -> None:
        match item.type:
            case "message" | None:
                self._message(item, param)
            case "reasoning":
                self._reasoning(item, param)
            case "function_call":
                self._call(item, param)
            case "function_call_output":
                self._output(item, param)
            case "item_reference":
                raise not_built(param, "items are not stored; send the item itself", " with an item_reference")
            case _:
                raise not_built(f"{param}.type", "leave the item out", f" {item.type[:64]!r}")

    def _message(self, item: Item, param: str) -> None:
        if item.role is None:
            raise missing(f"{param}.role")
        if item.content is None:
            raise missing(f"{param}.content")
        if item.role == "assistant":
            turn = self._assistant(param, without=("content", "tool_calls"))
        else:
            turn = {"role": item.role}
            self._add(turn, param)
        self._names.add(f"messages[{len(self._messages) - 1}].content", f"{param}.content")
        turn["content"] = self._content(item.content, f"{param}.content")

    def _reasoning(self, item: Item, param: str) -> None:
        """Add reasoning to the message that follows; the summary where there is no more than that."""
        parts = item.content if isinstance(item.content, list) and item.content else item.summary or ()
        text = "".join(part.text for part in parts if isinstance(part, Text))
        turn = self._assistant(param, without=("content", "tool_calls"))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _call(self, item: Item, param: str) -> None:
        for name in ("call_id", "name", "arguments"):
            if getattr(item, name) is None:
                raise missing(f"{param}.{name}")
        calls = self._assistant(param).setdefault("tool_calls", [])
        at = f"messages[{len(self._messages) - 1}].tool_calls[{len(calls)}]"
        self._names.add(at, param)
        self._names.add(f"{at}.function", param)
        self._names.add(f"{at}.id", f"{param}.call_id")
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})
        self._tool_names[str(item.call_id)] = str(item.name)

    def _output(self, item: Item, param: str) -> None:
        for name in ("call_id", "output"):
            if getattr(item, name) is None:
                raise missing(f"{param}.{name}")
        message: dict[str, Any] = {"role": "tool", "tool_call_id": item.call_id}
        if (tool := self._tool_names.get(str(item.call_id))) is not None:
            message["name"] = tool
        self._add(message, param)
        self._names.add(f"messages[{len(self._messages) - 1}].content", f"{param}.output")
        self._names.add(f"messages[{len(self._messages) - 1}].tool_call_id", f"{param}.call_id")
        message["content"] = self._content(item.output or "", f"{param}.output")

    def _assistant(self, param: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the assistant's open message, or a new one where there is none or one of these fields is in it."""
        if self._turn is None or any(name in self._turn for name in without):
            turn: dict[str, Any] = {"role": "assistant"}
            self._add(turn, param)
            self._turn = turn
        return self._turn

    def _add(self, message: dict[str, Any], param: str) -> None:
        self._turn = None
        self._names.add(f"messages[{len(self._messages)}]", param)
        if param in ("instructions", "input"):
            self._names.add(f"messages[{len(self._messages)}].content", param)
        self._messages.append(message)

    def _content(self, content: str | list[Part], param: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        parts = []
        for index, part in enumerate(content):
            self._names.add(f"messages[{len(self._messages) - 1}].content[{index}]", f"{param}[{index}]")
            parts.append(_part(part, f"{param}[{index}]"))
        return parts


def _part(part: Part, param: str) -> dict[str, Any]:
    """Convert a part of a message's content."""
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Refusal():
            return {"type": "text", "text": part.refusal}
        case InputImage():
            if part.file_id is not None:
                raise not_built(f"{param}.file_id", "files are not stored; send the image in image_url")
            if part.image_url is None and not part.uuid:
                raise missing(f"{param}.image_url")
            url = {"url": part.image_url} | ({} if part.detail is None else {"detail": part.detail})
            return medium_part("image", url, part)
        case InputVideo():
            if part.video_url is None and not part.uuid:
                raise missing(f"{param}.video_url")
            return medium_part("video", {"url": part.video_url}, part)
        case InputFile():
            raise not_built(f"{param}.type", "send pages as images", " 'input_file'")
        case InputAudio():
            raise not_built(f"{param}.type", "send text, images or videos", " 'input_audio'")


def _tools(request: ResponsesRequest, names: FieldNames) -> dict[str, Any]:
    """Convert tools, the choice among them, and whether several may be called."""
    fields: dict[str, Any] = {}
    tools = request.tools or []
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        if tool.type != "function":
            raise not_built(f"{param}.type", "only tools of type 'function' are", f" {tool.type[:64]!r}")
        if tool.name is None:
            raise missing(f"{param}.name")
        names.add(f"{param}.function", param)
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        if choice.type == "function":
            if choice.name is None:
                raise missing("tool_choice.name")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice.type == "allowed_tools":
            fields["tool_choice"] = _allowed(choice, names)
        else:
            raise not_built("tool_choice.type", "send 'function' or 'allowed_tools'", f" {choice.type[:64]!r}")
    elif choice is not None:
        fields["tool_choice"] = choice
    if tools:
        fields["tools"] = [{"type": "function", "function": _sent(tool, without=("type",))} for tool in tools]
    if request.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    return fields


def _allowed(choice: ToolChoice, names: FieldNames) -> dict[str, Any]:
    """Convert the tools that may be called."""
    tools = []
    for index, tool in enumerate(choice.tools or ()):
        param = f"tool_choice.tools[{index}]"
        names.add(f"tool_choice.allowed_tools.tools[{index}].function", param)
        if tool.type != "function":
            raise not_built(f"{param}.type", "only tools of type 'function' are", f" {tool.type[:64]!r}")
        if tool.name is None:
            raise missing(f"{param}.name")
        tools.append({"type": "function", "function": {"name": tool.name}})
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": tools}}


def _response_format(form: Format) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema is None:
        raise missing("text.format.schema")
    return {"type": "json_schema", "json_schema": _sent(form, without=("type",))}


def _sent(struct: msgspec.Struct | str | None, without: tuple[str, ...] = ()) -> Any:
    """Return what was sent: a struct's fields that are not None."""
    if not isinstance(struct, msgspec.Struct):
        return struct
    fields = msgspec.to_builtins(struct)
    return {name: value for name, value in fields.items() if value is not None and name not in without}
