"""Read what binds answers to a form in the data of `flashserve train` and `bench`: the fields of a request, as is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from model.errors import ConfigError
from model.request import Grammar
from model.train.manifest import Forms
from service.commands.generate import schema_text
from service.errors import ServiceError
from service.schemas import structured
from service.schemas.media_options import MediaFields
from service.settings import Settings
from service.validation import as_bad_request


def api_forms() -> Forms:
    """Return the forms that a request over HTTP may ask for, with the same fields and the same errors."""
    fields = set(structured.StructuredFields.__struct_fields__) - set(MediaFields.__struct_fields__)
    return Forms(frozenset(fields), _grammar)


def read_schemas(values: Sequence[str]) -> list[Grammar]:
    """Read the JSON schemas of --json-schema, each a file or JSON text. Raises ConfigError, naming the option."""
    grammars = []
    for value in values:
        try:
            grammar = _grammar({"json_schema": schema_text(value)})
        except ValueError as error:
            raise ConfigError(str(error).replace("json_schema", f"--json-schema {value}", 1)) from error
        if grammar is None:
            raise ConfigError(f"--json-schema {value}: the file is empty")
        grammars.append(replace(grammar, param=f"--json-schema {value}"))
    return grammars


def _grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar that the fields say. Raises ValueError, naming the field."""
    if not fields:
        return None
    try:
        return structured.grammar(msgspec.convert(dict(fields), structured.StructuredFields), Settings())
    except msgspec.ValidationError as error:
        raise ValueError(as_bad_request(error).message) from None
    except ServiceError as error:
        raise ValueError(error.message) from None
