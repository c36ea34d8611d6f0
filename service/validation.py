"""Turn msgspec's validation errors into a BadRequest that names the field. The status is always 400, never 422."""

from __future__ import annotations

import re

import msgspec

from service.errors import BadRequest

ENDS = 256  # characters at either end of a long message that are shown; the middle can only be a quoted value


def as_bad_request(error: Exception) -> BadRequest:
    """Convert an error. From `Expected `int`, got `str` - at `$.messages[0].content`` the path becomes `param`."""
    if not isinstance(error, msgspec.ValidationError):
        return BadRequest("the body is not valid JSON", code="invalid_json")
    text = str(error)
    if len(text) > 2 * ENDS:
        text = f"{text[:ENDS]}...{text[-ENDS:]}"
    problem, _, location = text.partition(" - at ")
    found = re.search(r"`\$\.?([^`]*)`", location)  # for a key the location is: `key` in `$.logit_bias`
    path = found[1] if found else ""
    field = re.search(r"(unknown|required) field `(.*)`$", problem, re.DOTALL)
    if field is None:
        return BadRequest(f"{path}: {problem}" if path else problem, param=path or None)
    param = ".".join(filter(None, (path, field[2][:64])))
    if field[1] == "unknown":
        return BadRequest(f"{param} is not a known field", param=param, code="unknown_field")
    return BadRequest(f"{param} is missing", param=param, code="missing_field")
