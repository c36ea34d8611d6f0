"""Writes grammars of whole answers: reasoning, tool calls and text in the order and notation of the model.

A forced call has a name among the tools and arguments that match the tool's schema. Where a model's own notation cannot
be forced, calls are Hermes'; the parser reads both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from model.request import JSON_OPTIONS, ChatFormat, Grammar
from service.schemas.json_schema import named_only
from service.schemas.tools import Thinking, Tool, Tools

TEXT = r"/(.|\n)*/"
LEXEMES = re.compile(r'"[^"]*"|[{}]|[^"{}]+|"')  # texts are cut as JSON is, so that JSON may stand in their place


@dataclass(frozen=True)
class Notation:
    """How calls are written: before each, between name and arguments, behind each, between two, and around all."""

    begin: str
    middle: str
    end: str
    between: str = ""
    before: str = ""
    behind: str = ""


HERMES = Notation('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")
NOTATIONS = {
    "llama3_json": Notation('{"name": "', '", "parameters": ', "}", "; "),
    "mistral": Notation('{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]"),
    "pythonic": Notation("", "(", ")", ", ", "[", "]"),
}
# What the schema of a call in Python's notation may say beside its properties, which become arguments.
OF_PYTHONIC = {
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions"),
    *("$schema", "title", "description", "x-guidance"),
}
MISTRAL_NEW = Notation("[TOOL_CALLS]", "[ARGS]", "")


def of_answer(chat: ChatFormat, tools: Tools, form: Grammar | None, thinking: Thinking) -> Grammar | None:
    """Return the grammar of an answer; None if it may be any text.

    form: what the content must match, if the request says so. Where both are possible, the answer is either calls or
    content of this form. Strict tools bind calls of the model's own accord, where they are JSON in its notation.
    """
    if tools.choice == "required":
        return _Writer(chat).written(tools, "calls", None, thinking)
    strict = any(tool.strict for tool in tools.tools) and (chat.calls == "hermes" or _is_own(chat, tools.tools))
    if form is not None:
        if tools.tools:
            return _Writer(chat).written(tools, "calls | form", form, thinking)
        if thinking != "none" and chat.reasoning is not None:
            return _Writer(chat).written(tools, "form", form, thinking)
        return form
    return _Writer(chat).written(tools, "free", None, thinking) if strict else None


class _Writer:
    """Writes one grammar in Lark's notation."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._tokens = dict(chat.tokens)
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []  # grammars beside the one in `_rules`

    def written(self, tools: Tools, body: str, form: Grammar | None, thinking: Thinking) -> Grammar:
        """Write the grammar. body: the alternatives that may follow the reasoning."""
        self._notation = self._notation_for(tools.tools)
        start = self._reasoning(thinking)
        self._rules.append(f"start: {start} body")
        self._rules.append(f"body: {body}")
        if "calls" in body:
            self._calls(tools.tools, parallel=tools.parallel)
        if "form" in body and form is not None:
            self._form(form)
        if body == "free":
            self._free(tools)
        source = "%llguidance {}\n" + "\n".join(self._rules) + "\n"
        if self._others:
            source = json.dumps({"grammars": [{"name": "answer", "lark_grammar": source}, *self._others]})
        return Grammar("lark", source, tools.param if form is None or tools.tools else form.param)

    def _reasoning(self, thinking: Thinking) -> str:
        """Write the rules of the reasoning; return what stands for it before the rest."""
        if thinking == "none" or self._chat.reasoning is None:
            return ""
        begin, end = self._chat.reasoning
        self._rules.append(rf"reasoning: {self._up_to(end)} /\n{{0,2}}/")
        return "reasoning" if thinking == "open" else f"({self._literal(begin)} reasoning)?"

    def _calls(self, tools: Sequence[Tool], *, parallel: bool) -> None:
        """Write the rule of calls alone, and those that it needs."""
        notation = self._notation
        more = f" ({self._literal(notation.between)} call)*" if parallel else ""
        self._rules.append(f"calls: {self._literal(notation.before)} call{more} {self._literal(notation.behind)}")
        self._rules.append(f"call: {' | '.join(self._each_call(tools))}")

    def _each_call(self, tools: Sequence[Tool]) -> Iterable[str]:
        """Write the rules of arguments; yield what stands for a call of each tool."""
        notation = self._notation
        for index, tool in enumerate(tools):
            if notation is NOTATIONS["pythonic"]:
                self._python_arguments(f"arguments_{index}", _schema(tool))
            else:
                self._rules.append(f"arguments_{index}: %json {json.dumps(_schema(tool))}")
            head = self._literal(f"{notation.begin}{tool.name}{notation.middle}")
            yield f"{head} arguments_{index} {self._literal(notation.end)}"

    def _python_arguments(self, name: str, schema: dict[str, Any]) -> None:
        """Write the rule of arguments such as a=1, b="x", in the order of the schema. Rule `name_i` is what may stand
        from property i on, where none stands before; `name_more_i` where one does."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
        self._rules.append(f"{name}: {name}_0")
        for index, (key, each) in enumerate(properties.items()):
            value = _python_value({} if each is True else each, shared)
            following = f"{name}_value_{index} {name}_more_{index + 1}"
            first, more = [f'"{key}=" {following}'], [f'", {key}=" {following}']
            if key not in required:
                first.append(f"{name}_{index + 1}")
                more.append(f"{name}_more_{index + 1}")
            self._rules += [
                f"{name}_value_{index}: {value}",
                f"{name}_{index}: {' | '.join(first)}",
                f"{name}_more_{index}: {' | '.join(more)}",
            ]
        self._rules += [f'{name}_{len(properties)}: ""', f'{name}_more_{len(properties)}: ""']

    def _form(self, form: Grammar) -> None:
        """Write the rule of content that must match a grammar."""
        source = form.source
        match form.kind:
            case "json_object":
                self._rules.append(f"form: %json {json.dumps({'type': 'object', 'x-guidance': JSON_OPTIONS})}")
            case "json_schema":
                schema = json.loads(source)
                options = JSON_OPTIONS | schema.get("x-guidance", {})
                self._rules.append(f"form: %json {json.dumps(schema | {'x-guidance': options})}")
            case "choice":
                choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
                self._rules.append(f"form: {' | '.join(choices)}")
            case "regex":
                escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", source).replace("\n", r"\n")
                self._rules.append(f"form: /{escaped}/")
            case _:
                self._rules.append("form: @form")
                self._others.append({"name": "form", "lark_grammar": _as_lark(form)})

    def _free(self, tools: Tools) -> None:
        """Write the rules of any text with calls in it, which match their schemas."""
        notation = self._notation
        trigger = notation.before or notation.begin
        marker = re.match(r"<tool_call>|\[TOOL_CALLS\]", trigger)
        if marker is None:  # nothing marks a call but that it comes first
            self._rules.append(f"free: calls | TEXT?\nTEXT: /[^\\{trigger[0]}\\s](.|\\n)*/")
            self._calls(tools.tools, parallel=tools.parallel)
            return
        begin = trigger[len(marker[0]) :]
        self._rules.append(
            f"free: (marked)* TEXT\nTEXT: {TEXT}" if tools.parallel else f"free: marked | TEXT\nTEXT: {TEXT}"
        )
        calls = [each.removeprefix(self._literal(marker[0])) for each in self._each_call(tools.tools)]
        if notation.before:
            more = f" ({self._literal(notation.between)} call)*" if tools.parallel else ""
            rest = f"{self._literal(begin)} call{more} {self._literal(notation.behind)}"
        else:
            rest = "call"
        self._rules += [f"marked: {self._up_to(marker[0])} {rest}", f"call: {' | '.join(calls)}"]

    def _notation_for(self, tools: Sequence[Tool]) -> Notation:
        if not _is_own(self._chat, tools):
            return HERMES
        if self._chat.calls == "mistral" and "[ARGS]" in self._tokens:
            return MISTRAL_NEW
        return NOTATIONS[self._chat.calls]

    def _literal(self, text: str) -> str:
        """Write a text; those parts of it that are tokens of their own are named by these."""
        if not text:
            return ""
        known = "|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True)))
        pieces = re.split(f"({known})", text) if known else [text]
        written: list[str] = []
        for piece in filter(None, pieces):
            if piece in self._tokens:
                written.append(f"<[{self._tokens[piece]}]>")
            else:
                written += [json.dumps(each, ensure_ascii=False) for each in LEXEMES.findall(piece)]
        return " ".join(written)

    def _up_to(self, text: str) -> str:
        """Write any text up to a literal, the first that comes, and the literal."""
        name = f"up_to_{len(self._rules)}"
        if text in self._tokens:
            self._rules.append(f"{name}: {TEXT} {self._literal(text)}")
        else:
            self._rules.append(f"{name}[suffix={json.dumps(text)}]: {TEXT}")
        return name


def _is_own(chat: ChatFormat, tools: Iterable[Tool]) -> bool:
    """Return whether a grammar can write calls of these tools in the model's own notation, and this is not Hermes'."""
    return chat.calls in NOTATIONS and (
        chat.calls != "pythonic" or all(_has_arguments(_schema(tool)) for tool in tools)
    )


def _has_arguments(schema: dict[str, Any]) -> bool:
    """Return whether a schema says no more of its object than which properties it has, with names for Python."""
    properties = schema.get("properties", {})
    return (
        set(schema) <= OF_PYTHONIC
        and schema.get("additionalProperties", False) is False
        and all(key.isidentifier() and key.isascii() for key in properties)
        and all(isinstance(each, dict) or each is True for each in properties.values())
        and set(schema.get("required", ())) <= set(properties)
    )


def _python_value(schema: dict[str, Any], shared: dict[str, Any]) -> str:
    """Write what an argument may be: JSON and, for strings and booleans of no further rules, Python's way. shared: what
    the schema refers to."""
    rules, kind = set(schema) - {"title", "description", "default"}, schema.get("type")
    if rules == {"type"} and kind == "boolean":
        return '"True" | "False"'
    value = [f"%json {json.dumps(schema | shared)}"]
    if rules == {"type"} and kind == "string":
        value.append(r"/'([^'\\\n]|\\['\\nt])*'/")
    elif rules <= {"type", "enum"} and kind in ("string", None):
        value += (json.dumps(repr(each)) for each in schema.get("enum", ()) if isinstance(each, str))
    return " | ".join(value)


def _schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments: no others than those that it names."""
    return named_only(tool.parameters) | {"x-guidance": JSON_OPTIONS}


def _as_lark(form: Grammar) -> str:
    """Return a grammar in Lark's notation. One that cannot be converted is left to the engine to refuse."""
    if form.kind != "gbnf":
        return form.source
    from llguidance.gbnf_to_lark import any_to_lark  # a large library that few requests need

    try:
        return str(any_to_lark(form.source))
    except Exception:  # its parser raises many kinds
        return form.source
