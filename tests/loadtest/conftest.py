"""Servers on the fake engine: its answers depend on the request alone, and its steps take as long as it is told."""

from __future__ import annotations

from tests.service.conftest import start_server

__all__ = ["start_server"]
