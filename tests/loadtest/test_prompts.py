"""The files for guidellm and aiperf hold pictures that the service can answer questions about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from loadtest.prompts import draw

ROOT = Path(__file__).parents[2]


def test_pictures_and_questions_are_written_for_both_tools(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    command = [sys.executable, "-m", "loadtest.prompts", str(folder), "--number", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for tool, question in (("guidellm", "prompt"), ("aiperf", "text")):
        rows = [json.loads(line) for line in (folder / f"{tool}.jsonl").read_text().splitlines()]
        assert len({row["image"] for row in rows}) == 3
        for row in rows:
            assert row[question]
            assert Path(row["image"]).is_absolute()
            with Image.open(row["image"]) as picture:
                assert picture.size == (192, 192)


def test_a_seed_draws_the_same_questions_again_and_another_seed_others() -> None:
    first, again, other = (
        [(question.prompt, question.files[0].data) for question in draw(4, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again
    assert len({data for _, data in first}) == 4, "the service's caches must not answer for the engine"
    assert not {data for _, data in first} & {data for _, data in other}
