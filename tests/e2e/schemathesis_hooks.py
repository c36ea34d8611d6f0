"""Checks for schemathesis, which reads them by the environment variable SCHEMATHESIS_HOOKS."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.core.failures import AcceptedNegativeData

# The document describes bodies as they should be. Content parts are also read without their type, as texts alone, and
# by other servers' names (service/unknown_fields.py).
TOLERATED = ("Missing required property: type", "content -> Array with invalid items", "system -> Array with invalid")


@schemathesis.check
def invalid_data_is_refused(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> bool | None:
    """Check that what the document does not allow is refused, but for what is read by tolerance."""
    (check,) = cast("list[Callable[..., bool | None]]", CHECKS.get_by_names(["negative_data_rejection"]))
    try:
        return check(ctx, response, case)
    except AcceptedNegativeData as failure:
        if any(each in str(failure) or each in failure.message for each in TOLERATED):
            return None
        raise
