"""Servers for tests: one for most, one's own for those that break it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.server import Server

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of one's own; all are ended with the test, and each must end well."""
    servers: list[Server] = []

    def start(fake: dict[str, Any] | None = None, *, wait: bool = True, forked: bool = True, **settings: Any) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, fake or {}, settings, wait=wait, forked=forked))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            assert server.close() == 0, server.log_text()
        server.http.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with default limits, shared by all tests that leave it as they found it."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, {}, forked=False)
        yield server
        code = server.close()
        assert code == 0, server.log_text()
        assert "Exception in ASGI" not in server.log_text()
        assert "Task exception" not in server.log_text()
