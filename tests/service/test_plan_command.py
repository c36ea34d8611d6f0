"""`flashserve plan` prints what a model takes, from its config alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from tests.families.published import FOLDER


def plan(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", "--device", "cpu", "--dtype", "bfloat16", *options])
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(FOLDER / "Qwen3-VL-8B-Instruct.json", tmp_path / "config.json")
    return tmp_path


def test_it_says_what_fits(folder: Path) -> None:
    code, output = plan("--model", str(folder), "--memory", "64")
    assert code == 0, output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert float(rows["weights"][0]) == pytest.approx(16721, rel=0.1)  # 8.77 billion numbers
    assert float(rows["32768"][0]) == pytest.approx(4.5 * 1024, rel=0.02)
    assert int(rows["32768"][1]) == (64 * 1024 * 0.9 - float(rows["weights"][0]) - 256) // float(rows["32768"][0])
    assert "262144" not in rows


def test_what_does_not_fit_is_an_error(folder: Path) -> None:
    code, output = plan("--model", str(folder), "--memory", "20", "--max-model-len", "32768")
    assert code == 1
    assert "not even one sequence of 32768 tokens fits" in output
    assert "--max-model-len" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--max-model-len", "3"], "--max-model-len"),
        (["--model", "/"], "config.json"),
    ],
    ids=["no folder", "a bad number", "no checkpoint"],
)
def test_errors_are_sentences(options: list[str], message: str) -> None:
    code, output = plan(*options)
    assert code == 1
    assert message in output
