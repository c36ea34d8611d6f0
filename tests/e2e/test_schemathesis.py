"""Generated requests to every route of a real server: no answer is a 5xx, and each is as the document says.

A small part of what `python -m tests.e2e.schemathesis_run` sends.
"""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import StartServer
from tests.e2e.schemathesis_run import SETTINGS, run


def test_generated_requests_get_the_answers_that_the_document_promises(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(**SETTINGS)
    done = run(server.url, tmp_path, phases="examples,fuzzing", per_operation=26, seed=1)
    assert not done.failed, done.report
    assert done.requests >= 300
    assert server.chat("still there?").status_code == 200
    assert "Traceback" not in server.log_text()
