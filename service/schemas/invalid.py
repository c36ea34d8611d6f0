"""A parser's complaint in one sentence that a client can act on. 422 is never sent: this is always a 400."""

from __future__ import annotations

import re

import msgspec

from service.errors import BadRequest

ENDS = 256  # characters of a complaint's either end; what is between can only be a value that it quotes


def as_bad_request(error: Exception) -> BadRequest:
    """msgspec writes `Expected `int`, got `str` - at `$.messages[0].content``; the path becomes `param`."""
    if not isinstance(error, msgspec.ValidationError):
        return BadRequest("the body is not valid JSON", code="invalid_json")
    said = str(error)
    if len(said) > 2 * ENDS:
        said = f"{said[:ENDS]}...{said[-ENDS:]}"
    complaint, _, place = said.partition(" - at ")
    found = re.search(r"`\$\.?([^`]*)`", place)  # of a key it says: `key` in `$.logit_bias`
    path = found[1] if found else ""
    field = re.search(r"(unknown|required) field `(.*)`$", complaint, re.DOTALL)
    if field is None:
        return BadRequest(f"{path}: {complaint}" if path else complaint, param=path or None)
    param = ".".join(filter(None, (path, field[2][:64])))
    if field[1] == "unknown":
        return BadRequest(f"{param} is not a field that is known here", param=param, code="unknown_field")
    return BadRequest(f"{param} is missing", param=param, code="missing_field")
