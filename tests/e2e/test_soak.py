"""The load commands work, and a small slice of what they check holds; the full runs are `python -m loadtest.soak` and
`python -m loadtest.livez`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import EngineServer

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    env |= {f"FLASH_{name.upper()}": str(value) for name, value in (settings or {}).items()}
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_soak_leaves_nothing_behind(tiny_settings: dict[str, Any]) -> None:
    # So few requests have not yet filled caches and arenas: the bound on memory is a loose one here. Answers are long
    # enough that whoever leaves does so before their end, however fast the processor is.
    arguments = ("--requests", "80", "--max-tokens", "96", "--max-growth", "0.15")
    result = command("loadtest.soak", *arguments, settings=tiny_settings)
    assert result["ok"]
    assert result["answered"] + result["refused"] + result["dropped"] == 80
    assert result["dropped"] >= 14
    assert len(result["memory_mib"]) == 3


@pytest.mark.slow
def test_livez_answers_while_16_requests_with_large_media_run(server: EngineServer) -> None:
    """The bound leaves room for a busy machine; the command's own is 100 ms."""
    result = command("loadtest.livez", "--url", server.url, "--requests", "20", "--max-p99-ms", "1500")
    print(f"\n/livez: p50 {result['p50_ms']} ms, p99 {result['p99_ms']} ms")
    assert result["asked"] > 50
    server.wait_idle()
