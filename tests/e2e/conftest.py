"""Real server processes on the real engine: on a tiny checkpoint, or on the bundled model where it must truly see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import EngineServer
from tests.model import tiny, tiny_qwen

StartServer = Callable[..., EngineServer]
# Of the bundled models: room for sixteen sequences is gigabytes, which take seconds to be filled with noughts.
FEW_SLOTS = {"max_num_seqs": 4}


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes a server serve the tiny checkpoint: 16 tokens an image, answers that are words at random."""
    folder = tmp_path_factory.mktemp("e2e")
    target = tiny.save_checkpoint(folder / "target")
    draft = tiny.save_draft(folder / "draft", target)
    # An untrained draft brings nothing: left to the load, it would not be used.
    drafting = {"draft": draft, "adaptive_drafting": False}
    return {"model": target, **drafting, "served_model_name": "tiny", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="session")
def server(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """The one that all tests share which leave it as they found it."""
    yield from running(tmp_path_factory.mktemp("shared"), tiny_settings)


@pytest.fixture(scope="session")
def qwen_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """A tiny Qwen2.5-VL: as many tokens as an image is large, positions on three axes."""
    folder = tmp_path_factory.mktemp("qwen")
    target = tiny_qwen.save_checkpoint(folder / "target")
    draft = tiny.save_draft(folder / "draft", target)
    yield from running(
        folder, {"model": target, "draft": draft, "adaptive_drafting": False, "dtype": "float32", "threads": 1}
    )


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    yield from running(tmp_path_factory.mktemp("demo"), FEW_SLOTS)


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """Says what the messages write down (tests/model/scripted.py)."""
    yield from running(tmp_path_factory.mktemp("scripted"), {"engine": "tests.service.scripted_engine:load"})


@pytest.fixture
def start_server(tiny_settings: dict[str, Any], tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of one's own; all are ended with the test, and each must end well."""
    servers: list[EngineServer] = []

    def start(**settings: Any) -> EngineServer:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(EngineServer(folder, tiny_settings | settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            assert server.close() == 0, server.log_text()
        server.http.close()


def running(folder: Path, settings: dict[str, Any]) -> Iterator[EngineServer]:
    server = EngineServer(folder, settings)
    yield server
    code = server.close()
    assert code == 0, server.log_text()
    assert "Traceback" not in server.log_text(), server.log_text()
