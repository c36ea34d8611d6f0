"""The Dockerfile as data: its stages, and what a stage inherits."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("cpu", "cuda")


class Stage:
    def __init__(self, base: str) -> None:
        self.base = base
        self.steps: list[tuple[str, str]] = []  # instruction and the rest of its line


def stages() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.split()
            found[name] = Stage(base)
        elif instruction and found:
            found[list(found)[-1]].steps.append((instruction, rest.strip()))
    return found


def steps(name: str) -> list[tuple[str, str]]:
    """Of a stage and all that it is built on."""
    every = stages()
    stage = every[name]
    return (steps(stage.base) if stage.base in every else []) + stage.steps


def last(name: str, instruction: str) -> str:
    return next(rest for found, rest in reversed(steps(name)) if found == instruction)


def environment(name: str) -> dict[str, str]:
    pairs = (shlex.split(rest) for instruction, rest in steps(name) if instruction == "ENV")
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def health_command(name: str) -> list[str]:
    command: Any = json.loads(last(name, "HEALTHCHECK").partition("CMD ")[2])
    return [str(part) for part in command]
