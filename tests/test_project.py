"""Claims about the project itself: its versions, its verbs, its borders, its weight."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What model/ may import wherever it runs (tqdm comes with transformers, jinja2 with torch); and what its scripts that
# build and measure may import where they use it.
MODEL_MAY_IMPORT = {
    "model",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "PIL",
    "numpy",
    "jinja2",
    "tqdm",
    "llguidance",
}
MODEL_MAY_IMPORT_LAZILY = {"av", "matplotlib", "psutil", "accelerate"}
TENSOR_LIBRARIES = {"torch", "torchvision", "transformers", "tokenizers", "safetensors", "accelerate"}

MAX_WEIGHTS_BYTES = 45_000_000


def run(*command: str | Path) -> str:
    # make's own variables must not leak from the `make test` around us into a `make -n` inside it
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Each imported top-level package, and whether it is imported when the module is (not inside a function)."""
    typing_only: set[ast.AST] = set()
    in_function: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):  # breadth first: a parent comes before what it holds
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for child in node.body:
                typing_only.update(ast.walk(child))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            in_function.update(ast.walk(node))
        at_once = node not in in_function and node not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], at_once
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], at_once


def foreign_to_model(source: str) -> set[str]:
    return {
        package
        for package, at_once in imports(source)
        if package not in sys.stdlib_module_names | MODEL_MAY_IMPORT
        and (at_once or package not in MODEL_MAY_IMPORT_LAZILY)
    }


def python_files(folder: str) -> list[Path]:
    files = sorted(path for path in (ROOT / folder).rglob("*.py") if "runs" not in path.parts)
    assert files, f"no Python files under {folder}/: this test would check nothing"
    return files


# -- versions


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == model.__version__
    assert importlib.metadata.version("flashserve") == model.__version__


def test_the_changelog_knows_the_version_or_has_it_unreleased() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    assert headings[0] == "Unreleased" or headings[0] == PROJECT["version"]


def test_the_command_prints_the_version() -> None:
    command = Path(sys.executable).with_name("flashserve")
    assert model.__version__ in run(command, "version")


# -- make and CI


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize(
    ("verb", "recipe"),
    [
        ("setup", "--constraint constraints.txt --editable '.[dev]'"),
        ("demo", "python -m service.demo"),
        ("test", "python -m pytest"),
        ("serve", "flashserve serve"),
        ("bench", "flashserve bench"),
        ("check", "mypy"),
    ],
)
def test_each_verb_of_the_contract_sets_up_and_then_does_its_work(verb: str, recipe: str) -> None:
    lines = run("make", "--dry-run", verb, "VENV=/nonexistent/fresh").splitlines()
    installed = next(i for i, line in enumerate(lines) if "--editable '.[dev]'" in line)
    worked = max((i for i, line in enumerate(lines) if recipe in line), default=-1)
    assert worked >= installed, f"make {verb} does not run `{recipe}` after its set-up"


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_an_extra_index_is_asked_for_nothing_but_torch_and_torchvision(build: str) -> None:
    """An index beside the registry could replace any dependency by a higher version of its own; and a torchvision with
    its dependencies could replace the CPU build of torch."""
    recipe = run("make", "--dry-run", "setup", "VENV=/nonexistent/fresh", f"TORCH={build}")
    assert "--extra-index-url" not in recipe
    installs = re.findall(r"install [^;|]*\$pin", recipe)
    assert len(installs) == (3 if build == "cpu" else 1)
    assert all("--no-deps" in install for install in installs)
    assert len(re.findall("--index-url", "".join(installs))) == (2 if build == "cpu" else 0)
    (pins,) = re.findall(r"for pin in ([^;]*);", recipe)
    versions = dict(pin.split("==") for pin in pins.split())
    assert set(versions) == {"torch", "torchvision"}
    dependencies = PROJECT["dependencies"]
    assert all(f"{name}=={version}" in dependencies for name, version in versions.items())


@pytest.mark.parametrize("fails", ["", "check", "test", "check test"])
def test_ci_checks_and_tests_as_a_person_does_and_fails_if_either_fails(fails: str, tmp_path: Path) -> None:
    """With a stand-in for make that writes down what it is called for. Nothing is missing, so nothing is installed."""
    for name in ("chromium", "prometheus", "nginx", "ffmpeg", "make"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase " {fails} " in *" $1 "*) exit 2;; esac\n'
        )
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    code = subprocess.run([ROOT / ".ci/run"], env=env).returncode
    assert (tmp_path / "calls").read_text().splitlines() == ["check", "test"]
    assert (code != 0) == bool(fails)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_the_suite_lists_its_slowest_tests() -> None:
    assert "--durations=20" in run("make", "--dry-run", "test", "VENV=/nonexistent/fresh")


TIMED = """
import time
import pytest

def run(name):
    for event in ("begins", "ends"):
        with open("events", "a") as file:
            file.write(f"{event} {name}\\n")
        time.sleep(0.1)

@pytest.mark.parametrize("number", range(8))
def test_beside_others(number): run("one")

@pytest.mark.alone
def test_alone(): run("alone")

@pytest.mark.parametrize("number", range(8))
def test_beside_others_again(number): run("one")
"""


def test_what_is_marked_alone_runs_while_nothing_else_does(tmp_path: Path) -> None:
    """In two processes; what is not marked runs side by side."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_timed.py").write_text(TIMED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone")
    command = (sys.executable, "-m", "pytest", "-q", "--numprocesses=2", "--dist=worksteal")
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    events = (tmp_path / "events").read_text().splitlines()
    assert len(events) == 2 * 17
    assert events[events.index("begins alone") + 1] == "ends alone"
    before = events[: events.index("begins alone")]
    assert before.count("begins one") == before.count("ends one")
    assert any(one == other == "begins one" for one, other in pairwise(events))


# -- dependencies


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines), "a pin is `name==version`"
    return dict(line.split("==") for line in lines)


def test_every_requirement_is_pinned_to_a_version_its_range_allows() -> None:
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        if requirement.name == PROJECT["name"]:  # one extra contains another
            continue
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_what_is_installed_is_pinned_too() -> None:
    """A dependency of a dependency that nobody pinned differs between two fresh machines."""

    def closure(name: str, extras: set[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
        if (name, frozenset(extras)) in seen:
            return
        seen.add((name, frozenset(extras)))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            if wanted:
                yield canonicalize_name(requirement.name)
                yield from closure(requirement.name, requirement.extras, seen)

    needed = {name for name in closure("flashserve", {"dev"}, set()) if not name.startswith(("nvidia-", "cuda-"))}
    assert len(needed) > 40
    assert needed - {"triton", "flashserve"} <= pins().keys()


def test_the_pins_pull_in_no_cuda() -> None:
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda"))]


# -- borders


def test_the_border_check_sees_what_it_should() -> None:
    assert foreign_to_model("import torch\nfrom . import x\nimport json\ndef f():\n    import av") == set()
    assert foreign_to_model("def f():\n    from fastapi import FastAPI\nimport av") == {"fastapi", "av"}
    assert foreign_to_model("try:\n    import service.app\nexcept ImportError: ...") == {"service"}


@pytest.mark.parametrize("path", python_files("model"), ids=lambda path: str(path.relative_to(ROOT)))
def test_model_runs_where_there_is_nothing_but_torch_and_its_few(path: Path) -> None:
    # Triton comes with torch where there is a GPU; what is written in it is imported nowhere else.
    allowed = {"triton"} if path.parent.name == "kernels" else set()
    assert foreign_to_model(path.read_text()) <= allowed


@pytest.mark.parametrize("path", python_files("service"), ids=lambda path: str(path.relative_to(ROOT)))
def test_service_imports_no_tensor_library(path: Path) -> None:
    """Only a worker's process may hold torch, and it gets it through model/, when it starts."""
    at_once = {package for package, at_once in imports(path.read_text()) if at_once}
    assert at_once & TENSOR_LIBRARIES == set()


@pytest.mark.parametrize("module", ["model.request", "service.errors", "service.app", "service.cli"])
def test_importing_it_loads_no_torch(module: str) -> None:
    """The API process imports no torch: seconds of start-up, and hundreds of MB in a process that needs none."""
    code = f"import sys, {module}; print(sorted({TENSOR_LIBRARIES!r} & sys.modules.keys()))"
    assert run(sys.executable, "-c", code).strip() == "[]"


# -- what is in the tree


def test_the_weights_in_the_repository_stay_small() -> None:
    """History keeps every version of them, and everyone clones them."""
    weights = [p for suffix in ("safetensors", "bin", "pt", "pth") for p in ROOT.glob(f"model/**/*.{suffix}")]
    weights = [path for path in weights if "runs" not in path.parts]
    assert weights, "the bundled models are not where this test looks: it would check nothing"
    assert sum(path.stat().st_size for path in weights) <= MAX_WEIGHTS_BYTES


def test_the_weights_and_the_page_are_in_the_package() -> None:
    """They are data: a wheel without them installs, and then fails at its first start."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, folders in {"model": ["demo/weights"], "service": ["static"]}.items():
        packaged = {path for pattern in data[package] for path in (ROOT / package).glob(pattern)}
        there = {path for folder in folders for path in (ROOT / package / folder).rglob("*") if path.is_file()}
        assert there <= packaged
        assert (ROOT / package / "py.typed") in packaged


@pytest.mark.parametrize("package", ["model", "service"])
def test_every_folder_with_code_is_a_package(package: str) -> None:
    """Without `__init__.py` it works from the source tree, and is missing from the wheel."""
    folders = {path.parent for path in python_files(package)}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_decision_record_is_numbered_and_in_the_index() -> None:
    folder = ROOT / "docs/decisions"
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [name[:4] for name in records] == [f"{number:04}" for number in range(1, len(records) + 1)]
    rows = re.findall(r"^\| \[(\d+)\]\((\S+)\) \| (.+?) \|", (folder / "README.md").read_text(), re.MULTILINE)
    titles = [(folder / name).read_text().partition("\n")[0] for name in records]
    assert [(name, f"# {number}. {title}") for number, name, title in rows] == list(zip(records, titles, strict=True))
