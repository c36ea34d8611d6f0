"""Test that benchmark and equality check run on a user's own files, or name the line that they cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from model.bench import __main__ as bench
from model.bench import profile
from model.errors import ConfigError
from model.train import manifest
from service.cli import app
from tests.media import samples
from tests.model import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two images of different sizes and a video."""
    for number in range(2):
        Image.fromarray(tiny.picture(number)[0]).resize((40 + 9 * number, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "clip.mp4").write_bytes(samples.video_bytes("mp4"))
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def invoke(checkpoint: Path, draft: Path, data: Path, *more: str) -> Result:
    models = ["--model", str(checkpoint), "--draft", str(draft), "--device", "cpu", "--dtype", "float32"]
    return CliRunner().invoke(app, ["bench", *models, "--dataset", str(data), "--max-tokens", "6", *more])


def test_every_task_of_a_file_is_a_row_with_the_answers_as_long_as_its_lines_say(
    tiny_checkpoint: Path, tiny_draft: Path, folder: Path
) -> None:
    data = write(
        folder,
        {"image": "0.png", "prompt": "What is this?"},
        {"image": ["0.png", "1.png"], "prompt": "Compare the two.", "task": "mixed", "max_tokens": 3},
        {"video": "clip.mp4", "prompt": "What happens?"},
        {"prompt": "Say hello.", "task": "mixed", "max_tokens": 5},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"}]}]},
    )
    done = invoke(tiny_checkpoint, tiny_draft, data, "--batches", "1,2", "--repeats", "1", "--prompts", "2")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    tasks, arms = ("image", "mixed", "video"), ("generate", "off", "flash")
    expected = [(task, batch, arm) for task in tasks for batch in (1, 2) for arm in arms]
    assert [(row["task"], row["batch"], row["drafter"]) for row in rows] == expected
    for row in rows:
        assert row["same_tokens_as_plain"] == 1.0, row
        assert row["requests"] == 2, "a task with one line is asked it twice"
        assert 0 < row["tokens"] <= (8 if row["task"] == "mixed" else 12)
    assert max(row["tokens"] for row in rows if row["task"] == "mixed") > 6, "no answer was as long as its line allows"


def test_the_equality_check_runs_on_a_file(tiny_checkpoint: Path, tiny_draft: Path, folder: Path) -> None:
    data = write(
        folder,
        {"image": "0.png", "prompt": "What is this?"},
        {"video": "clip.mp4", "prompt": "What happens?", "max_tokens": 4},
        {"media": ["1.png", "clip.mp4"], "prompt": "Compare."},
    )
    output = folder / "figures.json"
    done = invoke(tiny_checkpoint, tiny_draft, data, "--equality", "--quick", "--output", str(output))
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert result["passed"]
    assert (result["cases"], result["max_tokens"]) == (3, 6)
    assert result["command"].startswith("flashserve bench --equality --model")
    generated = next(row for row in result["comparisons"] if row["comparison"] == "generate = plain")
    assert (generated["requests"], generated["differences"]) == (3, 0)
    assert generated["tokens"] <= 6 + 4 + 6


def test_without_the_service_images_are_measured_and_videos_are_refused(
    tiny_checkpoint: Path,
    tiny_draft: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "BYTES_MOVED", 1 << 22)
    monkeypatch.setattr(profile, "MATRIX", 64)
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "float32", "--max-tokens", "4"]
    options += ["--drafters", "off", "--batches", "2", "--profile", "--dataset"]
    bench.main([*options, str(write(folder, {"image": "0.png", "prompt": "What?", "task": "cats"}))])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["task"] == "cats"
    assert {row["step"] for row in result["rows"]} == {"prompt", "decode"}
    data = write(
        folder, {"image": "0.png", "prompt": "What?"}, {"media": "clip.mp4", "prompt": "What?", "task": "image"}
    )
    with pytest.raises(ConfigError, match=r"^data\.jsonl:2: .*clip\.mp4: videos are decoded by the service"):
        bench.main([*options, str(data)])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"image": "0.png"}, "prompt: is missing"),
        ({"image": "0.png", "prompt": ""}, "prompt: must be a text that is not empty"),
        ({"image": "gone.png", "prompt": "What?"}, "image: no such file: .*gone.png"),
        ({"video": "gone.mp4", "prompt": "What?"}, "video: no such file: .*gone.mp4"),
        ({"media": {"path": "0.png"}, "prompt": "What?"}, "media: must be a path or a list of paths"),
        ({"image": "0.png", "prompt": "What?", "task": 3}, "task: must be a text"),
        (
            {"image": "0.png", "prompt": "What?", "max_tokens": 0},
            "max_tokens: must be a whole number, at least 1; got 0",
        ),
        ({"image": "0.png", "prompt": "What?", "max_tokens": "8"}, "max_tokens: .* got '8'"),
        ({"image": "0.png", "prompt": "What?", "max_tokens": True}, "max_tokens: .* got True"),
        (
            {"image": "0.png", "prompt": "What?", "max_token": 8},
            "unknown key 'max_token'; known here: image, max_tokens",
        ),
        ({"messages": "What?"}, "messages: must be a list"),
        ({"messages": [{"role": "user"}]}, "messages: content must be"),
        ({"messages": [{"role": "robot", "content": "What?"}]}, 'messages: each needs a "role"'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image: is missing"),
        ({"messages": [{"role": "user", "content": ["What?"]}]}, 'messages: a part\'s "type"'),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_field(folder: Path, row: dict[str, Any], complaint: str) -> None:
    data = write(folder, {"image": "0.png", "prompt": "What?"}, row)
    with pytest.raises(ConfigError, match=rf"(?s)--dataset: 1 unusable:\n  data\.jsonl:2: {complaint}"):
        bench.main(["--dataset", str(data), "--model", "/nowhere"])  # refused before the model is loaded


@pytest.mark.parametrize(
    ("row", "more", "complaint"),
    [
        (
            {"image": "notes.txt", "prompt": "What?"},
            (),
            "data.jsonl:2: {folder}/notes.txt: the medium's format is not known",
        ),
        ({"image": "clip.mp4", "prompt": "What?"}, (), "data.jsonl:2: {folder}/clip.mp4: the medium was sent as image"),
        ({"prompt": "word " * 900, "task": "image"}, (), "data.jsonl:2: the prompt is too long"),
        ({"prompt": "What?"}, ("--tasks", "clips,text"), "--tasks: no prompt is of 'clips'; there are image, text"),
        (
            {"image": "notes.txt", "prompt": "What?"},
            ("--equality",),
            "data.jsonl:2: {folder}/notes.txt: the medium's format is not known",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    tiny_checkpoint: Path, tiny_draft: Path, folder: Path, row: dict[str, Any], more: tuple[str, ...], complaint: str
) -> None:
    (folder / "notes.txt").write_text("no picture")
    data = write(folder, {"image": "0.png", "prompt": "What?"}, row)
    options = more if "--equality" in more else ("--drafters", "off", "--batches", "1", *more)
    done = invoke(tiny_checkpoint, tiny_draft, data, *options)
    assert done.exit_code == 1
    assert f"flashserve: {complaint.format(folder=folder)}" in done.stderr
    assert "Traceback" not in done.output


def test_a_folder_is_a_dataset_and_a_file_that_is_not_there_is_none(folder: Path) -> None:
    assert {item.kind for item in manifest.read(folder).items} == {"image", "video"}
    with pytest.raises(ConfigError, match="neither a folder nor a JSONL file"):
        bench.main(["--dataset", str(folder / "gone.jsonl")])
    done = CliRunner().invoke(app, ["bench", "--dataset", str(folder), "--image", "0.png", "--prompt", "What?"])
    assert done.exit_code == 2
    assert "--dataset" in done.stderr


def test_answers_follow_what_their_lines_ask_for(tiny_checkpoint: Path, tiny_draft: Path, folder: Path) -> None:
    """With the fields of a request; and not where transformers answers, which knows none."""
    choice = {"structured_outputs": {"choice": ["red", "green"]}}
    data = write(
        folder,
        {"image": "0.png", "prompt": "What is this?", "max_tokens": 40, "regex": "[0-9]{20}"},
        {"image": "0.png", "prompt": "Which colour?", "max_tokens": 40, **choice},
        {"image": "1.png", "prompt": "What is this?", "max_tokens": 4},
    )
    once = ("--batches", "1", "--repeats", "1", "--prompts", "1")
    done = invoke(tiny_checkpoint, tiny_draft, data, *once, "--drafters", "off,flash")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["task"] for row in rows} == {"image, regex", "image, choice", "image"}
    assert all(row["same_tokens_as_plain"] == 1.0 for row in rows)
    longest = {row["task"]: row["tokens"] for row in rows}
    assert longest["image"] == 4
    assert longest["image, choice"] < 10 < longest["image, regex"] <= 21
    refused = invoke(tiny_checkpoint, tiny_draft, data, *once)
    assert refused.exit_code == 1
    assert "data.jsonl:1: transformers' generate follows no grammars" in refused.stderr
    bad = write(folder, {"image": "0.png", "prompt": "What?", "json_schema": {"type": "strin"}})
    refused = invoke(tiny_checkpoint, tiny_draft, bad, *once, "--drafters", "off")
    assert refused.exit_code == 1
    assert "data.jsonl:1: json_schema: the json schema cannot be compiled" in refused.stderr
