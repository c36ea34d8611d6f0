"""How the service logs: one line per event, `key=value`; never a prompt, an answer or a key."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(level: str) -> None:
    """Log our own lines, and the server's, from `level` on. Libraries may only warn: in detail they tell whole URLs,
    headers with cookies and keys, and pieces of what a stranger sent."""
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]), format=FORMAT)
    for own in ("flashserve", "uvicorn"):
        logging.getLogger(own).setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # our own line per request says more


def fields(**values: object) -> str:
    """`a=1 b=0.25`; what is None is left out."""
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items() if value is not None)


def _plain(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
