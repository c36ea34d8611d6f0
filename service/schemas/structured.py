"""The fields that bind an answer to a form, as OpenAI, vLLM, llama.cpp, SGLang and TGI name them: one Grammar at most.

Whether a grammar can be compiled is not decided here: the engine does, and its error names the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from model.request import Grammar, GrammarKind
from service.errors import BadRequest, TooLarge
from service.schemas.json_schema import named_only
from service.schemas.media_options import MediaFields
from service.settings import Settings

Schema = dict[str, Any] | str  # a JSON schema, or its JSON text
# llguidance's options, which a schema carries with it. By default answers are written as Python's json writes them.
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
COMMENT = re.compile(r"(?:#|//).*$")
# Fields of a form that are JSON text.
JSON_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_choice", "json_schema")


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's `response_format.json_schema`. An answer always keeps to its schema, whatever `strict` says."""

    schema: dict[str, Any] | None = None  # None: any object
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class Tag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a structural tag: what stands between `begin` and `end` keeps to the schema."""

    begin: str
    end: str
    schema: dict[str, Any] = {}


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`response_format`. Servers disagree on where the schema stands, so it may stand in each of those places."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar", "structural_tag"]
    json_schema: NamedSchema | None = None  # OpenAI's
    schema: Schema | None = None  # llama.cpp's, beside either type of JSON
    value: Schema | None = None  # TGI's, a schema or a regular expression
    pattern: str | None = None  # Fireworks', as is the next
    grammar: str | None = None
    structures: list[Tag] | None = None  # vLLM's structural tag
    triggers: list[str] | None = None
    format: Any = None
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`."""

    json: Schema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Schema | None = None
    disable_fallback: bool | None = None  # without effect: there is nothing to fall back to
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    backend: str | None = None  # without effect


class StructuredFields(MediaFields, kw_only=True, frozen=True):
    """All fields that ask for a form. At most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None  # vLLM's, as are the next
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: Any = None  # without effect
    grammar: str | None = None  # llama.cpp's
    json_schema: Schema | None = None  # llama.cpp's and SGLang's
    regex: str | None = None  # SGLang's, as is the next
    ebnf: str | None = None


def grammar(fields: StructuredFields, settings: Settings) -> Grammar | None:
    """Return the grammar that the fields ask for; None for free text. An empty text counts as absent.

    Raises BadRequest for more than one, TooLarge for one of too many bytes; both name the field.
    """
    found = list(_grammars(fields, settings))
    if len(found) > 1:
        first, second = found[0].param, found[1].param
        raise BadRequest(f"{first} and {second} both say what the answer must look like; send one", param=second)
    for each in found:
        if (size := len(each.source.encode())) > settings.max_grammar_bytes:
            most = settings.max_grammar_bytes
            raise TooLarge(
                f"{each.param} has {size} bytes; at most {most} are allowed", param=each.param, code="grammar_too_large"
            )
    return found[0] if found else None


def is_lark(source: str) -> bool:
    """Return whether a grammar is in Lark's notation and not in GBNF, whose rules have `::=`. So does vLLM."""
    return not any("::=" in COMMENT.sub("", line) for line in source.splitlines())


def _grammars(fields: StructuredFields, settings: Settings) -> Iterator[Grammar]:
    if fields.response_format is not None:
        yield from _of_response_format(fields.response_format, settings)
    if fields.structured_outputs is not None:
        yield from _of_structured_outputs(fields.structured_outputs, settings)
    yield from _schema(fields.guided_json, "guided_json", settings, _spaces(fields.guided_whitespace_pattern))
    yield from _text("regex", fields.guided_regex, "guided_regex")
    yield from _choice(fields.guided_choice, "guided_choice")
    yield from _notation(fields.guided_grammar, "guided_grammar")
    yield from _notation(fields.grammar, "grammar")
    yield from _schema(fields.json_schema, "json_schema", settings)
    yield from _text("regex", fields.regex, "regex")
    yield from _notation(fields.ebnf, "ebnf")


def _of_response_format(wanted: ResponseFormat, settings: Settings) -> Iterator[Grammar]:
    param = "response_format"
    if wanted.type == "text":
        return
    if wanted.type == "structural_tag":
        yield _structural_tag(wanted.structures, wanted.triggers, param, settings)
    elif wanted.type == "regex":
        name = "pattern" if wanted.value is None else "value"
        yield from _text("regex", _required(wanted.value or wanted.pattern, f"{param}.{name}"), f"{param}.{name}")
    elif wanted.type == "grammar":
        yield from _notation(_required(wanted.grammar, f"{param}.grammar"), f"{param}.grammar")
    else:
        nested = wanted.json_schema.schema if wanted.json_schema else None
        places = {"json_schema.schema": nested, "schema": wanted.schema, "value": wanted.value}
        schemas = [grammar for at, schema in places.items() for grammar in _schema(schema, f"{param}.{at}", settings)]
        if wanted.type == "json_schema" and not schemas and wanted.json_schema is None:
            raise _missing(f"{param}.json_schema")
        yield from schemas or [Grammar("json_object", param=param)]


def _of_structured_outputs(wanted: StructuredOutputs, settings: Settings) -> Iterator[Grammar]:
    param = "structured_outputs"
    options = _spaces(wanted.whitespace_pattern) | (COMPACT if wanted.disable_any_whitespace else {})
    closed = bool(wanted.disable_additional_properties)
    yield from _schema(wanted.json, f"{param}.json", settings, options, closed=closed)
    yield from _text("regex", wanted.regex, f"{param}.regex")
    yield from _choice(wanted.choice, f"{param}.choice")
    yield from _notation(wanted.grammar, f"{param}.grammar")
    if wanted.json_object:
        yield Grammar("json_object", param=f"{param}.json_object")
    if wanted.structural_tag:
        at = f"{param}.structural_tag"
        tag = _converted(_object(wanted.structural_tag, at), at)
        yield _structural_tag(tag.structures, tag.triggers, at, settings)


def _spaces(pattern: str | None) -> dict[str, Any]:
    """Return the options for white space of this pattern between the tokens of JSON."""
    return COMPACT | {"whitespace_flexible": True, "whitespace_pattern": pattern} if pattern else {}


def _schema(
    schema: Schema | None,
    param: str,
    settings: Settings,
    options: dict[str, Any] | None = None,
    *,
    closed: bool = False,
) -> Iterator[Grammar]:
    """Yield the grammar of a schema, if there is one. options: llguidance's, which the schema carries with it; closed:
    objects have no properties but those that the schema names."""
    if schema is None or schema == "":
        return
    schema = _object(schema, param)
    check_depth(schema, param, settings)
    if closed:
        _close(schema)
    else:
        schema = named_only(schema)
    if options:
        schema = {**schema, "x-guidance": {**schema.get("x-guidance", {}), **options}}
    yield Grammar("json_schema", msgspec.json.encode(schema).decode(), param)


def _text(kind: GrammarKind, source: object, param: str) -> Iterator[Grammar]:
    if source is None or source == "":
        return
    if not isinstance(source, str):
        raise BadRequest(f"{param}: Expected `str`, got `object`", param=param)
    yield Grammar(kind, source, param)


def _notation(source: str | None, param: str) -> Iterator[Grammar]:
    return _text("lark" if is_lark(source or "") else "gbnf", source, param)


def _choice(choices: list[str] | None, param: str) -> Iterator[Grammar]:
    if choices is None:
        return
    if not choices:
        raise BadRequest(f"{param} must have at least one text to choose", param=param)
    yield Grammar("choice", msgspec.json.encode(list(dict.fromkeys(choices))).decode(), param)


def _structural_tag(tags: list[Tag] | None, triggers: list[str] | None, param: str, settings: Settings) -> Grammar:
    """Return the grammar of free text with tags in it."""
    if not tags or not triggers:
        raise BadRequest(f"{param} needs structures and triggers; format is not supported yet", param=param)
    import llguidance  # a large library that few requests need

    parts = []
    for index, tag in enumerate(tags):
        trigger = next((each for each in triggers if each and tag.begin.startswith(each)), None)
        if trigger is None:
            at = f"{param}.structures[{index}].begin"
            raise BadRequest(f"{at} does not begin with any of the triggers", param=at)
        check_depth(tag.schema, f"{param}.structures[{index}].schema", settings)
        parts.append(llguidance.StructTag(trigger=trigger, begin=tag.begin, grammar=tag.schema, end=tag.end))
    return Grammar("lark", llguidance.StructTag.to_grammar(parts), param)


def _object(value: Schema, param: str) -> dict[str, Any]:
    """Return a JSON object that may have been sent as JSON text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise BadRequest(f"{param} is not a JSON object", param=param) from None
    return value


def _converted(value: dict[str, Any], param: str) -> ResponseFormat:
    try:
        return msgspec.convert({"type": "structural_tag", **value}, ResponseFormat)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{param}: {error}", param=param) from None


def check_depth(schema: Any, param: str, settings: Settings) -> None:
    """Raise BadRequest for a schema with values nested deeper than allowed."""
    level, depth = [schema], 0
    while level := [
        child
        for value in level
        for child in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    ]:
        depth += 1
        if depth > settings.max_grammar_depth:
            most = settings.max_grammar_depth
            raise BadRequest(f"{param} is nested more than {most} levels deep", param=param, code="grammar_too_deep")


def _close(schema: Any) -> None:
    """Allow no properties but those named, wherever the schema does not say so itself."""
    if isinstance(schema, dict):
        for value in schema.values():
            _close(value)
        if "properties" in schema or "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        for value in schema:
            _close(value)


def _required(value: Any, param: str) -> Any:
    if not value:
        raise _missing(param)
    return value


def _missing(param: str) -> BadRequest:
    return BadRequest(f"{param} is missing", param=param, code="missing_field")
