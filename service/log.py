"""How the service logs: one line per event, `key=value`; never a prompt, an answer or a key."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(level: str) -> None:
    logging.basicConfig(level=level.upper(), format=FORMAT)
    logging.getLogger("uvicorn.access").disabled = True  # our own line per request says more
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs


def fields(**values: object) -> str:
    """`a=1 b=0.25`; what is None is left out."""
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items() if value is not None)


def _plain(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
