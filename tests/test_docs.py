"""What the documents say is true of the code: links, commands, names, and the API reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.media import refusal
from service.schemas.completions import CompletionRequest
from service.schemas.generate import GenerateRequest
from service.schemas.openai import ChatRequest
from service.schemas.sampling import StreamOptions
from tests.documents import (
    FENCE,
    ROOT,
    anchors,
    check_command,
    check_link,
    check_name,
    commands,
    documents,
    links,
    quoted,
)

DOCUMENTS = documents()
# These tell what was: files and commands in them may be gone.
HISTORY = {"CHANGELOG.md", "research-log.md"}
PRESENT = [path for path in DOCUMENTS if path.name not in HISTORY and path.parent.name != "decisions"]
FOREIGN = {  # options of other programs, and names that a reader makes up
    *("model.safetensors", "k8s/mine"),
    *("--cap-drop", "--cpus", "--cpuset-cpus", "--init", "--read-only", "--stop-timeout", "--secret", "--label"),
    *("--build", "--wait", "--volumes", "--durations", "--use-server-token-count"),
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(document: Path) -> None:
    found = [check_link(target, document) for target in links(document.read_text())]
    assert [fault for fault in found if fault] == []


@pytest.mark.parametrize("document", PRESENT, ids=name)
def test_every_command_parses(document: Path) -> None:
    found = {command: check_command(command) for command in commands(document.read_text())}
    assert {command: fault for command, fault in found.items() if fault} == {}


@pytest.mark.parametrize("document", PRESENT, ids=name)
def test_every_name_exists(document: Path) -> None:
    text = document.read_text()
    if document.name == "api.md":  # its table names vLLM's options
        text = text.partition("## Coming from vLLM")[0]
    found = [check_name(word, document) for word in quoted(text) if word not in FOREIGN]
    assert [fault for fault in found if fault] == []


@pytest.mark.parametrize("document", PRESENT, ids=name)
def test_python_compiles(document: Path) -> None:
    for _, language, block in FENCE.findall(document.read_text()):
        if language == "python":
            compile(block, name(document), "exec")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def rows_in_two_places(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Find rows of tables that have three measured figures in a row which another document's row has too."""
    places: dict[tuple[str, ...], str] = {}
    found = []
    for document, text in texts.items():
        for row in re.findall(r"^ *\|.*$", text, re.MULTILINE):
            figures = re.findall(r"(?<![\w.,])(?:\d[\d,]*\.\d+|\d,\d{3}|\d{2,})", row)
            for three in zip(figures, figures[1:], figures[2:], strict=False):
                if places.setdefault(three, document) != document:
                    found.append((document, row))
    return found


def test_no_row_of_figures_stands_in_two_documents() -> None:
    assert rows_in_two_places({name(path): path.read_text() for path in DOCUMENTS}) == []
    table = "| a | 1,134 | 2.03 | 79 |\n"
    assert rows_in_two_places({"a.md": table, "b.md": f"Text.\n{table}", "c.md": "| 2.03 | 79 |"}) == [
        ("b.md", table[:-1])
    ]


def test_commands_are_found_where_they_stand() -> None:
    block = "```\nFLASH_X=1 flashserve serve \\\n  --port 1\n   python printed.py\n```"
    listed = "1. Look.\n\n   ```\n   until curl -sf URL; do sleep 1; done\n   ```"
    found = list(commands(f"Run `make demo`, or\n\n{block}\nand `flashserve`.\n{listed}"))
    assert found == ["flashserve serve --port 1", "curl -sf URL", "make demo"]


@pytest.mark.parametrize(
    "wrong",
    [
        "make dmeo",
        "make setup TROCH=cuda",
        "flashserve sevre",
        "flashserve serve --prot 8000",
        "flashserve serve --port many",
        "flashserve generate --image scene.png",
        "flashserve bench --driver off",
        "python -m model.bench --batchs 1",
        "python -m model.bench.equalities",
        "python -m model.demo.media --seed 1",
        "python -m pytest tests/k9s",
        "python3 docker/prov.py",
        "accelerate launch -m service.cli train --data x",
        "curl http://127.0.0.1:8000/v1/completion",
        "curl http://127.0.0.1:8000/v1/chat/completions",
        "curl http://127.0.0.1:8000/v1/generate -F media=@scene.jpg",
    ],
)
def test_a_command_that_does_not_work_is_found(wrong: str) -> None:
    assert check_command(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *("model/nowhere.py", "docs/nowhere.md", "service/nowhere/", "nowhere.h", "model.nowhere", "--no-such-option"),
        *("FLASH_NOWHERE", "FLASH_NOWHERE=1"),
    ],
)
def test_a_name_that_does_not_exist_is_found(wrong: str) -> None:
    assert check_name(wrong, ROOT / "README.md")


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One `two`: three\n\n# Again\n\n# Again\n\n```\n# not one\n[no](link)\n```\n")
    assert anchors(document.read_text()) == {"one-two-three", "again", "again-1"}
    assert links("[a](b.md#c) ![d](e.png) [f](https://g) `[h](i)`") == ["b.md#c", "e.png"]
    assert not check_link("#again-1", document)
    assert not check_link("a.md#one-two-three", document)
    for wrong in ("#not-one", "b.md", "a.md#again-2", "../nowhere/"):
        assert check_link(wrong, document)


# --- docs/api.md names every field and every error code

API = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize(
    "name",
    sorted({*GenerateRequest.__struct_fields__, *ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}),
)
def test_the_api_reference_names_every_field(name: str) -> None:
    assert f"`{name}`" in API


def test_the_api_reference_names_every_field_of_stream_options() -> None:
    assert all(re.search(rf"[`.]{name}`", API) for name in StreamOptions.__struct_fields__)


def test_the_api_reference_names_every_error_code() -> None:
    files = [*(ROOT / "service").rglob("*.py"), *(ROOT / "model").rglob("*.py")]
    source = "".join(file.read_text() for file in files)
    codes = set(re.findall(r'\b(?:default_)?code(?:: [^=\n]*)? ?= ?"(\w+)"', source))
    codes |= set(refusal._MESSAGES)
    assert len(codes) > 40
    assert sorted(code for code in codes if f"`{code}`" not in API) == []
