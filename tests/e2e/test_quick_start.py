"""The examples that a newcomer pastes, run as they stand in the documents; only the address differs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.documents import FENCE, ROOT
from tests.e2e.server import EngineServer

ADDRESS = "http://127.0.0.1:8000"
DOCUMENTS = ["README.md", "docs/api.md"]


def examples(document: str, *, python: bool) -> list[str]:
    """List the blocks of Python, or those of curl commands alone."""
    blocks = [(language, block) for _, language, block in FENCE.findall((ROOT / document).read_text())]
    found = [
        block
        for language, block in blocks
        if (language == "python" if python else not language and block[:5] == "curl ")
    ]
    assert found, f"{document} has no such example: this test would check nothing"
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_run(demo_server: EngineServer, document: str) -> None:
    for example in examples(document, python=True):
        assert ADDRESS in example
        done = subprocess.run(
            [sys.executable, "-c", example.replace(ADDRESS, demo_server.url)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "The image shows" in done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_curl_examples_are_answered(demo_server: EngineServer, document: str) -> None:
    for example in examples(document, python=False):
        command = example.replace(ADDRESS, demo_server.url).replace("curl ", "curl --silent --show-error --fail ")
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=ROOT, env={**os.environ, "no_proxy": "*"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert len(re.findall(r'"finish_reason": ?"stop"', done.stdout)) == example.count("curl "), done.stdout
