"""Two instances behind nginx are restarted one after the other under load, and no request fails; and where the order of
a pod's end is broken, the command sees the failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.rolling import MANIFEST, SETTINGS, Timings, timings_of

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "service"
needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"),
    reason="needs nginx; on Debian: apt-get install nginx-light",
)


def rolling(*arguments: str) -> tuple[int, dict[str, Any]]:
    """On the fake engine, which takes 0.05 s a step: an answer of 40 tokens takes half a second."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    env |= {"FLASH_ENGINE": "fake_engine:load", "FAKE_DELAY": "0.05", "FLASH_MEDIA_WORKERS": "1"}
    env["PYTHONPATH"] = str(FAKES)
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.rolling", "--manifest", "none.yaml", "--users", "4", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, result


@needs_nginx
@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_request() -> None:
    code, result = rolling("--pre-stop", "2", "--lag", "0.5", "--drain", "20", "--grace", "40")
    assert result["client"]["failures"] == {}
    assert code == 0
    assert result["client"]["answered"] > 20
    assert len(result["ends"]) == 2
    for end in result["ends"]:
        assert end["exit_code"] == 0
        assert not end["killed"]
        assert 2.0 <= end["seconds"] < 20, "it drains for as long as answers run, and no longer"


@needs_nginx
@pytest.mark.slow
def test_without_a_pre_stop_requests_fail_and_it_is_seen() -> None:
    """The load balancer learns of the end only after SIGTERM: what it sends until then is refused."""
    code, result = rolling("--pre-stop", "0", "--lag", "2", "--drain", "20", "--grace", "40")
    assert code == 1
    assert result["client"]["failures"].get("http 503", 0) > 0


def test_the_timings_are_those_of_the_manifest(tmp_path: Path) -> None:
    manifest, settings = tmp_path / "deployment.yaml", tmp_path / "flashserve.env"
    hooks = ("sleep: {seconds: 7}", 'exec: {command: ["/bin/sh", "-c", "sleep 7"]}')
    for hook in hooks:
        manifest.write_text(
            "spec: {template: {spec: {terminationGracePeriodSeconds: 99, containers: "
            f"[{{name: sidecar}}, {{name: flashserve, lifecycle: {{preStop: {{{hook}}}}}}}]}}}}}}"
        )
        settings.write_text("# times\nFLASH_DRAIN_TIMEOUT=60\n")
        assert timings_of(manifest, settings) == Timings(pre_stop=7, drain=60, grace=99)


def test_a_grace_period_that_is_too_short_is_refused() -> None:
    with pytest.raises(SystemExit, match="must exceed"):
        Timings(pre_stop=5, drain=30, grace=35).check()


def test_the_manifests_own_timings_hold_together() -> None:
    timings_of(MANIFEST, SETTINGS).check()
