"""The study of draft shapes, from nothing to its table, on a tiny Qwen2.5-VL: the family of its own target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.bench import study
from model.demo import prompts
from tests.model import tiny_qwen

WIDTH = 64


def test_variants_are_trained_measured_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "MAX_TOKENS", 8)
    target = tiny_qwen.save_checkpoint(tmp_path / "target", text={"max_position_embeddings": prompts.ROOM})
    folder, output = tmp_path / "study", tmp_path / "told"
    asked = ["--model", str(target), "--folder", str(folder), "--only", "base,pool-2,latents-all"]
    asked += ["--examples", "20", "--steps", "2", "--held-out", "1"]
    study.main([*asked, "--output", str(output)])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {name: each["cost"]["rows"] for name, each in told["variants"].items()}
    text = rows["base"] - 16
    assert rows["pool-2"] == text + 2
    assert rows["latents-all"] == text + 16 // tiny_qwen.TOGETHER * tiny_qwen.MOST, "a video of 16 frames"
    for each in told["variants"].values():
        assert set(each["acceptance"]) == {"all", *prompts.KINDS}
        assert all(1.0 <= kind["length"] <= 8.0 for kind in each["acceptance"].values())
        nodes = sum(count for _, _, count in each["acceptance"]["all"]["calibration"])
        assert nodes > each["acceptance"]["all"]["drafts"], "every draft has several"
        assert 0.0 < each["acceptance"]["all"]["miscalibration"] < 1.0
        assert each["cost"]["held_kib"] == each["cost"]["rows"] * 2 * 2 * WIDTH * 2 / 1024
    assert [row["chain"] for row in told["served"]] == [False] * 6 + [True]
    assert "latents-all" in (output / "study.txt").read_text()
    weights = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in rows}
    study.main(asked)  # goes on where it was: at the end
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert weights == {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in rows}
    assert {n: e["acceptance"] for n, e in again["variants"].items()} == {
        n: e["acceptance"] for n, e in told["variants"].items()
    }
