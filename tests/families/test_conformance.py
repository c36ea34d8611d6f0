"""Tests that the engine answers as transformers does, for whole families: see conformance.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.conformance import conform, table
from tests.families.zoo import families

QUICK = ("qwen3_vl", "qwen3_5", "gemma3", "gemma4_vision", "internvl", "smolvlm", "mistral3", "glm4v")
QUICK_MODES = ("prompts", "alone", "chunks of 17", "replay")
MORE_MODES = ("prompts", "batch", "chunks of 16", "prefix cache", "flash", "sampling")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations


def check(name: str, folder: Path, modes: tuple[str, ...], num_tokens: int) -> None:
    """Run one family in these modes."""
    result = conform(families()[name], folder, modes, num_tokens=num_tokens)
    assert not result.failures, "\n".join([table([result], modes), *map(str, result.failures)])
    assert result.tried.keys() == set(modes)


@pytest.mark.parametrize("name", QUICK)
def test_a_family_answers_as_transformers_does(name: str, saved: Callable[[str], Path]) -> None:
    check(name, saved(name), QUICK_MODES, 10)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "gemma3"])
def test_a_family_follows_grammars(name: str, saved: Callable[[str], Path]) -> None:
    check(name, saved(name), ("grammar",), 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_answers_as_transformers_does(name: str, saved: Callable[[str], Path]) -> None:
    check(name, saved(name), MORE_MODES, 6)


def test_a_wrong_answer_is_found(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that accepts anything compares nothing."""
    from tests.families import cases, conformance

    pictures = cases.picture
    known = conformance.Subject(families()["internvl"], saved("internvl"), ["image"])
    assert known.answers  # transformers has seen the picture
    monkeypatch.setattr(cases, "picture", lambda *arguments, **options: 255 - pictures(*arguments, **options))
    other = conformance.Subject(families()["internvl"], saved("internvl"), ["image"])
    other.__dict__["answers"] = known.answers
    result = conformance.Result("internvl")
    conformance.alone(conformance.Trial(other, result, "alone"))
    assert [one.medium for one in result.failures] == ["image"]
    assert "gap" in result.failures[0].reason
