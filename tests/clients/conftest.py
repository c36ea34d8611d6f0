"""Servers for client libraries: the bundled model, and one that says what prompts write down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import environment
from tests.e2e.server import EngineServer

ROOM = {"max_num_seqs": 4, "threads": 1}
SCRIPTED = {"engine": "tests.service.scripted_engine:load", "max_model_len": 8192, **ROOM}


@pytest.fixture(scope="session")
def client_python() -> Path:
    return environment.interpreter()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    yield from running(EngineServer(tmp_path_factory.mktemp("demo"), ROOM))


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    yield from running(EngineServer(tmp_path_factory.mktemp("scripted"), SCRIPTED))


def running(server: EngineServer) -> Iterator[EngineServer]:
    yield server
    code = server.close()
    assert code == 0, server.log_text()
    assert "Traceback" not in server.log_text(), server.log_text()
