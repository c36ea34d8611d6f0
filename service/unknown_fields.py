"""Find the fields of a request that its schema does not know, so that they can be ignored with a warning.

Bodies are decoded strictly at first, which costs nothing where all is known. Only a body that fails is decoded without
a schema, rid of unknown fields here, and converted: its strings, the media among them, are not copied.

Names come from clients, so they are cut and cleaned before they are logged or sent back. Values never are.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

HEADER = "X-Flashserve-Ignored"  # of a response: the fields that were ignored
MAX_HEADER = 1024  # characters
MAX_NAME = 64  # characters of one key
MAX_FOUND = 64  # fields reported of one request; more are ignored unreported
WARN_AGAIN = 3600.0  # seconds until the same field is logged again
MAX_WARNED = 256  # fields remembered as logged; more are not logged

UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]")
INDEX = re.compile(r"\[\d+\]")
Schema = TypeVar("Schema", bound=msgspec.Struct)

log = logging.getLogger("flashserve.request")


def decode(body: bytes | bytearray, schema: type[Schema], ignored: list[str]) -> Schema:
    """Decode a JSON body without its unknown fields, whose paths are added to `ignored`. Raises as msgspec does."""
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as error:
        problem = error.with_traceback(None)  # which holds what was decoded so far
    tree = msgspec.json.decode(body)
    changed = _Cleaner(ignored).clean(tree, _info(schema), "")
    if not changed:
        raise problem
    return msgspec.convert(tree, schema)


def drop(fields: dict[str, Any], schema: type[msgspec.Struct], ignored: list[str]) -> None:
    """Remove the unknown fields of a decoded request."""
    _Cleaner(ignored).clean(fields, _info(schema), "")


def header(ignored: Sequence[str]) -> str:
    """Return the value of the header that names ignored fields."""
    value = ", ".join(ignored)
    if len(value) <= MAX_HEADER:
        return value
    return value[:MAX_HEADER].rpartition(",")[0] + ", ..."


class _Cleaner:
    """Removes what a schema does not know from a decoded tree, in place."""

    def __init__(self, found: list[str]) -> None:
        self._found = found
        self._changed = False

    def clean(self, value: Any, type_: inspect.Type, path: str) -> bool:
        """Clean a value; return whether anything was changed."""
        self._visit(value, type_, path)
        return self._changed

    def _visit(self, value: Any, type_: inspect.Type, path: str) -> None:
        if isinstance(value, dict):
            if (struct := _struct(type_, value)) is not None:
                self._visit_struct(value, struct, path)
        elif isinstance(value, list) and (items := _items(type_)) is not None:
            for index, item in enumerate(value):
                if (part := as_part(item, items)) is not item:
                    value[index], self._changed = part, True
                self._visit(part, items, f"{path}[{index}]")

    def _visit_struct(self, value: dict[str, Any], struct: inspect.StructType, path: str) -> None:
        known = _fields(struct.cls)
        for name in list(value):
            if name in known:
                self._visit(value[name], known[name], f"{path}.{name}" if path else name)
            elif struct.forbid_unknown_fields and name != struct.tag_field:
                del value[name]
                self._changed = True
                if len(self._found) < MAX_FOUND:
                    name = UNSAFE.sub("?", name[:MAX_NAME])
                    self._found.append(f"{path}.{name}" if path else name)


def as_part(value: Any, type_: inspect.Type) -> Any:
    """Return a part of a message's content in OpenAI's form, where it came in another that clients use."""
    if not isinstance(type_, inspect.UnionType) or "image_url" not in _tagged(type_):
        return value
    if isinstance(value, str):
        return {"type": "text", "text": value}
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str | None) or kind in _tagged(type_):
        return value
    if kind is None:
        names = [name for name in ("text", "image_url", "video_url") if name in value]
        return {"type": names[0], **value} if len(names) == 1 else value
    if kind in ("input_text", "output_text"):
        return value | {"type": "text"}
    if kind == "refusal":
        return {"type": "text", "text": value.get("refusal")}
    if kind == "input_image":
        return value | {"type": "image_url"}
    if kind in ("image", "video") and isinstance(value.get(kind), str):
        rest = {name: each for name, each in value.items() if name != kind}
        return rest | {"type": f"{kind}_url", f"{kind}_url": value[kind]}
    return value


@cache
def _info(schema: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(schema)


def _alternatives(type_: inspect.Type) -> Iterable[inspect.Type]:
    return type_.types if isinstance(type_, inspect.UnionType) else (type_,)


def _tagged(type_: inspect.Type) -> dict[Any, inspect.StructType]:
    """Return the structs of a union by their tags."""
    structs = (each for each in _alternatives(type_) if isinstance(each, inspect.StructType))
    return {each.tag: each for each in structs if each.tag_field is not None}


def _struct(type_: inspect.Type, value: dict[str, Any]) -> inspect.StructType | None:
    """Return the struct that an object is to become; None where there is none."""
    structs = [each for each in _alternatives(type_) if isinstance(each, inspect.StructType)]
    for struct in structs:
        if struct.tag_field is None or value.get(struct.tag_field) == struct.tag:
            return struct
    return None


def _items(type_: inspect.Type) -> inspect.Type | None:
    return next((each.item_type for each in _alternatives(type_) if isinstance(each, inspect.ListType)), None)


@cache
def _fields(cls: type[msgspec.Struct]) -> dict[str, inspect.Type]:
    """Return the types of a struct's fields by their names in JSON."""
    info = inspect.type_info(cls)
    return {field.encode_name: field.type for field in info.fields} if isinstance(info, inspect.StructType) else {}


class Warnings:
    """Logs which fields were ignored: each once in a while, and not too many different ones."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}  # when, by the field's path without indices

    def warn(self, ignored: Sequence[str]) -> None:
        """Log those fields that were not logged of late."""
        now = time.monotonic()
        fresh = dict.fromkeys(INDEX.sub("[]", path) for path in ignored)
        fresh = {path: None for path in fresh if now - self._logged.get(path, -WARN_AGAIN) >= WARN_AGAIN}
        if len(self._logged) + len(fresh) > MAX_WARNED:
            self._logged = {path: at for path, at in self._logged.items() if now - at < WARN_AGAIN}
        room = MAX_WARNED - len(self._logged)
        paths = list(fresh)[: max(0, room)]
        if paths:
            self._logged |= dict.fromkeys(paths, now)
            log.warning("unknown fields of requests are ignored (--strict refuses them): %s", ", ".join(paths))


warnings = Warnings()
