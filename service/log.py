"""Logging: one line per event, as `key=value`; never a prompt, an answer or an API key."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(level: str) -> None:
    """Log from `level` on; of libraries only warnings, since their details contain URLs, headers and clients' data."""
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]), format=FORMAT)
    for own in ("flashserve", "uvicorn"):
        logging.getLogger(own).setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # RequestContext logs each request with more detail


def fields(**values: object) -> str:
    """Format values as `a=1 b=0.25`, without those that are None."""
    return " ".join(f"{name}={_format(value)}" for name, value in values.items() if value is not None)


def _format(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
