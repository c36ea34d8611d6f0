"""Sends requests that schemathesis generates from the OpenAPI document to a real server, and checks every answer.

    python -m tests.e2e.schemathesis_run [--per-operation 100] [--seed 1] [--model demo]

Valid and invalid requests to every route: no answer may be a 5xx, and each must be as the document says. The server
runs a tiny checkpoint with short answers unless another model is named. Prints schemathesis' report and ends with 1
if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model  # noqa: F401  (before anything imports torchvision)
from tests.e2e.server import EngineServer
from tests.model import tiny

ROOT = Path(__file__).parent.parent.parent
ADMIN_KEY = "admin"
SETTINGS = {"max_new_tokens": 16, "default_max_tokens": 8, "admin_key": ADMIN_KEY, "max_num_seqs": 4}
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "allow_header_conformance", "ignored_auth"),
    *("missing_required_header", "invalid_data_is_refused"),
)


@dataclass(frozen=True)
class Run:
    """requests: generated cases; failed: whether an answer was wrong; report: schemathesis' own."""

    requests: int
    failed: bool
    report: str


def run(url: str, folder: Path, *, phases: str, per_operation: int, seed: int) -> Run:
    """Generate requests to the server at `url`. folder: where schemathesis may write."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"),
        *("--phases", phases, "--max-examples", str(per_operation), "--seed", str(seed)),
        *("--checks", ",".join(CHECKS), "--continue-on-failure", "--generation-database", "none"),
        *("--header", f"Authorization: Bearer {ADMIN_KEY}", "--warnings", "off", "--request-timeout", "60"),
        *("--suppress-health-check", "all", "--no-shrink"),
    ]
    env = os.environ | {"SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    found = re.search(r"(\d+) generated", report)
    return Run(int(found[1]) if found else 0, done.returncode != 0, report)


def checkpoint(folder: Path) -> dict[str, Any]:
    """Save a tiny model and its draft; return the settings that serve it."""
    target = tiny.save_checkpoint(folder / "target")
    draft = tiny.save_draft(folder / "draft", target)
    return {"model": target, "draft": draft, "adaptive_drafting": False, "served_model_name": "tiny", "threads": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-operation", type=int, default=100, help="random requests per route, besides the listed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="model to serve (default: a tiny one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = {"model": arguments.model} if arguments.model else checkpoint(folder)
        server = EngineServer(folder, SETTINGS | served)
        try:
            done = run(
                server.url,
                folder,
                phases="examples,coverage,fuzzing",
                per_operation=arguments.per_operation,
                seed=arguments.seed,
            )
        finally:
            server.close()
    print(done.report)  # noqa: T201
    print(json.dumps({"requests": done.requests, "failed": done.failed}))  # noqa: T201
    return int(done.failed)


if __name__ == "__main__":
    sys.exit(main())
