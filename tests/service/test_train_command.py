"""`flashserve train` from the command line: on files, killed without warning, and refused what makes no sense."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from model.config import DEMO_WEIGHTS
from model.engine.engine import Engine
from service.cli import app
from tests.model import tiny

OPTIONS = ("--dtype float32 --device cpu --precision off --steps 40 --batch 2 --anchors 4 --max-tokens 16 --latents 4 "
           "--block 4 --held-out 0.3 --evaluate-every 20 --save-every 0.2 --max-model-len 256").split()  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures, one that is none, and a line that is no JSON."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "prompt": "What do you see?"}))
    (folder / "broken.png").write_bytes(b"this is no picture")
    rows += [json.dumps({"image": "broken.png", "prompt": "What do you see?"}), "{no json"]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "data.jsonl"


def command(target: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["--target", str(target), "--data", str(data), "--output", str(output)]
    return [sys.executable, "-m", "service.cli", "train", *where, *OPTIONS, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_where_it_would_have_ended(
    target: Path, manifest: Path, tmp_path: Path
) -> None:
    """SIGKILL, twice, then SIGTERM, which saves. The same weights, bit for bit, and the same held-out figures."""
    whole = CliRunner().invoke(app, command(target, manifest, tmp_path / "whole")[3:])
    assert whole.exit_code == 0, whole.output
    assert "data.jsonl:10" in whole.stderr
    assert "held-out acceptance length, all:" in whole.stdout
    rng, killed, run = random.Random(7), tmp_path / "killed", tmp_path / "killed" / "run"
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            command(target, manifest, killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        begun = run / ("answers.jsonl" if number == signal.SIGKILL else "state.pt")
        while not begun.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(number)
        process.communicate(timeout=60)
    last = CliRunner().invoke(app, command(target, manifest, killed)[3:])
    assert last.exit_code == 0, last.output
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert all((one[name] == other[name]).all() for name in one)
    told = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "whole", killed)]
    assert told[0]["acceptance_length"] == told[1]["acceptance_length"]
    assert told[0]["draft"]["aux_layers"] == [3], "the last, and only that"
    assert not (killed / "run" / "state.tmp").exists(), "saved beside and moved into place"


def test_a_folder_of_pictures_and_clips_becomes_a_draft_that_is_served(target: Path, tmp_path: Path) -> None:
    """In this process, from real files; one of them is broken, which is found when it is to be answered."""
    data = tmp_path / "data"
    (data / "clips").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 64, 64, 3), np.uint8)
        Image.fromarray(pixels[0]).save(data / f"{number}.png")
        with av.open(str(data / "clips" / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=6)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    for number in range(4):
        (data / f"broken{number}.png").write_bytes(b"this is no picture")
    output = tmp_path / "draft"
    where = ["--target", str(target), "--data", str(data), "--output", str(output), "--drafter", "medusa"]
    quick = ["--steps", "2", "--batch", "2", "--max-tokens", "8", "--num-frames", "2", "--held-out", "0.4"]
    exact = ["--device", "cpu", "--dtype", "float32", "--precision", "off", "--max-model-len", "256"]
    result = CliRunner().invoke(app, ["train", *where, *quick, *exact, "--prompt", "What is this?"])
    assert result.exit_code == 0, result.output
    assert f"--draft {output}" in result.output
    told = json.loads((output / "config.json").read_text())
    assert (told["drafter"], told["draft"]["aux_layers"]) == ("medusa", [3])
    assert "12 prompts (8 of image, 4 of video)" in told["data"]
    unusable = (output / "run" / "answers.jsonl").read_text().count("unusable")
    assert unusable > 0
    assert unusable == (output / "README.md").read_text().count(f"- {data}/broken"), "told in the card"
    engine = Engine(tiny.config(target, draft=str(output), max_num_seqs=2))
    answers = tiny.drain(engine, [tiny.ask("x", tiny.image(1), "What is this?", max_tokens=8)])
    assert len(tiny.token_ids(answers["x"])) == 8
    assert engine.pop_stats().drafts > 0


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
CLOSED = {**SCHEMA, "additionalProperties": False}
SHORT = ["--steps", "2", "--batch", "2", "--anchors", "2", "--max-tokens", "24", "--evaluate-every", "0"]
SHORT += ["--final-prompts", "1", "--precision", "off", "--device", "cpu", "--temperatures", "1"]


def pictures(folder: Path, count: int) -> list[str]:
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def written(output: Path) -> list[str]:
    """Return the texts of the bundled target's answers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "target")
    rows = map(json.loads, (output / "run" / "answers.jsonl").read_text().splitlines())
    return [tokenizer.decode(row["answer"], skip_special_tokens=True) for row in rows if "answer" in row]


def test_answers_have_the_form_that_their_lines_ask_for(tmp_path: Path) -> None:
    """With the fields of a request over HTTP, of any server that we understand; a bad one is reported with its line."""
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"structured_outputs": {"json": CLOSED}},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": SCHEMA},
    ]
    names = pictures(tmp_path, 6)
    rows = [{"image": name, "prompt": "How many?", **form} for name in names for form in forms]
    wrong = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}
    rows += [{"image": name, "prompt": "How many?", **wrong} for name in names]
    bad: list[dict[str, Any]] = [
        {"response_format": {"type": "jason"}},
        {"response_format": {"type": "json_object"}, "regex": "[0-9]"},
        {"response_form": {"type": "json_object"}},
    ]
    rows += [{"image": names[0], "prompt": "How many?", **form} for form in bad]
    data, output = tmp_path / "data.jsonl", tmp_path / "draft"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--data", str(data), "--output", str(output), "--held-out", "0.1", *SHORT]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    texts = written(output)
    assert len(texts) >= 12
    assert all(re.fullmatch(r'\{"n": [0-9]\}', text) for text in texts), "no other property, as serving has it"
    assert "held-out acceptance length, all" in result.stdout
    assert "of image, JSON" in json.loads((output / "config.json").read_text())["data"]
    assert "data.jsonl:31: response_format.type: Invalid enum value 'jason'" in result.stderr
    assert "data.jsonl:32: response_format and regex both say" in result.stderr
    assert "data.jsonl:33: unknown key 'response_form'" in result.stderr
    reason = r"- data\.jsonl:(2[5-9]|30): response_format\.json_schema\.schema: the json schema cannot be compiled"
    assert 4 <= len(re.findall(reason, (output / "README.md").read_text())) <= 5, "but for those held out"
    rows[0]["response_format"] = {"type": "json_object"}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "holds a training of other settings (data was" in result.stderr


def test_a_share_of_a_folders_answers_follows_the_schemas_of_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pictures(tmp_path / "data", 6)
    files = {"n": json.dumps(SCHEMA), "list": "[1]", "bad": '{"type": "strin"}', "not": "{", "empty": ""}
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    where = ["train", "--data", str(tmp_path / "data"), "--held-out", "0.1"]

    def attempt(output: str, *schemas: str, more: tuple[str, ...] = ()) -> Any:
        named = [word for schema in schemas for word in ("--json-schema", str(tmp_path / f"{schema}.json"))]
        return CliRunner().invoke(app, [*where, "--output", str(tmp_path / output), *SHORT, *named, *more])

    result = attempt("draft", "n", more=("--schema-share", "0.5", "--init", str(DEMO_WEIGHTS / "draft")))
    assert result.exit_code == 0, result.output
    texts = written(tmp_path / "draft")
    assert 0 < sum(bool(re.fullmatch(r'\{"n": [0-9]\}', text)) for text in texts) < len(texts)
    assert attempt("draft", "n", more=("--schema-share", "0.6")).exit_code == 1
    for schema, reason in (
        ("list", "is not a JSON object"),
        ("bad", "cannot be compiled"),
        ("not", "is not a JSON object"),
        ("empty", "the file is empty"),
        ("gone", "cannot be read: No such file"),
    ):
        result = attempt("new", "n", schema)
        assert result.exit_code == 1
        assert re.search(rf"--json-schema:? '?{tmp_path / schema}\.json", result.stderr), result.stderr
        assert reason in result.stderr, result.stderr
    assert attempt("new", "n", more=("--schema-share", "1.5")).exit_code == 2
    assert not (tmp_path / "new").exists()


def complaint(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *arguments])
    return result.exit_code, result.output


def test_what_makes_no_sense_is_refused_by_name(target: Path, manifest: Path, tmp_path: Path) -> None:
    where = ["--target", str(target), "--data", str(manifest), "--output", str(tmp_path / "out")]
    for more, told in (
        (["--drafter", "ngram"], "--drafter"),
        (["--steps", "3", "--epochs", "2"], "not both"),
        (["--steps", "0"], "--steps"),
        (["--save-every", "90"], "--save-every"),
        (["--precision", "fp8"], "--precision"),
        (["--temperatures", "warm"], "--temperatures"),
    ):
        code, text = complaint(*where, *more)
        assert (code, told in text) == (2, True), text
    for more, told in (
        (["--strict"], "1 lines are unusable"),
        (["--prompt", "What?"], "goes with a folder"),
        (["--hidden-size", "100"], "multiple of 64"),
        (["--drafter", "medusa", "--latents", "4"], "num_latents"),
        (["--target", str(tmp_path / "nothing")], "cannot be loaded"),
    ):
        code, text = complaint(*where, *more, "--device", "cpu")
        assert (code, told in text) == (1, True), text
    assert not (tmp_path / "out").exists()


def test_help_loads_no_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "service.cli", "train", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "docs/training.md" in result.stdout
    assert " torch\n" not in result.stderr
