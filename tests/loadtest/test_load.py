"""The load test on a real service whose engine is a fake one with known timings: what is told is what happened, and
what goes wrong on the way shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest import measure, report
from loadtest.figures import Objectives
from loadtest.measure import Options
from tests.loadtest.proxy import proxy
from tests.service.conftest import StartServer
from tests.service.server import Server

ROOT = Path(__file__).parents[2]
DELAY = 0.08  # seconds of each step of the fake engine
TOKENS = 17  # of an answer: one, and then 16 in steps of one, or of four where it is drafted for
STALL = 2.0
AFTER_BYTES = 1200  # of an answer: past its head and its first events
BETWEEN = "something between them takes the rest"


def load(url: str, **options: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"users": (3,), "duration": 3.0, "warm_up": 0.5, "max_tokens": TOKENS, "stock": 24}
    given |= {"speculation": ("auto",), "timeout": 60.0, **options}
    return list(measure.run(url, Options(**given)))


def told(runs: list[dict[str, Any]]) -> str:
    options = measure.as_json(Options())
    return report.text({"options": options, "machine": {"name": "a test"}, "taken_at": "now", "runs": runs})


@pytest.fixture
def paced(start_server: StartServer) -> Server:
    return start_server({"delay": DELAY}, drain_timeout=2)


@pytest.mark.alone
def test_times_and_tokens_are_those_of_the_server(paced: Server) -> None:
    """Of a draft's answer, whose events hold four tokens each, a count of events would say four times too much."""
    off, on = load(paced.url, speculation=("off", "auto"))
    for run, steps in ((off, TOKENS - 1), (on, (TOKENS - 1) / 4)):
        client, server = run["client"], run["server"]
        assert not client["failures"]
        per_token = steps * DELAY / (TOKENS - 1)
        assert per_token <= client["seconds_per_token"]["p50"] <= 1.3 * per_token
        # A request comes at any moment of a step, and then waits for its own; its picture is read first.
        assert DELAY <= client["ttft"]["p50"] <= 2.5 * DELAY
        assert client["ttft"]["p50"] == pytest.approx(server["mean_ttft"], rel=0.5)
        assert client["tokens"] == server["generation_tokens"] == TOKENS * client["sent"]
        assert client["tokens_by_usage"]["accepted"] == server["accepted_tokens"]
        assert not any(BETWEEN in doubt or "told of" in doubt for doubt in run["doubts"]), run["doubts"]
    assert off["server"]["acceptance_length"] is None
    assert on["server"]["acceptance_length"] == pytest.approx(4.0)
    assert on["client"]["tokens_per_second"] > 2 * off["client"]["tokens_per_second"]
    assert on["client"]["tokens_per_event"] > 3 * off["client"]["tokens_per_event"]
    assert "No request failed." in told([off, on])


def test_a_stall_in_mid_stream_shows(paced: Server) -> None:
    with proxy(paced.url, after_bytes=AFTER_BYTES, pause=STALL, every=2) as between:
        (run,) = load(between.url, keep_alive=False, objectives=Objectives(1.0, 3 * DELAY / 4))
    assert between.num_done > 3
    client = run["client"]
    assert not client["failures"], "slow is not broken"
    assert client["longest_gap"]["max"] >= STALL
    assert client["seconds_per_token"]["max"] >= STALL / (TOKENS - 1)
    assert client["goodput_share"] < 0.8
    assert any(BETWEEN in doubt for doubt in run["doubts"]), "the service itself saw no stall"
    assert BETWEEN in told([run])


def test_a_dropped_stream_shows(paced: Server) -> None:
    with proxy(paced.url, after_bytes=AFTER_BYTES, cut=True, every=3) as between:
        (run,) = load(between.url, keep_alive=False)
    client = run["client"]
    assert between.num_done > 0
    assert client["failures"] == {"dropped": between.num_done}
    assert client["answered"] + client["failed"] == client["began"]
    assert any("clients were told of" in doubt for doubt in run["doubts"])
    assert "dropped" in told([run])


def test_failures_are_counted_by_kind(start_server: StartServer) -> None:
    full = start_server({"delay": DELAY}, max_num_seqs=1, max_waiting=0, drain_timeout=2)
    (run,) = load(full.url, duration=2.0)
    assert set(run["client"]["failures"]) == {"http 503"}
    assert run["server"]["rejected"]["queue_full"] == run["client"]["failures"]["http 503"]
    assert "queue_full" in told([run]) or "capacity" in told([run])

    (run,) = load(full.url, users=(1,), duration=1.0, timeout=DELAY * 2)
    assert set(run["client"]["failures"]) == {"timeout"}

    with proxy(full.url, after_bytes=0, cut=True) as between:
        (run,) = load(between.url, users=(1,), duration=1.0, keep_alive=False)
    assert set(run["client"]["failures"]) == {"connection"}


def test_a_run_is_bounded_in_count(paced: Server) -> None:
    (run,) = load(paced.url, max_requests=5)
    assert run["client"]["sent"] == 5
    assert any("--max-requests" in doubt for doubt in run["doubts"])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )


def test_one_command_writes_the_report(paced: Server, tmp_path: Path) -> None:
    arguments = ("run", "--url", paced.url, "--scenario", "burst", "--duration", "2", "--warm-up", "0", "--stock", "8")
    folder = tmp_path / "report"
    done = command(*arguments, "--users", "1,3", "--max-tokens", "5", "--output", str(folder), "--machine", "a test")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads((folder / "report.json").read_text())
    assert [(run["users"], run["speculation"]) for run in result["runs"]] == [
        (1, "off"), (1, "auto"), (3, "off"), (3, "auto"),
    ]  # fmt: skip
    assert result["ok"]
    text = (folder / "report.txt").read_text()
    assert text in done.stdout
    for words in ("tokens/s", "TTFT", "acceptance length", "Over time", "On a test"):
        assert words in text
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http://" not in page.replace(paced.url, ""), "the page needs nothing from elsewhere"
    assert (folder / "by-users.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(done.stdout.splitlines()[-1])["ok"]

    again = tmp_path / "again"
    assert command("report", str(folder / "report.json"), "--output", str(again)).returncode == 0
    assert (again / "report.txt").read_text() == text


def test_a_broken_limit_is_an_exit_code(start_server: StartServer, tmp_path: Path) -> None:
    full = start_server(max_num_seqs=1, max_waiting=0)
    done = command(
        *("run", "--url", full.url, "--users", "4", "--speculation", "on", "--duration", "1", "--warm-up", "0"),
        *("--stock", "4", "--output", str(tmp_path)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "requests failed" in done.stdout
    assert "http 503" in done.stdout


def test_pictures_and_questions_are_written_for_other_tools(tmp_path: Path) -> None:
    assert command("export", str(tmp_path), "--number", "3").returncode == 0
    for tool in ("guidellm", "aiperf"):
        rows = [json.loads(line) for line in (tmp_path / f"{tool}.jsonl").read_text().splitlines()]
        assert len(rows) == 3
        assert all(Path(row["image"]).read_bytes().startswith(b"\x89PNG") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--users", "1,x"), "1,x"), (("--scenario", "flood"), "flood"), (("--speculation", "maybe"), "maybe")],
)
def test_a_wrong_option_is_named(arguments: tuple[str, ...], words: str) -> None:
    done = command("run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
