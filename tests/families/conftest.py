"""Saves checkpoints of families once a session, each when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.zoo import families


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the checkpoint of a family by its name and returns its folder."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = families()[name].save(tmp_path_factory.mktemp("families") / name)
        return folders[name]

    return save
