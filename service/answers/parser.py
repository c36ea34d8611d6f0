"""Splits the text of an answer, as it streams, into content, reasoning and tool calls.

One parser knows the notations of calls that models use; which of them count is the checkpoint's ChatFormat. Names must
be those of the request's tools: text that looks like a call and is none comes out as text. Joined, the pieces are the
same however the text was split.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from model.request import ChatFormat
from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart, joined
from service.answers.scanner import Read, Scanner

Schema = Mapping[str, Any]
TAG, TAG_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PYTHON_TAG = "<|python_tag|>"
MISTRAL = "[TOOL_CALLS]"
# What begins a call, by format. Every format has the tag: forced calls use it where a format's own cannot be forced.
TRIGGERS: dict[str, tuple[str, ...]] = {
    "hermes": (TAG,),
    "qwen3_coder": (TAG, FUNCTION),
    "glm45": (TAG,),
    "llama3_json": (TAG, PYTHON_TAG),
    "pythonic": (TAG, PYTHON_TAG),
    "mistral": (TAG, MISTRAL),
}
AT_LINE_STARTS = {"llama3_json": "{", "pythonic": "["}  # these begin a call at the start of a line alone
FIRST_KEYS = ('"name"', '"arguments"', '"parameters"', '"function"', '"type"', '"id"')
WORDS = {"true": True, "false": False, "null": None}  # JSON's, in Python's notation


class AnswerParser:
    """Parses one answer. Feed its text in any pieces, and call `finish` once at the end."""

    def __init__(
        self,
        chat: ChatFormat | None = None,
        tools: Mapping[str, Schema] | None = None,
        *,
        thinking: bool = False,
        parallel: bool = True,
        id: str = "",
    ) -> None:
        """Start an answer. chat: the checkpoint's format; tools: the schemas of those that may be called, by name;
        thinking: whether the prompt ends within the reasoning; parallel: whether calls after the first count; id: the
        answer's, from which those of calls derive."""
        self._tools = tools or {}
        self._format = chat.calls if chat and self._tools else ""
        self._markers = chat.reasoning if chat else None
        self._thinking, self._parallel = thinking, parallel
        self._id = id
        self._text = Scanner()
        self._deltas: list[Delta] = []
        self._calls = 0
        self._blank = ""  # white space that comes out with the text behind it
        self._fresh = False  # whether reasoning or a call is just before: white space behind it is dropped
        self._gap = ""  # stands between texts with calls between them
        self._line_starts = True  # whether the next character begins a line
        self._steps = self._answer()
        next(self._steps, None)

    def feed(self, text: str) -> list[Delta]:
        """Append text and return what is known now. Text that may yet turn out to be markup is kept until then."""
        self._text.text += text
        return self._advanced()

    def finish(self) -> list[Delta]:
        """Return what was kept, at the end of the answer."""
        self._text.ended = True
        return self._advanced()

    def _advanced(self) -> list[Delta]:
        next(self._steps, None)
        deltas, self._deltas = self._deltas, []
        return joined(deltas)

    def _answer(self) -> Read[None]:
        """Parse the whole answer."""
        if self._markers is not None:
            yield from self._reasoning(*self._markers)
        while (yield from self._content()):
            begin = self._text.at
            if not (yield from self._call()):
                # It was no call: its first character is text, and a call may begin at the next one.
                self._text.at = begin + 1
                self._say(self._text.text[begin : begin + 1])
        if self._blank and not self._fresh:
            self._deltas.append(TextDelta(self._blank))

    # --- reasoning and text

    def _reasoning(self, begins: str, ends: str) -> Read[None]:
        """Parse the reasoning before the content, if there is any."""
        text, start = self._text, self._text.at
        yield from text.space()
        if not (yield from text.take(begins)) and not self._thinking:
            text.at = start
            return
        blank = ""
        begun = False

        def think(piece: str) -> None:
            """Emit reasoning, without white space around the whole."""
            nonlocal blank, begun
            piece = blank + piece if begun else piece.lstrip()
            core = piece.rstrip()
            blank = piece[len(core) :]
            if core:
                begun = True
                self._deltas.append(ReasoningDelta(core))

        yield from text.stream((ends,), think)
        yield from text.take(ends)
        self._fresh = True

    def _content(self) -> Read[bool]:
        """Emit text up to what may begin a call, which is not consumed; False at the end of the answer."""
        text, line_trigger = self._text, AT_LINE_STARTS.get(self._format)
        stops = TRIGGERS.get(self._format, ())
        while True:
            text.forget()
            if not stops:
                self._say(text.text)
                text.at = len(text.text)
                if text.ended:
                    return False
                yield
                continue
            found = yield from text.stream((*stops, line_trigger) if line_trigger else stops, self._say)
            if found != line_trigger or self._line_starts:
                return bool(found)
            text.at += 1
            self._say(found)

    def _say(self, piece: str) -> None:
        """Emit content. White space that may stand before a call waits: around calls and after reasoning it is
        dropped."""
        if not piece:
            return
        _, newline, line = piece.rpartition("\n")
        self._line_starts = (bool(newline) or self._line_starts) and not line.strip()
        piece = self._blank + piece
        if self._fresh and (piece := piece.lstrip()):
            piece = self._gap + piece
        core = piece.rstrip() if self._format else piece
        self._blank = piece[len(core) :]
        if core:
            self._fresh, self._gap = False, "\n"
            self._deltas.append(TextDelta(core))

    # --- calls

    def _call(self) -> Read[bool]:
        """Parse what begins like a call or several; return whether it is one. Consumes and emits only calls."""
        text, line_trigger = self._text, AT_LINE_STARTS.get(self._format)
        if (yield from text.take(TAG)):
            return (yield from self._tagged())
        if (yield from text.peek(FUNCTION)):
            return (yield from self._xml())
        if self._format == "mistral":
            return (yield from text.take(MISTRAL)) and (yield from self._mistral())
        yield from text.take(PYTHON_TAG)
        yield from text.space()
        if line_trigger == "{" or (yield from text.peek("{")):
            return (yield from self._json_calls(";"))
        return (yield from text.take("[")) and (yield from self._pythonic())

    def _tagged(self) -> Read[bool]:
        """Parse a call between tags: JSON, or XML's notation, or a name with keys and values."""
        text = self._text
        yield from text.space()
        if (yield from text.peek("{")):
            called = yield from self._json_call()
        elif (yield from text.peek(FUNCTION)):
            called = yield from self._xml()
        else:
            called = yield from self._keys_and_values()
        if called:
            yield from self._behind(TAG_END)
        return called

    def _behind(self, literal: str) -> Read[bool]:
        """Consume a literal behind a call and white space before it, if it comes."""
        start = self._text.at
        found = yield from self._text.literals(literal)
        if not found:
            self._text.at = start
        return found

    def _json_calls(self, separator: str, end: str = "") -> Read[bool]:
        """Parse calls as JSON objects with a separator between them and `end` behind them; True if there is one."""
        first = self._calls
        while True:
            before = self._text.at
            between = self._calls > first
            if (between and not (yield from self._behind(separator))) or not (yield from self._json_call()):
                self._text.at = before
                break
        if end and self._calls > first:
            yield from self._behind(end)
        return self._calls > first

    def _json_call(self) -> Read[bool]:
        """Parse a call such as {"name": "f", "arguments": {...}}."""
        text = self._text
        yield from text.space()
        start = text.at
        name = yield from self._json_name()
        if name:
            complete = yield from text.json(self._begun(name))
            if complete and not (yield from self._behind("}")) and (yield from self._behind(",")):
                yield from text.json(_nothing, depth=1)  # further fields
            return True
        text.at = start
        if name is None or not (yield from self._is_json_call()):
            return False
        pieces: list[str] = []
        complete = yield from text.json(pieces.append)
        call = _read_call("".join(pieces)) if complete else None
        if call is None or call[0] not in self._tools:
            return False
        self._begun(call[0])(call[1])
        return True

    def _json_name(self) -> Read[str | None]:
        """Parse the beginning of a call up to its arguments, an object, and return its name; "" if it begins otherwise,
        None if it is no call however it goes on."""
        text = self._text
        if not (yield from text.literals("{", '"name"', ":", '"')):
            return ""
        name = yield from text.name()
        if name not in self._tools:
            return None
        if not (yield from text.literals('"', ",", '"')):
            return ""
        if not ((yield from text.take("arguments")) or (yield from text.take("parameters"))):
            return ""
        if not (yield from text.literals('"', ":")):
            return ""
        yield from text.space()
        return name if (yield from text.peek("{")) else ""

    def _is_json_call(self) -> Read[bool]:
        """Return whether an object begins like a call with its fields in another order. Consumes nothing."""
        text, start = self._text, self._text.at
        for key in FIRST_KEYS:
            found = yield from text.literals("{", key)
            text.at = start
            if found:
                return True
        return False

    def _mistral(self) -> Read[bool]:
        """Parse what follows [TOOL_CALLS]: a list of calls as JSON, or a name, [ARGS] and arguments."""
        text = self._text
        yield from text.space()
        if (yield from text.take("[")):
            yield from text.space()
            return (yield from self._json_calls(",", "]"))
        name = yield from text.name()
        if name not in self._tools:
            return False
        if (yield from text.take("[CALL_ID]")):
            yield from text.name()
        yield from text.take("[ARGS]")
        yield from text.space()
        if not (yield from text.peek("{")):
            return False
        yield from text.json(self._begun(name))
        return True

    def _xml(self) -> Read[bool]:
        """Parse a call such as <function=f><parameter=a>1</parameter></function>."""
        text = self._text
        name = (yield from text.name()) if (yield from text.literals(FUNCTION)) else ""
        if name not in self._tools or not (yield from text.take(">")):
            return False
        arguments = _Arguments(self._begun(name), self._tools[name])
        while (yield from self._behind("<parameter=")):
            key = yield from text.until(">")
            if key is None or not (yield from self._value(arguments, key, "</parameter>")):
                return True
        arguments.end()
        yield from self._behind(FUNCTION_END)
        return True

    def _value(self, arguments: _Arguments, key: str, end: str) -> Read[bool]:
        """Parse a value without quotes up to `end`; False where it is cut."""
        value = yield from self._text.until(end)
        if value is None:
            arguments.cut(key, (yield from self._text.rest()))
            return False
        arguments.add(key, value.removeprefix("\n").removesuffix("\n"))
        return True

    def _keys_and_values(self) -> Read[bool]:
        """Parse a call such as f<arg_key>a</arg_key><arg_value>1</arg_value>."""
        text = self._text
        name = yield from text.name()
        yield from text.space()
        known = name in self._tools
        if not known or not ((yield from text.peek("<arg_key>")) or (yield from text.peek(TAG_END))):
            return False
        arguments = _Arguments(self._begun(name), self._tools[name])
        while (yield from self._behind("<arg_key>")):
            key = yield from text.until("</arg_key>")
            if key is None or not (yield from self._behind("<arg_value>")):
                return True
            if not (yield from self._value(arguments, key, "</arg_value>")):
                return True
        arguments.end()
        return True

    def _pythonic(self) -> Read[bool]:
        """Parse calls such as [f(a=1), g()], behind the bracket."""
        text, first = self._text, self._calls
        while True:
            before = text.at
            yield from text.space()
            name = yield from text.name()
            known = name in self._tools and (yield from text.literals("("))
            arguments = (yield from self._python_arguments()) if known else None
            if arguments is None:
                text.at = before
                break
            self._begun(name)(arguments)
            if not (yield from self._behind(",")):
                yield from self._behind("]")
                break
        return self._calls > first

    def _python_arguments(self) -> Read[str | None]:
        """Parse arguments in Python's notation and the parenthesis behind them; None where they are none."""
        text, values = self._text, {}
        while not (yield from self._behind(")")):
            yield from text.space()
            key = yield from text.name()
            value = (yield from text.python_value()) if (yield from text.literals("=")) else None
            try:
                values[key] = _python_literal(value or "")
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return None
            yield from self._behind(",")
        try:
            return _dumped(values)
        except (ValueError, TypeError):  # Python has values that JSON lacks
            return None

    def _begun(self, name: str) -> Callable[[str], None]:
        """Begin a call; return what emits its arguments."""
        if self._calls and not self._parallel:
            self._calls += 1
            return _nothing
        index = self._calls
        digest = hashlib.blake2b(f"{self._id}/{index}".encode(), digest_size=12).hexdigest()
        self._calls += 1
        self._blank, self._fresh, self._line_starts = "", True, True
        self._deltas.append(ToolCallStart(index, f"call_{digest}", name))

        def emit(piece: str) -> None:
            if piece:
                self._deltas.append(ArgumentsDelta(index, piece))

        return emit


class _Arguments:
    """Writes a call's arguments as JSON, one by one."""

    def __init__(self, emit: Callable[[str], None], schema: Schema) -> None:
        """schema: says which values are no strings."""
        self._emit, self._separator = emit, "{"
        properties = schema.get("properties")
        self._properties: Schema = properties if isinstance(properties, Mapping) else {}

    def add(self, key: str, text: str) -> None:
        """Add a value that stands there without quotes: JSON, unless its schema takes a string."""
        if not self._is_text(key):
            try:
                return self.add_value(key, json.loads(text))
            except (ValueError, RecursionError):
                pass
        self.add_value(key, text)

    def add_value(self, key: str, value: Any) -> None:
        """Add a value. Raises ValueError, and adds nothing, if JSON has none like it."""
        self._emit(f"{self._separator}{_dumped(key)}: {_dumped(value)}")
        self._separator = ", "

    def cut(self, key: str, text: str) -> None:
        """Add what there is of a value that is cut; JSON that is cut ends in the same way."""
        value = _dumped(text.removeprefix("\n"))[:-1] if self._is_text(key) else text.strip()
        self._emit(f"{self._separator}{_dumped(key)}: {value}")

    def end(self) -> None:
        """End the arguments."""
        self._emit("{}" if self._separator == "{" else "}")

    def _is_text(self, key: str) -> bool:
        """Return whether the schema takes a string."""
        own = self._properties.get(key)
        kind = own.get("type") if isinstance(own, Mapping) else None
        return kind == "string" or (isinstance(kind, list) and "string" in kind)


class _JsonWords(ast.NodeTransformer):
    """Reads JSON's words as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
        return ast.copy_location(ast.Constant(WORDS[node.id]), node) if node.id in WORDS else node


def _nothing(_: str) -> None:
    pass


def _read_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments of a call that is a whole JSON object; None if it is none."""
    try:
        call = json.loads(text)
        inner = call.get("function")
        call = inner if isinstance(inner, dict) else call
        name = call.get("name", inner)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # JSON within JSON
            arguments = json.loads(arguments)
        dumped = _dumped({} if arguments is None else arguments)
    except (ValueError, AttributeError, RecursionError):
        return None
    return (name, dumped) if isinstance(name, str) and isinstance(arguments, dict | None) else None


def _dumped(value: Any) -> str:
    """Write JSON, readable unless that would be no Unicode. Raises ValueError or TypeError for what JSON lacks."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _python_literal(text: str) -> Any:
    """Evaluate a literal in Python's notation, in which JSON's words count too. Raises ValueError or SyntaxError."""
    return ast.literal_eval(_JsonWords().visit(ast.parse(text.strip(), mode="eval")))
