"""Tests the checkpoints themselves, by transformers alone: what they are meant to show must have an effect.

A checkpoint whose pictures, windows or positions hardly matter would pass any test of the engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.request import Medium, Message
from tests.families import cases
from tests.families.reference import Reference
from tests.families.zoo import FAMILIES, WINDOW, families

families()
QUICK = ("qwen3_vl", "gemma3", "smolvlm")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
WITH_WINDOWS = (
    "gemma3",
    "gemma4",
    "gemma4_vision",
    "exaone4_5",
    "mistral3_window",
    "internvl_gpt_oss",
    "aya_vision",
    "cohere2_vision",
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations


def inverted(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation with the negative of every picture."""
    return tuple(
        replace(
            message,
            content=tuple(
                replace(part, frames=255 - part.frames) if isinstance(part, Medium) else part
                for part in message.content
            ),
        )
        for message in messages
    )


@pytest.mark.parametrize("name", EACH)
def test_other_pictures_have_other_answers_and_a_cache_changes_none(name: str, saved: Callable[[str], Path]) -> None:
    reference = Reference(saved(name))
    for kind, messages in cases.conversations(FAMILIES[name]).items():
        if kind in ("text", "images"):
            continue  # as "turns", which has both
        answer = reference.answer(messages, 12)
        whole = reference.logits(messages, answer.tokens[:-1])
        assert torch.allclose(whole, answer.logits[-1], atol=1e-3), f"{kind}: generate and one pass disagree"
        assert len(set(answer.tokens)) > 2, f"{kind}: an answer of one word shows nothing"
        other = reference.answer(inverted(messages), 12)
        assert other.tokens != answer.tokens, f"{kind}: the picture does not matter"


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_windows_matter(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved(name), tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["sliding_window"] == WINDOW
    config["text_config"]["sliding_window"] = 100 * WINDOW
    (folder / "config.json").write_text(json.dumps(config))
    messages = cases.conversations(FAMILIES[name])["turns"]
    assert Reference(folder).answer(messages, 12).tokens != Reference(saved(name)).answer(messages, 12).tokens
