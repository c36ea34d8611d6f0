"""The study of draft shapes, from nothing to its table, on the second bundled target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.bench import study
from model.demo import prompts


def test_variants_are_trained_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "study", tmp_path / "told"
    asked = ["--folder", str(folder), "--only", "base,pool-2,latents-all", "--examples", "20", "--steps", "2"]
    study.main([*asked, "--held-out", "1", "--output", str(output)])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {name: each["cost"]["rows"] for name, each in told["variants"].items()}
    text = rows["base"] - 16
    assert rows["pool-2"] == text + 2
    assert rows["latents-all"] > text + 1_000, "a video of 64 frames"
    for each in told["variants"].values():
        assert set(each["acceptance"]) == {"all", *prompts.KINDS}
        assert all(1.0 <= kind["length"] <= 8.0 for kind in each["acceptance"].values())
        nodes = sum(count for _, _, count in each["acceptance"]["all"]["calibration"])
        assert nodes > each["acceptance"]["all"]["drafts"], "every draft has several"
        assert 0.0 < each["acceptance"]["all"]["miscalibration"] < 1.0
        assert each["cost"]["held_kib"] == each["cost"]["rows"] * 2 * 2 * 256 * 2 / 1024
    assert [row["chain"] for row in told["served"]] == [False] * 6 + [True]
    assert "latents-all" in (output / "study.txt").read_text()
    weights = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in rows}
    study.main([*asked, "--held-out", "1"])  # goes on where it was: at the end
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert weights == {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in rows}
    assert {n: e["acceptance"] for n, e in again["variants"].items()} == {
        n: e["acceptance"] for n, e in told["variants"].items()
    }
