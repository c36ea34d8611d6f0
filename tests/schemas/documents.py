"""Twenty JSON schemas with sample documents, and whether a text is a document of a schema.

Each JSON file beside this one has a schema and documents in the order in which the schema names their properties.
Numbers are compared as they are written: 19.99 is a multiple of 0.01.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import FormatChecker, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for

HERE = Path(__file__).parent
FORMATS = FormatChecker()
TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)", re.IGNORECASE)
DURATION = re.compile(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)")
HOSTNAME = re.compile(
    r"(?=.{1,253}$)([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"
)


@FORMATS.checks("time")
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or TIME.fullmatch(value) is not None


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    if not isinstance(value, str):
        return True
    datetime.strptime(value[:10], "%Y-%m-%d")
    return value[10:11] in ("T", "t", " ") and _is_time(value[11:])


@FORMATS.checks("duration")
def _is_duration(value: object) -> bool:
    return not isinstance(value, str) or DURATION.fullmatch(value) is not None


@FORMATS.checks("hostname")
def _is_hostname(value: object) -> bool:
    return not isinstance(value, str) or HOSTNAME.fullmatch(value) is not None


@dataclass(frozen=True)
class Case:
    """A schema as JSON text, and documents of it as texts."""

    name: str
    schema: str
    samples: tuple[str, ...]

    def faults(self, text: str) -> list[str]:
        """Return why a text is no document of the schema: empty if it is one."""
        try:
            document = exact(text)
        except ValueError as error:
            return [f"no JSON: {error}"]
        return [f"{fault.json_path}: {fault.message}" for fault in validator(self.schema).iter_errors(document)]


@cache
def cases() -> Mapping[str, Case]:
    """Return all cases by name."""
    found = {}
    for path in sorted(HERE.glob("*.json")):
        read = json.loads(path.read_text())
        samples = tuple(json.dumps(document, ensure_ascii=False) for document in read["samples"])
        found[path.stem] = Case(path.stem, json.dumps(read["schema"], ensure_ascii=False), samples)
    return found


def exact(text: str) -> Any:
    """Parse JSON, numbers with a fraction or an exponent as decimal ones. Raises ValueError, also for what only Python
    reads."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_float=_decimal, parse_constant=refuse)


def _decimal(number: str) -> Decimal | float:
    """Return a number exactly, infinity if its exponent is beyond any reason."""
    try:
        return Decimal(number)
    except InvalidOperation:
        return float(number)


@cache
def validator(schema: str) -> Validator:
    """Return the validator for a schema's own draft, the latest if it names none."""
    parsed = exact(schema)
    kind = validator_for(parsed)
    kind.check_schema(json.loads(schema))
    return extend(kind, {"multipleOf": _multiple_of})(parsed, format_checker=FORMATS)


def _multiple_of(_: Validator, divisor: Any, value: object, __: object) -> Iterator[ValidationError]:
    """Check a multiple exactly."""
    if isinstance(value, int | Decimal) and not isinstance(value, bool) and Fraction(value) % Fraction(divisor):
        yield ValidationError(f"{value} is not a multiple of {divisor}")
