"""Say which optional parts of the installation are there."""

from __future__ import annotations

import importlib.util


def has_otel() -> bool:
    """Return whether the extra `otel`, with which traces are sent, is installed."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # of a package above it
        return False
