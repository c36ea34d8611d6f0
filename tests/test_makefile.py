"""What `make` does about the native library: compiled when it has to be, as it was last asked for, and not in silence.

In a copy of the project whose .venv holds a stand-in for Python that writes down what it was called for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "model" / "backends" / "native").mkdir(parents=True)
    for name in ("transformer.cpp", "step.h", "builds.py"):
        (tmp_path / "model" / "backends" / "native" / name).write_text(name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/sh\necho "${FLASH_BUILDS-unset} $*" >> calls\n'
        'case "$*" in *native.builds*) test ! -e broken || { echo "cc1plus: no" >&2; exit 1; };; esac\n'
    )
    python.chmod(0o755)
    return tmp_path


def make(project: Path, verb: str, **env: str) -> tuple[int, list[str]]:
    """The exit code, and with which FLASH_BUILDS the native library was seen to, each time it was."""
    (project / "calls").write_text("")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "MAKE", "MFLAGS"))}
    done = subprocess.run(["make", verb], cwd=project, env=clean | env, capture_output=True, text=True)
    calls = (project / "calls").read_text().splitlines()
    assert all(call.startswith("none ") for call in calls if "--editable" in call)
    return done.returncode, [call.split()[0] for call in calls if call.endswith("-m model.backends.native.builds")]


def age(project: Path) -> None:
    """Let some time go by, so that what is touched next is newer to any file system."""
    for file in project.rglob("*"):
        os.utime(file, (file.stat().st_mtime - 10,) * 2)


def test_the_library_is_compiled_once_and_again_for_another_choice(project: Path) -> None:
    assert make(project, "setup") == (0, ["auto"])
    assert make(project, "setup") == (0, [])
    for choice in ("avx2", "avx512,avx2", "all", "none"):
        assert make(project, "setup", FLASH_BUILDS=choice) == (0, [choice])
        assert make(project, "setup", FLASH_BUILDS=choice) == (0, [])
        assert make(project, "setup") == (0, []), "what was chosen last stays"
    assert make(project, "setup", FLASH_BUILDS="auto") == (0, ["auto"])


@pytest.mark.parametrize("verb", ["demo", "test", "serve", "bench", "check"])
def test_every_verb_sees_to_it(project: Path, verb: str) -> None:
    assert make(project, "setup", FLASH_BUILDS="avx2") == (0, ["avx2"])
    for name in ("flashserve", "ruff", "mypy", "clang-format"):
        shutil.copy(project / ".venv" / "bin" / "python", project / ".venv" / "bin" / name)
    for name in ("step.h", "transformer.cpp", "builds.py"):
        age(project)
        (project / "model" / "backends" / "native" / name).touch()
        assert make(project, verb) == (0, ["avx2"]), name
        assert make(project, verb) == (0, [])


def test_what_is_cleaned_away_is_compiled_again(project: Path) -> None:
    assert make(project, "setup", FLASH_BUILDS="avx2") == (0, ["avx2"])
    (project / "model" / "backends" / "native" / "_avx2.so").write_text("")
    for name in ("service", "tests", "loadtest"):
        (project / name).mkdir()
    assert make(project, "clean") == (0, [])
    assert not (project / "model" / "backends" / "native" / "_avx2.so").exists()
    assert make(project, "serve")[1] == ["avx2"]


def test_a_failure_fails_and_is_tried_again(project: Path) -> None:
    (project / "broken").write_text("")
    for _ in range(2):
        code, built = make(project, "setup")
        assert code != 0
        assert built == ["auto"]
    (project / "broken").unlink()
    assert make(project, "setup") == (0, ["auto"])
