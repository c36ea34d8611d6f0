"""`flashserve generate` answers like the engine and the route, within the same limits."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from model.engine.engine import Engine
from service.cli import app
from service.commands.generate import STRUCTURED_OPTIONS, generate
from service.schemas.media_options import MediaFields
from service.schemas.sampling import SamplingFields
from service.schemas.structured import StructuredFields, StructuredOutputs
from tests.model import tiny

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "number": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "number"],
}


def models(checkpoint: Path, draft: Path) -> list[str]:
    return ["--model", str(checkpoint), "--draft", str(draft), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(tiny.picture(0)[0]).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_generate_prints_the_answer_of_the_engine(
    tiny_checkpoint: Path, tiny_draft: Path, plain_engine: Engine, picture: Path
) -> None:
    request = tiny.ask("a", tiny.image(0), "Describe the image.", max_tokens=10, ignore_eos=False)
    expected = tiny.text_of(tiny.drain(plain_engine, [request])["a"])
    options = ["generate", "--image", str(picture), "--prompt", "Describe the image.", "--max-tokens", "10"]
    options += models(tiny_checkpoint, tiny_draft)
    plain = CliRunner().invoke(app, options)
    assert (plain.exit_code, plain.stdout) == (0, expected + "\n")
    answer = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert answer["text"] == expected
    assert set(answer) == {"text", "finish_reason", "usage", "speculation", "timings"}
    assert answer["usage"]["completion_tokens"] <= 10
    assert answer["speculation"]["drafts"] > 0
    assert answer["timings"]["time_to_first_token"] > answer["timings"]["media"] > 0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--temperature", "5"], "temperature: Expected `float` <= 2.0"),
        (["--min-tokens", "9", "--max-tokens", "8"], "--min-tokens must be at most --max-tokens"),
        (["--speculation", "maybe"], "speculation: Invalid enum value"),
        (["--num-frames", "33", "--fps", "1"], "send --num-frames or fps, not both"),
        (["--drafter", "eagle"], "one for --drafter flash"),
        (["--model", "/nowhere"], "model '/nowhere' cannot be loaded: there is no such folder"),
        (["--model", "./nowhere"], "there is no such folder"),
    ],
)
def test_generate_explains_what_it_cannot_do(more: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["generate", "--prompt", "hello", *more])
    assert done.exit_code == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_takes_what_the_route_takes(
    tiny_checkpoint: Path, tiny_draft: Path, plain_engine: Engine, picture: Path
) -> None:
    """A second list of fields and ranges once lacked the fields that were added later."""
    names = set(inspect.signature(generate).parameters)
    not_for_one_answer = {"n", "stream", "logprobs", "top_logprobs", "logit_bias", "cache_salt"}
    # Other servers' names of structured output are the HTTP API's alone; of media_io_kwargs there are --fps and others.
    of_clients = set(StructuredFields.__struct_fields__) - set(MediaFields.__struct_fields__) | {"media_io_kwargs"}
    of_clients |= {"include_stop_str_in_output", "skip_special_tokens"}
    assert set(SamplingFields.__struct_fields__) - not_for_one_answer - of_clients <= names
    params: dict[str, Any] = {
        "ignore_eos": True,
        "repetition_penalty": 3.0,
        "presence_penalty": 2.0,
        "frequency_penalty": -1.0,
    }
    request = tiny.ask("a", tiny.image(0), "Describe the image.", max_tokens=12, min_tokens=4, **params)
    expected = tiny.text_of(tiny.drain(plain_engine, [request])["a"])
    options = ["generate", "--image", str(picture), "--prompt", "Describe the image.", "--max-tokens", "12", "--json"]
    options += ["--min-tokens", "4", "--ignore-eos", "--repetition-penalty", "3", "--presence-penalty", "2"]
    options += ["--frequency-penalty", "-1", "--top-k", "-1", "--speculation", "off"]
    answer = json.loads(CliRunner().invoke(app, [*options, *models(tiny_checkpoint, tiny_draft)]).stdout)
    assert (answer["text"], answer["speculation"]["drafts"]) == (expected, 0)
    assert answer["usage"]["completion_tokens"] == 12


def test_generate_has_the_limits_of_the_service(
    tiny_checkpoint: Path, tiny_draft: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["generate", "--prompt", "hello", "--image", str(picture), *models(tiny_checkpoint, tiny_draft)]

    def complaint(*more: str) -> str:
        done = CliRunner().invoke(app, [*options, *more])
        assert done.exit_code == 1
        return done.stderr

    assert "--num-frames is for videos, and there is none" in complaint("--num-frames", "2")
    monkeypatch.setenv("FLASH_MAX_FRAMES", "3")
    assert "--num-frames must be at most 3" in complaint("--num-frames", "4")
    monkeypatch.setenv("FLASH_MAX_PIXELS", "64")
    assert "pixels" in complaint()
    monkeypatch.setenv("FLASH_PORT", "abc")
    assert "--port (FLASH_PORT): Input should be a valid integer" in complaint()


def test_generate_keeps_the_answer_to_a_form(tiny_checkpoint: Path, tiny_draft: Path, tmp_path: Path) -> None:
    """The same with speculation and without."""
    (tmp_path / "schema.json").write_text("\ufeff" + json.dumps(SCHEMA), "utf-8")
    (tmp_path / "rules.gbnf").write_text('root ::= "a" [0-9] [0-9]')
    (tmp_path / "rules.lark").write_text('start: "b" /[0-9]{3}/')
    text = r'\{"colour": "(?:red|blue)", "number": [0-9]\}'
    forms = {
        ("--json-schema", str(tmp_path / "schema.json")): text,
        ("--json-schema", " " + json.dumps(SCHEMA)): text,
        ("--json-object",): r"\{.*",
        ("--regex", "[a-c]{5}"): "[a-c]{5}",
        ("--choice", "a cat", "--choice", "a, b"): "a cat|a, b",
        ("--grammar", str(tmp_path / "rules.gbnf")): "a[0-9]{2}",
        ("--grammar", str(tmp_path / "rules.lark")): "b[0-9]{3}",
    }
    for form, pattern in forms.items():
        options = ["generate", "--prompt", "hello", "--max-tokens", "60", *models(tiny_checkpoint, tiny_draft), *form]
        answers = {CliRunner().invoke(app, [*options, "--speculation", each]).stdout for each in ("auto", "off")}
        assert len(answers) == 1
        assert re.fullmatch(pattern, answers.pop().removesuffix("\n"), re.DOTALL), form


def test_every_form_of_structured_outputs_has_an_option() -> None:
    ways = {"disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
    of_servers = ways | {"backend", "structural_tag"}
    assert set(STRUCTURED_OPTIONS) == set(StructuredOutputs.__struct_fields__) - of_servers


def test_generate_ends_at_a_token(tiny_checkpoint: Path, tiny_draft: Path, plain_engine: Engine) -> None:
    request = tiny.ask("a", "Say it. ", max_tokens=20)
    ids = tiny.token_ids(tiny.drain(plain_engine, [request])["a"])
    ending = next(id for place, id in enumerate(ids) if place > 3 and id not in ids[:place])
    options = ["generate", "--prompt", "Say it. ", "--max-tokens", "20", "--json", "--ignore-eos"]
    options += ["--stop-token-id", str(max(ids) + 1), "--stop-token-id", str(ending)]
    answer = json.loads(CliRunner().invoke(app, [*options, *models(tiny_checkpoint, tiny_draft)]).stdout)
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(ending) + 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--regex", "["], "--regex: the regex cannot be compiled: .*unclosed character class"),
        (["--json-schema", '{"type": "strin"}'], "--json-schema: the json schema cannot be compiled: .*strin"),
        (["--json-schema", "{nope"], "--json-schema is not a JSON object"),
        (["--json-schema", "/nowhere.json"], "--json-schema: '/nowhere.json' cannot be read: No such file"),
        (["--grammar", "/no_json_schema"], "--grammar: '/no_json_schema' cannot be read: No such file"),
        (["--grammar", "PICTURE"], "--grammar: '.*picture.png' is not text in UTF-8"),
        (["--json-object", "--regex", "a"], "--regex and --json-object both say what the answer must look like"),
        (["--choice", "a", "--choice", "b" * (1 << 20)], "--choice has 10485.. bytes; at most 65536 are allowed"),
        (["--stop-token-id", "99999999"], "--stop-token-id names token 99999999; tokens are"),
        (["--mm-processor-kwargs", '{"a": 1}'], r"--mm-processor-kwargs\.a is not .*known are min_pixels"),
        (["--min-tokens", "9", "--max-tokens", "8"], "--min-tokens must be at most --max-tokens, 8"),
        (["--num-frames", "2"], "--num-frames is for videos, and there is none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_generate_names_options_as_they_were_typed(more: list[str], complaint: str, picture: Path) -> None:
    more = [str(picture) if each == "PICTURE" else each for each in more]
    done = CliRunner().invoke(app, ["generate", "--prompt", "hello", *more])
    assert done.exit_code == 1
    assert re.search(complaint, done.stderr)
    assert "Traceback" not in done.stderr
