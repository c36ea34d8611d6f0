"""Layers spread over several processes: the same answers, whatever happens between two passes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.config import ConfigError, EngineConfig
from model.parallel import share_of
from service.settings import Settings
from tests.model import tiny, tiny_qwen

# One engine with a group a process, so each runs in its own. Requests join and leave, one is aborted, slots are moved.
PROGRAM = """
import json, sys
from model.config import EngineConfig
from model.engine import Engine
from model.request import Message, Request, SamplingParams
from tests.model import tiny, tiny_qwen
from tests.model.oracle import OracleDrafter

options = json.loads(sys.argv[1])
family = tiny if sys.argv[2] == "llava" else tiny_qwen
engine = Engine(EngineConfig(**options))

def ask(said, number, **params):
    medium = family.video(number) if number % 3 == 2 else family.image(number)
    said[str(number)] = []
    params = SamplingParams(max_tokens=8 + 3 * number, seed=number, **params)
    engine.add(Request(str(number), (Message("user", (medium, f"What is it, number {number}?")),), params))

def steps(said, count):
    while count and engine.has_work:
        for output in engine.step():
            said[output.request_id] += [token.id for token in output.tokens]
        count -= 1

def play():
    said = {}
    for number in range(3):
        ask(said, number)
    steps(said, 5)
    ask(said, 3, temperature=0.8, top_p=0.9)
    ask(said, 4)
    steps(said, 4)
    engine.abort("1")
    steps(said, 3)
    ask(said, 5, temperature=1.0)
    steps(said, -1)
    del said["1"]  # when it ended depends on how much each step says
    engine.cache.check_integrity()
    return said

said = play()
engine.use(OracleDrafter(engine, {**said, "1": [0] * 64}, 0, truth=0.6))  # trees of which every path is taken at times
print(json.dumps({"said": said, "guided": play(), "heads": engine.cache.num_heads, "free": engine.cache.num_free}))
"""


def answers(options: dict[str, Any], family: str = "llava") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options), family],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def options(checkpoint: Path, draft: Path | None, **more: Any) -> dict[str, Any]:
    drafting = {"draft": str(draft)} if draft else {"drafter": "off"}
    same = {"device": "cpu", "dtype": "float64", "max_num_seqs": 4, "max_model_len": 256, "load_aware": False}
    return {"model": str(checkpoint), **drafting, **same, "threads": 1, **more}


def test_two_processes_say_what_one_says(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    for draft in (tiny_draft, None):
        alone = answers(options(tiny_checkpoint, draft))
        together = answers(options(tiny_checkpoint, draft, tensor_parallel=2))
        assert together["said"] == together["guided"] == alone["said"]
        assert together["heads"] * 2 == alone["heads"]
        assert together["free"] == alone["free"] == 4


def test_another_family_and_load_aware_drafting_say_the_same(tmp_path: Path) -> None:
    checkpoint = tiny_qwen.save_checkpoint(tmp_path / "target", text={"num_key_value_heads": 2})
    draft = tiny.save_draft(tmp_path / "draft", checkpoint)
    alone = answers(options(checkpoint, draft), "qwen")
    together = answers(options(checkpoint, draft, tensor_parallel=2, load_aware=True), "qwen")
    assert together["said"] == together["guided"] == alone["said"]


def test_who_loses_a_follower_ends_and_followers_end_with_their_leader(tiny_checkpoint: Path) -> None:
    program = (
        "import json, sys, time\nfrom model.config import EngineConfig\nfrom model.engine import Engine\n"
        "engine = Engine(EngineConfig(**json.loads(sys.argv[1])))\nprint('ready', flush=True)\ntime.sleep(120)"
    )
    for victim in ("follower", "leader"):
        command = [sys.executable, "-c", program, json.dumps(options(tiny_checkpoint, None, tensor_parallel=2))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
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
