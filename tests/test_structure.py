"""The shape of the code: imports go one way, no file is long without a reason, names are nouns and verbs."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "service", "loadtest")
# What lives in `model`, in the order in which it may import each other: a name only those before it.
MODEL_ORDER = (
    "vision_ops", "errors", "request", "transfer", "decoding", "backends", "config",
    "targets", "drafters", "engine", "train", "demo", "bench",
)  # fmt: skip
MOST_LINES = 500
REASON = "one file"  # a longer one says in its docstring why it is "one file"
BANNED = {"told", "asked", "given", "held", "said", "taken"}
FIELD_TERMS = {"held_out"}  # what training sets aside is called so everywhere


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Names of our modules that a file imports: anywhere in it, for types only, or when a function runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in modules() and name not in PACKAGES)


@cache
def graph() -> dict[str, set[str]]:
    return {name: set(imported(path)) - {name} for name, path in modules().items()}


def sources() -> list[Path]:
    suffixes = {".py", ".h", ".cpp", ".js"}
    folders = (*PACKAGES, "tests", "docker", "k8s")
    return [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' -> '.join(error.args[1])}")


def test_packages_import_each_other_one_way() -> None:
    for name, others in graph().items():
        package = name.split(".")[0]
        reached = {other.split(".")[0] for other in others} - {package}
        assert package != "model" or not reached, f"{name}: model knows no other package"
        assert package != "service" or reached <= {"model"}, name
    for package in ("pool", "media", "schemas", "routes", "commands"):
        within = f"service.{package}"
        assert (ROOT / "service" / package / "__init__.py").read_text().startswith('"""'), (
            f"{within}: say what it is for"
        )


def test_folders_of_the_engine_import_only_what_comes_before_them() -> None:
    rank = {name: number for number, name in enumerate(MODEL_ORDER)}
    seen = set()
    for name, others in graph().items():
        if not name.startswith("model."):
            continue
        own = name.split(".")[1]
        seen.add(own)
        for other in others:
            if other.startswith("model."):
                assert rank[other.split(".")[1]] <= rank[own], f"{name} imports {other}"
    assert seen == set(MODEL_ORDER)


def test_every_folder_says_what_lives_in_it() -> None:
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_no_file_is_long_without_a_reason() -> None:
    for path in sources():
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            opening = (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text[:2000]
            assert REASON in opening, f"{path.relative_to(ROOT)}: split it, or say at its top why it is {REASON!r}"


def participles(source: str) -> Iterator[str]:
    """Identifiers of which a part is a banned participle."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string.strip("_").lower() not in FIELD_TERMS:
            if BANNED & set(token.string.lower().split("_")):
                yield token.string


def test_names_are_nouns_and_verbs() -> None:
    assert list(participles("told = a.said_by(held_out, withheld)")) == ["told", "said_by"]
    for package in ("service", "model"):
        for path in (ROOT / package).rglob("*.py"):
            assert not set(participles(path.read_text())), path.relative_to(ROOT)
