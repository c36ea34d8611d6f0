"""What documents claim, checked without running it: links lead somewhere, commands parse, names exist.

Each `check_*` function returns a sentence about the fault that it found, or None. test_docs.py runs them over every
document of the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

import click
import typer
from pydantic import ValidationError
from starlette.routing import Match

from service.app import create_app
from service.cli import app as command_line
from service.settings import Settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "model", "loadtest", "docker", "tests")
OUTPUTS = {"runs", "build", "dist", "weights"}  # folders whose files nobody wrote by hand
FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
PROGRAMS = {"flashserve", "make", "python", "python3", "curl", "accelerate", "torchrun"}
OPERATORS = {"|", "&", "&&", "||", ";", ">", "...", "\\"}


def documents() -> list[Path]:
    """List every Markdown file of the repository."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    return sorted(
        ROOT / path for path in found if not any(part.startswith(".") or part in OUTPUTS for part in path.parts)
    )


# --- links


def prose(text: str) -> str:
    """Remove fenced blocks and text between backticks."""
    return QUOTED.sub("``", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """List the targets of links and pictures that lead into the repository."""
    return [target for target in LINK.findall(prose(text)) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Name the headings as GitHub does."""
    names: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (numbered := f"{name}-{number}" if number else name) in names:
            number += 1
        names.add(numbered)
    return names


def check_link(target: str, document: Path) -> str | None:
    file, _, anchor = target.partition("#")
    path = document.parent / file if file else document
    if not path.exists():
        return f"{target} leads to no file"
    if anchor and anchor not in anchors(path.read_text()):
        return f"{path.name} has no heading #{anchor}"
    return None


# --- commands


def commands(text: str) -> Iterator[str]:
    """Find commands in fenced blocks, line by line, and between backticks."""
    for _, language, block in FENCE.findall(text):
        if language in ("", "sh", "bash"):
            for line in re.sub(r" *\\\n\s*", " ", dedent(block)).splitlines():
                if not line[:1].isspace():
                    yield from _commands(line)
    for quoted in QUOTED.findall(FENCE.sub("", text)):
        yield from _commands(" ".join(quoted.split()))


def _commands(line: str) -> Iterator[str]:
    for part in re.split(r" (?:&&|&|\|\|?) |; (?:do )?", line.removeprefix("$ ")):
        part = re.sub(r"^(?:until |\S+=\S* )+", "", part)
        program = Path(part.split(" ")[0]).name
        if program in PROGRAMS and " " in part:
            yield part


def check_command(line: str) -> str | None:
    """Parse a command as its program would, without running it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    words = list(lexer)
    cut = next((i for i, word in enumerate(words) if word in OPERATORS or word.startswith("<<")), len(words))
    program, arguments = Path(words[0]).name, words[1:cut]
    if program == "make":
        return check_make(arguments)
    if program == "curl":
        return check_curl(arguments)
    if program == "flashserve":
        return check_flashserve(arguments)
    if "-m" in arguments:
        at = arguments.index("-m")
        return check_module(arguments[at + 1], arguments[at + 2 :])
    return None if program in ("accelerate", "torchrun") else check_script(arguments)


def check_make(arguments: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        if assigned and not re.search(rf"^(override )?{name} *[?:]?=", makefile, re.MULTILINE):
            return f"the Makefile knows no variable {name}"
        if not assigned and not re.search(rf"^{name}:", makefile, re.MULTILINE):
            return f"the Makefile knows no verb {name}"
    return None


@cache
def _app() -> Any:
    return create_app(Settings(), on_fatal=lambda reason: None)


def check_curl(arguments: list[str]) -> str | None:
    """Look the URL up among the routes, and the files that are sent in the repository."""
    sends = {"-F", "-d", "--data", "--form"} & {*arguments}
    for word in arguments:
        if found := re.match(r"https?://(?:127\.0\.0\.1|localhost):\d+(/[^?\s]*)", word):
            scope = {"type": "http", "path": found[1], "method": "POST" if sends else "GET"}
            if not any(route.matches(scope)[0] is Match.FULL for route in _app().routes):
                return f"there is no route {scope['method']} {found[1]}"
        if (found := re.match(r"\w+=@(.+)", word)) and not (ROOT / found[1]).exists():
            return f"there is no file {found[1]}"
    return None


def check_flashserve(arguments: list[str]) -> str | None:
    group = typer.main.get_command(command_line)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    name, *options = arguments
    if name not in group.commands and name != "--help":
        return f"flashserve has no command {name}"
    if "--help" in arguments:
        return None
    if name == "bench":
        return check_module("service.cli", arguments)
    try:
        context = group.commands[name].make_context(name, list(options))
        if name == "serve":
            Settings(**{key: value for key, value in context.params.items() if value is not None})
    except Exception as error:  # noqa: BLE001 - typer brings a click of its own, with its own exceptions
        if hasattr(error, "format_message"):
            return str(error.format_message())
        if isinstance(error, ValidationError):
            return str(error)
        raise
    return None


class Parsed(Exception):
    """The options were parsed; the program would begin here."""


def check_module(name: str, arguments: list[str]) -> str | None:
    """Let a module of ours parse its own options, and stop it there."""
    if name == "pytest":
        missing = [word for word in arguments if "/" in word and not (ROOT / word.partition("::")[0]).exists()]
        return f"there is no {missing[0]}" if missing else None
    if name == "service.cli" and arguments[:1] != ["bench"]:
        return check_flashserve(arguments)
    path = ROOT / name.replace(".", "/")
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists():
        return f"there is no module {name}"
    if not arguments:
        return None
    if "parse_args" not in source.read_text() and arguments[0] != "bench":  # it would run
        return f"{name} takes no options"
    parse, complaints = argparse.ArgumentParser.parse_known_args, io.StringIO()

    def parse_and_stop(self: argparse.ArgumentParser, *values: Any, **more: Any) -> Any:
        _, unknown = parse(self, *values, **more)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_and_stop),
        mock.patch.object(sys, "argv", [name, *arguments]),
        mock.patch("subprocess.Popen", side_effect=AssertionError("it runs before it has parsed its options")),
        contextlib.redirect_stderr(complaints),
        contextlib.redirect_stdout(complaints),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # runpy warns about modules that are imported already
        try:
            runpy.run_module(name, run_name="__main__")
        except Parsed:
            return None
        except SystemExit as ended:
            return None if ended.code == 0 else complaints.getvalue().strip()  # 0: --help
    return f"{name} does not parse its options"


def check_script(arguments: list[str]) -> str | None:
    if arguments and arguments[0].endswith(".py") and not (ROOT / arguments[0]).exists():
        return f"there is no file {arguments[0]}"
    return None


# --- names


@cache
def _basenames() -> frozenset[str]:
    ours = [path for folder in (*PACKAGES, "docs", "k8s") for path in (ROOT / folder).rglob("*")]
    return frozenset(path.name for path in [*ours, *ROOT.iterdir()])


@cache
def _options() -> frozenset[str]:
    """Every option that a program of ours has."""
    group = typer.main.get_command(command_line)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    named = {option for command in group.commands.values() for param in command.params for option in param.opts}
    files = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py") if not path.name.startswith("test_"))
    sources = (path.read_text() for path in files)
    return frozenset(named | {option for source in sources for option in re.findall(r'"(--[a-z][a-z0-9-]+)"', source)})


def quoted(text: str) -> Iterator[str]:
    """Words between backticks in the text, outside of fenced blocks."""
    for words in QUOTED.findall(FENCE.sub("", text)):
        yield from words.split()


def check_name(word: str, document: Path) -> str | None:
    """Look up a word that looks like a file, a module, an option or a variable of ours."""
    if re.fullmatch(rf"(?:{'|'.join((*PACKAGES, 'docs', 'k8s'))})/[\w./-]*", word):
        return None if (ROOT / word).exists() or (document.parent / word).exists() else f"there is no {word}"
    if re.fullmatch(r"[\w.-]+\.(?:py|h|cpp|md|yaml|yml|sh|j2)", word):
        return None if word in _basenames() else f"no file is called {word}"
    if re.fullmatch(r"(?:service|model|loadtest|docker|tests)(?:\.[a-z_0-9]+)+", word):
        path = ROOT / word.replace(".", "/")
        return None if path.with_suffix(".py").exists() or path.is_dir() else f"there is no module {word}"
    if re.fullmatch(r"--[a-z][a-z0-9-]+", word):
        return None if word in _options() else f"no program of ours has the option {word}"
    if found := re.fullmatch(r"FLASH_([A-Z_]+)(?:=.*)?", word):
        builds = "".join(path.read_text() for path in (ROOT / "model/backends/native").glob("*.py"))
        known = found[1].lower() in Settings.model_fields or f'"FLASH_{found[1]}"' in builds
        return None if known else f"there is no variable {word}"
    return None
