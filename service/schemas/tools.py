"""The fields of a chat completion about tools, reasoning and the chat template, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from model.request import ChatFormat, TemplateOptions
from service.errors import BadRequest, TooLarge
from service.schemas.sampling import EngineFields
from service.schemas.structured import check_depth
from service.settings import Settings

Choice = Literal["auto", "none", "required"]
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class ToolFields(EngineFields, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Fields that ChatRequest has beside those of messages; None means the default."""

    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None  # OpenAI's former name of tools, and of the choice among them
    function_call: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's, as are the next ones
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: a JSON schema of an object."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool

    @property
    def shown(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    tools: those that may be called; named: the one that must be; parallel: whether several calls may be made at once;
    as_functions: they came in OpenAI's former way, as `functions`, and a call is answered so.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    named: bool = False
    parallel: bool = True
    as_functions: bool = False

    @property
    def param(self) -> str:
        """The field that errors name."""
        return "functions" if self.as_functions else "tools"

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of the parameters, by name."""
        return {tool.name: tool.parameters for tool in self.tools}


def read(fields: ToolFields, settings: Settings) -> Tools:
    """Check tools and the choice among them. Raises BadRequest, and TooLarge for schemas of too many bytes."""
    former = bool(fields.functions)
    if former and (fields.tools or fields.tool_choice is not None):
        raise BadRequest("functions are the former name of tools; send tools and tool_choice alone", param="functions")
    field = "functions" if former else "tools"
    sent = (fields.functions if former else fields.tools) or []
    if len(sent) > settings.max_tools:
        raise BadRequest(f"{field}: at most {settings.max_tools} are allowed", param=field)
    tools: list[Tool] = []
    for index, function in enumerate(sent):
        path = f"{field}[{index}]"
        if not former:
            path, function = f"{path}.function", _function_of(function, path)
        tool = _function(function, path, settings)
        if tool.name in (other.name for other in tools):
            raise BadRequest(f"{path}.name: there are two {field} with the name {tool.name!r}", param=f"{path}.name")
        tools.append(tool)
    names = [tool.name for tool in tools]
    size = sum(len(msgspec.json.encode(tool.shown)) for tool in tools)
    if size > settings.max_tools_bytes:
        raise TooLarge(f"{field} have {size} bytes; at most {settings.max_tools_bytes} are allowed", param=field)
    parallel = fields.parallel_tool_calls is not False and not former
    choice, allowed = _choice_of_function(fields.function_call, names if former else [])
    if not former:
        choice, allowed = _choice(fields.tool_choice, names)
    if not tools or choice == "none":
        return Tools(choice="none")
    kept = tuple(tool for tool in tools if allowed is None or tool.name in allowed)
    named = allowed is not None and choice == "required" and len(allowed) == 1
    return Tools(kept, choice, named, parallel and not named, former)


def template_options(fields: ToolFields, tools: Tools, chat: ChatFormat) -> TemplateOptions:
    """Return what the chat template gets beside the messages. Raises BadRequest for what the model is not served with,
    and for fields that contradict."""
    if tools.tools and not chat.calls:
        message = f"{tools.param}: this model is served without tools; leave them out"
        raise BadRequest(message, param=tools.param, code="not_supported")
    goes_on = bool(fields.continue_final_message)
    if goes_on and fields.add_generation_prompt:
        raise BadRequest(
            "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
        )
    variables = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", fields.reasoning_effort)
        if chat.thinking:
            variables.setdefault(chat.thinking, fields.reasoning_effort != "none")
    return TemplateOptions(
        tools=_text([tool.shown for tool in tools.tools]) if tools.tools else "",
        variables=_text(variables) if variables else "",
        continue_final_message=goes_on,
        add_generation_prompt=fields.add_generation_prompt is not False,
    )


Thinking = Literal["open", "possible", "none"]


def thinking(options: TemplateOptions, chat: ChatFormat) -> Thinking:
    """Return how an answer begins: within the reasoning that the prompt opened, maybe with reasoning, or without."""
    if chat.reasoning is None or options.continue_final_message or not options.add_generation_prompt:
        return "none" if chat.reasoning is None else "possible"
    variables = msgspec.json.decode(options.variables) if options.variables else {}
    switch = variables.get(chat.thinking) if chat.thinking else None
    if switch is None:
        return "open" if chat.thinks else "possible"
    if switch:
        return "open" if chat.thinks_on else "possible"
    return "open" if chat.thinks_off else "none"


def _function_of(value: Any, path: str) -> dict[str, Any]:
    """Return the function that a tool is."""
    kind = _member(value, "type", path, str, "function")
    if kind != "function":
        param = f"{path}.type"
        raise BadRequest(
            f"{param} {kind[:64]!r} is not supported yet; only 'function' is", param=param, code="not_built"
        )
    function: dict[str, Any] = _member(value, "function", path, dict)
    return function


def _function(function: Any, path: str, settings: Settings) -> Tool:
    """Check one function."""
    name = _member(function, "name", path, str)
    if not NAME.match(name):
        param = f"{path}.name"
        raise BadRequest(
            f"{param} must have 1 to 64 letters, digits, '_', '-' and '.'; it is {name[:80]!r}", param=param
        )
    parameters = _member(function, "parameters", path, dict, NO_PARAMETERS) or NO_PARAMETERS
    param = f"{path}.parameters"
    check_depth(parameters, param, settings)
    if parameters.get("type", "object") != "object":
        raise BadRequest(f"{param}.type must be 'object'", param=f"{param}.type")
    if not isinstance(parameters.get("properties", {}), dict):
        raise BadRequest(f"{param}.properties must be an object", param=f"{param}.properties")
    return Tool(
        name,
        _member(function, "description", path, str, "") or None,
        parameters if "type" in parameters else {"type": "object", **parameters},
        _member(function, "strict", path, bool, False),
    )


def _choice(value: Any, names: list[str]) -> tuple[Choice, list[str] | None]:
    """Return the choice, and the names of the tools that may be called; None for all."""
    param = "tool_choice"
    if value is None:
        return "auto", None
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise BadRequest(
                f"{param} {value[:64]!r} is unknown; send 'auto', 'none', 'required' or a tool's name as an object",
                param=param,
            )
        if value == "required" and not names:
            raise BadRequest(f"{param} 'required' needs tools", param=param)
        return _as_choice(value), None
    kind = _member(value, "type", param, str, "function")
    if kind == "function":
        path = f"{param}.function.name"
        name = _member(_member(value, "function", param, dict), "name", f"{param}.function", str)
        if name not in names:
            raise BadRequest(f"{path} {name[:64]!r} is none of the tools", param=path)
        return "required", [name]
    if kind != "allowed_tools":
        raise BadRequest(f"{param}.type {kind[:64]!r} is not supported yet", param=f"{param}.type", code="not_built")
    allowed = _member(value, "allowed_tools", param, dict)
    path = f"{param}.allowed_tools"
    mode = _member(allowed, "mode", path, str, "auto")
    if mode not in ("auto", "required"):
        raise BadRequest(f"{path}.mode must be 'auto' or 'required'", param=f"{path}.mode")
    found: list[str] = []
    for index, tool in enumerate(_member(allowed, "tools", path, list)):
        at = f"{path}.tools[{index}].function"
        found.append(_member(_member(tool, "function", at.rpartition(".")[0], dict), "name", at, str))
        if found[-1] not in names:
            raise BadRequest(f"{at}.name {found[-1][:64]!r} is none of the tools", param=f"{at}.name")
    return _as_choice(mode), found


def _choice_of_function(value: Any, names: list[str]) -> tuple[Choice, list[str] | None]:
    """The same of OpenAI's former `function_call`."""
    param = "function_call"
    if value in (None, "auto", "none"):
        return _as_choice(value or "auto"), None
    name = _member(value, "name", param, str)
    if name not in names:
        raise BadRequest(f"{param}.name {name[:64]!r} is none of the functions", param=f"{param}.name")
    return "required", [name]


def _as_choice(value: str) -> Choice:
    return "none" if value == "none" else "required" if value == "required" else "auto"


def _member(value: Any, name: str, path: str, kind: type, default: Any = None) -> Any:
    """Return a member of an object, or the default where it is absent or null. Raises BadRequest for another type, and
    for one that is missing without a default."""
    if not isinstance(value, dict):
        raise BadRequest(f"{path} must be an object", param=path)
    found = value.get(name)
    if found is None and default is not None:
        return default
    param = f"{path}.{name}"
    if found is None:
        raise BadRequest(f"{param} is missing", param=param, code="missing_field")
    if not isinstance(found, kind):
        words = {str: "a text", dict: "an object", list: "a list", bool: "true or false"}
        raise BadRequest(f"{param} must be {words[kind]}", param=param)
    return found


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
