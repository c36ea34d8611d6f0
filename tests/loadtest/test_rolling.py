"""Two instances behind nginx are restarted in turn under load and no request fails; where the order of a pod's end is
broken, the command sees the failures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.client import Question
from loadtest.rolling import MANIFEST, SETTINGS, Tally, Timings, send, timings_of

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "service"
needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"),
    reason="needs nginx; on Debian: apt-get install nginx-light",
)


def rolling(*arguments: str, step: float = 0.05) -> tuple[int, dict[str, Any]]:
    """Run the command on the fake engine: an answer of 40 tokens takes ten steps of that many seconds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    env |= {"FLASH_ENGINE": "fake_engine:load", "FAKE_DELAY": str(step), "FLASH_MEDIA_WORKERS": "1"}
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
    code, result = rolling("--pre-stop", "0", "--lag", "2", "--drain", "20", "--grace", "40", "--users", "24", step=0.3)
    assert code == 1
    assert result["client"]["failures"].get("http 503", 0) > 0


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TEXT = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'
DONE = b"data: [DONE]\n\n"
BUSY = b'{"error": {"message": "full", "code": "queue_full"}}'
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(BUSY)


@pytest.mark.parametrize(
    ("reply", "failure", "detail"),
    [
        (EVENTS + TEXT + DONE, None, ""),
        (EVENTS + TEXT, "malformed", "without its last event"),
        (EVENTS + TEXT + b'data: {"error": {"message": "it died"}}\n\n' + DONE, "error event", "it died"),
        (EVENTS + b"<html>\n\n" + DONE, "malformed", "<html>"),
        (REFUSED + BUSY, "http 503", "queue_full"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "connection", "complete message body"),
        (b"", "connection", "disconnected"),
        (None, "timeout", "Timeout"),
    ],
)
def test_every_way_to_fail_is_counted_by_kind(reply: bytes | None, failure: str | None, detail: str) -> None:
    """A server gives this reply and hangs up; None: it never replies."""
    tally = Tally()

    async def ask_once() -> None:
        closed = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"content-length: (\d+)", head.lower())
            await reader.readexactly(int(length))
            if reply is None:
                await reader.read()  # until the client gives up
            else:
                writer.write(reply)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            closed.set()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=0.5 if reply is None else 20.0) as client:
                await send(client, Question("What is there?"), tally)
            await closed.wait()

    asyncio.run(ask_once())
    assert dict(tally.failures) == ({} if failure is None else {failure: 1})
    assert tally.answered == (failure is None)
    assert tally.sent == 1
    assert detail in " ".join(tally.details.values())


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
