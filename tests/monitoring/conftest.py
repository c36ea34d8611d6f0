"""A service on the fake engine, shared by the tests of a file, and one on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import EngineServer
from tests.service.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("fake"), {}, {})
    yield server
    assert server.close() == 0, server.log_text()


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    server = EngineServer(Path(tmp_path_factory.mktemp("demo")), {"metrics_aliases": "vllm"})
    yield server
    assert server.close() == 0, server.log_text()
