"""`flashserve serve` of a checkpoint that cannot be served: one sentence of why, its exit code, and no process left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model import tiny
from tests.model.test_checkpoint import ONE_FILE

ROOT = Path(__file__).parents[2]
FAULTS = ("cut off", "a tensor is missing", "remote code")
TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("whole") / "target")


def serve(folder: Path, *options: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(folder), "--port", "0", "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--hf-token", TOKEN, "--log-level", "debug", *options],
        env=env | {"PYTHONPATH": str(ROOT), "FLASH_MEDIA_WORKERS": "1", "FLASH_VIDEO_WORKERS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_it_ends_with_the_reason_and_leaves_no_worker(whole: Path, tmp_path: Path) -> None:
    """Tried again eight times, a wrong checkpoint would keep a service looking as if it still loaded."""
    processes = {}
    for fault in FAULTS:
        folder = shutil.copytree(whole, tmp_path / fault)
        ONE_FILE[fault][0](folder)
        processes[fault] = serve(folder)
    for fault, process in processes.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1, output
        (line,) = [line for line in output.splitlines() if re.search(r"loading failed|cannot be served: ", line)][:1]
        assert re.search(ONE_FILE[fault][1], line), output
        assert "Traceback" not in output
        assert "restart" not in output
        assert TOKEN not in output
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_a_token_that_cannot_be_sent_is_refused(whole: Path) -> None:
    process = serve(whole, "--hf-token", "with a\nline")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--hf-token (FLASH_HF_TOKEN): a key must be printable ASCII" in output


def test_options_of_the_hub_reach_the_worker() -> None:
    from model.config import EngineConfig
    from service.settings import Settings, holds_keys

    (options,) = Settings(model="a/b", revision="v1", hf_token=TOKEN, trust_remote_code=True).engine_options()  # type: ignore[arg-type]
    config = EngineConfig(**options)
    assert (config.revision, config.hf_token, config.trust_remote_code) == ("v1", TOKEN, True)
    assert TOKEN not in repr(config)
    assert holds_keys("FLASH_HF_TOKEN")
    assert not holds_keys("HF_TOKEN")
    (options,) = Settings().engine_options()
    assert "hf_token" not in options
    assert EngineConfig(**options).trust_remote_code is False


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"revision": "a1b2"}, {"revision"}), ({"hf_token": TOKEN}, {"token"}), ({}, set())],
    ids=["revision", "token", "neither"],
)
def test_every_file_is_asked_for_with_them(
    settings: dict[str, str], names: set[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another revision would be a mixture of two models."""
    from transformers.utils import hub

    from model.engine.engine import Engine

    seen: list[dict[str, object]] = []
    original = hub.cached_files

    def cached_files(path_or_repo_id: str, filenames: list[str], **options: object) -> object:
        if str(path_or_repo_id) == str(whole):
            seen.append({"files": filenames, **{name: options.get(name) for name in ("revision", "token")}})
        return original(path_or_repo_id, filenames, **options)

    monkeypatch.setattr(hub, "cached_files", cached_files)
    Engine(tiny.config(whole, **settings))
    assert len(seen) > 4
    for each in seen:
        for name, value in (("revision", settings.get("revision")), ("token", settings.get("hf_token"))):
            if name in names:
                assert each[name] == value, each
            else:
                assert each[name] in (None, "main"), each
