"""An environment of its own for the client libraries: they want other versions of much that the project has.

It lives in the user's cache folder under the digest of requirements.txt, so that it is installed once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import locked

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
UNREACHABLE = re.compile(r"connection broken by|Max retries exceeded|Temporary failure in name resolution|timed out")


def interpreter() -> Path:
    """Return the environment's Python. Installs it where it is missing; skips the test if no registry answers."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashserve"
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = cache / f"clients-{digest}"
    python, complete = folder / "bin" / "python", folder / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, fcntl.LOCK_EX):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            _install(python)
            print(f"client libraries: installed in {time.monotonic() - began:.0f} s into {folder}")
            complete.touch()
    return python


def _install(python: Path) -> None:
    options = "--disable-pip-version-check --no-input --quiet --no-deps --no-compile --only-binary :all: --retries 1"
    done = subprocess.run(
        [str(python), "-m", "pip", "install", *options.split(), "--requirement", str(REQUIREMENTS)],
        capture_output=True,
        text=True,
    )
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"no package registry answers: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr
