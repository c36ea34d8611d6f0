"""The request of POST /admin/draft."""

from __future__ import annotations

from typing import Annotated

import msgspec


class DraftChange(msgspec.Struct, forbid_unknown_fields=True):
    draft: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]  # a folder on the server's machine
