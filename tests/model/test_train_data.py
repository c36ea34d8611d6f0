"""Test the data that a user passes to `flashserve train`: manifests, folders, bad lines, the held-out part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from model.request import Grammar, Medium
from model.train import manifest
from model.train.data import Unusable
from model.train.manifest import Data, File, FilePrompts, Forms
from tests.model import tiny


def decode(path: Path, kind: manifest.Kind | None) -> Medium:
    if path.read_bytes() == b"broken":
        raise Unusable("broken")
    return tiny.image(len(path.name))


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def of(folder: Path, *rows: Any) -> Data:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return manifest.read(folder / "data.jsonl")


def test_a_manifest_names_files_and_prompts_in_each_of_its_ways(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "b.png", "c.mp4")
    picture = {"type": "image", "image": "a.png"}
    asked = {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}
    data = of(
        tmp_path,
        {"image": "a.png", "prompt": "What?"},
        {"image": ["a.png", "b.png"], "video": "c.mp4", "prompt": "Compare."},
        {"media": ["c.mp4"], "prompt": "What?"},
        "",
        {"messages": [{"role": "system", "content": "Be brief."}, asked, {"role": "assistant", "content": "A cat."}]},
        {"prompt": "Only words."},
        {"image": "b.png", "prompt": "What?", "task": "shapes", "max_tokens": 9},
    )
    assert not data.problems
    one, several, any_kind, talk, words, named = data.items
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.mp4"))
    assert one.turns[0].content == (File(a, "image"), "What?")
    assert several.files == (File(a, "image"), File(b, "image"), File(c, "video"))
    assert any_kind.files == (File(c, None),)
    assert [turn.role for turn in talk.turns] == ["system", "user"], "the target writes the answer"
    assert words.files == ()
    assert [item.kind for item in data.items] == ["image", "3 media", "video", "image", "text", "shapes"]
    assert (words.max_tokens, named.max_tokens) == (None, 9)


def test_a_bad_line_is_named_and_the_others_are_used(tmp_path: Path) -> None:
    files(tmp_path, "a.png")
    data = of(
        tmp_path,
        "{not json",
        {"image": "a.png", "prompt": "What?"},
        {"image": "gone.png", "prompt": "What?"},
        {"image": "a.png"},
        ["a.png"],
        {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
        {"messages": [{"role": "assistant", "content": "Nobody asked."}]},
        {"image": 3, "prompt": "What?"},
        {"imagee": "a.png", "prompt": "What?"},
        {"image": "a.png", "prompt": "What?", "promt": "Where?"},
        {"messages": [{"role": "user", "content": "What?"}], "image": "a.png"},
    )
    assert len(data.items) == 1
    assert [problem.split(":")[1] for problem in data.problems] == [*"13456789", "10", "11"]
    assert "unknown key 'imagee'; known here: image, max_tokens, media, prompt, task, video" in data.problems[-3]
    assert "gone.png" in data.problems[1]


def test_a_folder_is_read_to_its_depths_with_every_prompt(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "deep/er/b.MP4", "notes.txt")
    data = manifest.read(tmp_path, ["What?", "Where?"])
    assert [(item.files[0].path.name, item.turns[0].content[1]) for item in data.items] == [
        ("a.png", "What?"),
        ("a.png", "Where?"),
        ("b.MP4", "What?"),
        ("b.MP4", "Where?"),
    ]
    by_itself = manifest.read(tmp_path).items
    assert [item.turns[0].content[1] in manifest.DEFAULT_PROMPTS[item.files[0].kind or "image"] for item in by_itself]


def test_nothing_to_read_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        manifest.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no prompt"):
        manifest.read(tmp_path)
    (tmp_path / "data.jsonl").write_text("oops\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl:1"):
        manifest.read(tmp_path / "data.jsonl")
    with pytest.raises(ConfigError, match="goes with a folder"):
        manifest.read(tmp_path / "data.jsonl", ["What?"])


def test_what_is_held_out_depends_on_the_file_alone(tmp_path: Path) -> None:
    """A picture of the training must not be measured on with another prompt; and data may be moved."""
    names = [f"{number}.png" for number in range(60)]
    files(tmp_path / "here", *names)
    files(tmp_path / "there", *names)
    here = FilePrompts(manifest.read(tmp_path / "here", ["What?", "Where?"]), decode, 0.2)
    there = FilePrompts(manifest.read(tmp_path / "there", ["What?", "Where?"]), decode, 0.2)
    assert (here.train, here.held_out, here.digest) == (there.train, there.held_out, there.digest)
    assert sorted([*here.train, *here.held_out]) == list(range(120))
    assert {number // 2 for number in here.held_out}.isdisjoint(number // 2 for number in here.train)
    assert 8 <= len(here.held_out) <= 44
    (tmp_path / "there" / "0.png").write_bytes(b"another picture")
    assert FilePrompts(manifest.read(tmp_path / "there", ["What?", "Where?"]), decode, 0.2).digest != here.digest


def test_a_little_data_is_split_all_the_same(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "b.png")
    prompts = FilePrompts(manifest.read(tmp_path), decode, 0.001)
    assert (len(prompts.train), len(prompts.held_out)) == (1, 1)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ConfigError, match="too few"):
        FilePrompts(manifest.read(tmp_path), decode, 0.001)
    with pytest.raises(ConfigError, match="held-out"):
        FilePrompts(manifest.read(tmp_path), decode, 0.0)


def test_a_file_that_cannot_be_decoded_is_named_with_its_line(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    data = of(tmp_path, {"image": "a.png", "prompt": "What?"}, {"image": "b.png", "prompt": "What?"})
    prompts = FilePrompts(data, decode, 0.5)
    assert prompts.messages(0)[0].content[1] == "What?"
    with pytest.raises(Unusable, match=r"^data\.jsonl:2: .*b\.png: broken$"):
        prompts.messages(1)
    of_folder = FilePrompts(manifest.read(tmp_path), decode, 0.5)
    with pytest.raises(Unusable, match=r"^[^:]*b\.png: broken$"):
        of_folder.messages(1)


# -- answers that follow grammars


def regex(fields: Any) -> Grammar | None:
    """Know one field, as the service knows many."""
    if "regex" not in fields:
        return None
    if not isinstance(fields["regex"], str):
        raise ValueError("regex: must be a text")
    return Grammar("regex", fields["regex"], "regex")


FORMS = Forms(frozenset({"regex"}), regex)


def test_a_line_says_which_grammar_its_answer_follows(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "b.png")
    rows: list[Any] = [
        {"image": "a.png", "prompt": "How many?", "regex": "[0-9]"},
        {"image": "b.png", "prompt": "How many?"},
        {"prompt": "How many?", "regex": "[a-z]", "task": "letters"},
        {"prompt": "How many?", "regex": 3},
        {"prompt": "How many?", "regexp": "[0-9]"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = manifest.read(tmp_path / "data.jsonl", forms=FORMS)
    assert [item.grammar and item.grammar.source for item in data.items] == ["[0-9]", None, "[a-z]"]
    assert [item.kind for item in data.items] == ["image, regex", "image", "letters"], "figures of their own"
    assert data.problems[0] == "data.jsonl:4: regex: must be a text"
    assert "unknown key 'regexp'" in data.problems[1]
    assert "such as response_format" in data.problems[1]
    prompts = FilePrompts(data, decode, 0.3)
    bound = prompts.grammar(0)
    assert bound is not None
    assert bound.param == "data.jsonl:1: regex", "so that an error names the line"
    assert prompts.grammar(1) is None
    without = manifest.read(tmp_path / "data.jsonl")
    assert "unknown key 'regex'" in without.problems[0], "it would train on answers of another form"
    assert not without.problems[0].endswith("response_format")


def test_data_of_other_grammars_are_other_data(tmp_path: Path) -> None:
    files(tmp_path, "a.png", "b.png")

    def digest(*sources: str | None) -> str:
        rows = [{"image": name, "prompt": "What?"} for name in ("a.png", "b.png")]
        lines = [row | ({"regex": source} if source else {}) for row, source in zip(rows, sources, strict=True)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return FilePrompts(manifest.read(tmp_path / "data.jsonl", forms=FORMS), decode, 0.3).digest

    digests = [digest(None, None), digest("[0-9]", None), digest(None, "[0-9]"), digest("[0-8]", None)]
    assert len(set(digests)) == 4
    assert digest("[0-9]", None) == digests[1]


def test_a_share_of_a_folders_prompts_gets_one_of_the_grammars(tmp_path: Path) -> None:
    files(tmp_path, *(f"{number}.png" for number in range(100)))
    grammars = [Grammar("regex", source) for source in ("[0-9]", "[a-z]")]
    items = manifest.read(tmp_path, ["What?", "Where?"], grammars=grammars, grammar_share=0.3).items
    bound = [item for item in items if item.grammar]
    assert 40 <= len(bound) <= 80
    assert {item.grammar for item in bound} == set(grammars)
    assert {item.turns[0].content[1] for item in bound} == {"What?", "Where?"}
    assert items == manifest.read(tmp_path, ["What?", "Where?"], grammars=grammars, grammar_share=0.3).items
    for share, count in ((0.0, 0), (1.0, 200)):
        read = manifest.read(tmp_path, ["What?", "Where?"], grammars=grammars, grammar_share=share)
        assert sum(item.grammar is not None for item in read.items) == count
    (tmp_path / "data.jsonl").write_text('{"prompt": "What?"}\n')
    with pytest.raises(ConfigError, match="--json-schema goes with a folder"):
        manifest.read(tmp_path / "data.jsonl", grammars=grammars)
