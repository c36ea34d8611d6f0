"""Test layers spread over several processes: the same answers, whatever happens between two passes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.config import EngineConfig
from model.errors import ConfigError
from model.targets.parallel import share_of
from service.settings import Settings
from tests.model import tiny, tiny_qwen
from tests.model.comings import answers

ROOT = Path(__file__).parents[2]


def together(options: dict[str, Any], family: str = "llava") -> dict[str, Any]:
    """Run an engine in a process of its own, with a second process for half of its layers."""
    command = [sys.executable, "-m", "tests.model.comings", json.dumps(options | {"tensor_parallel": 2}), family]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def options(checkpoint: Path, draft: Path | None, **more: Any) -> dict[str, Any]:
    drafting = {"draft": str(draft)} if draft else {"drafter": "off"}
    same = {"device": "cpu", "dtype": "float64", "max_num_seqs": 4, "max_model_len": 256, "adaptive_drafting": False}
    return {"model": str(checkpoint), **drafting, **same, "threads": 1, **more}


def test_two_processes_say_what_one_says(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    """Compare answers with a draft and without."""
    alone = answers(options(tiny_checkpoint, tiny_draft), "llava")
    shared = together(options(tiny_checkpoint, tiny_draft))
    assert shared["plain"] == shared["said"] == shared["guided"] == alone["said"] == alone["plain"]
    assert shared["heads"] * 2 == alone["heads"]
    assert shared["free"] == alone["free"] == 4


def test_another_family_and_load_aware_drafting_say_the_same(tmp_path: Path) -> None:
    checkpoint = tiny_qwen.save_checkpoint(tmp_path / "target", text={"num_key_value_heads": 2})
    draft = tiny.save_draft(tmp_path / "draft", checkpoint)
    alone = answers(options(checkpoint, draft), "qwen")
    shared = together(options(checkpoint, draft, adaptive_drafting=True), "qwen")
    assert shared["plain"] == shared["said"] == shared["guided"] == alone["said"]


def test_who_loses_a_follower_ends_and_followers_end_with_their_leader(tiny_checkpoint: Path) -> None:
    program = (
        "import json, sys, time\nfrom model.config import EngineConfig\nfrom model.engine.engine import Engine\n"
        "engine = Engine(EngineConfig(**json.loads(sys.argv[1])))\nprint('ready', flush=True)\ntime.sleep(120)"
    )
    command = [sys.executable, "-c", program, json.dumps(options(tiny_checkpoint, None, tensor_parallel=2))]
    with ExitStack() as stack:
        leaders = {
            victim: stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for victim in ("follower", "leader")
        }
        for victim, leader in leaders.items():
            stack.callback(leader.kill)
            assert leader.stdout is not None
            assert leader.stdout.readline().strip() == "ready"
            (follower,) = psutil.Process(leader.pid).children()
            os.kill(follower.pid if victim == "follower" else leader.pid, signal.SIGKILL)
            assert leader.wait(30) == (1 if victim == "follower" else -signal.SIGKILL)
            deadline = time.monotonic() + 30
            while follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "a follower outlives its leader"
                time.sleep(0.1)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        share_of(EngineConfig(tensor_parallel=3), 4)
    with pytest.raises(ConfigError, match="at least 1"):
        EngineConfig(tensor_parallel=0)


def test_each_worker_gets_devices_side_by_side() -> None:
    four = Settings(device="cuda:0,1,2,3", tensor_parallel=2)
    assert [(each["device"], each["tensor_parallel"]) for each in four.engine_options()] == [
        ("cuda:0", 2),
        ("cuda:2", 2),
    ]
    for wrong in ("cuda:0,2", "cuda:0,1,2"):
        with pytest.raises(ValueError, match="side by side"):
            Settings(device=wrong, tensor_parallel=2)
