"""Test that families whose decoders run in the native library answer as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.backends.native import library
from model.engine.native_round import NativeRound
from tests.families.conformance import MODES, Result, Subject, Trial
from tests.families.zoo import families

NATIVE = ("qwen3_vl", "internvl_qwen3", "gemma3", "glm_ocr", "paddleocr_vl", "smolvlm", "mistral3_window")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_decoder_answers_as_transformers_does(name: str, saved: Callable[[str], Path]) -> None:
    """Run text, images and videos in a batch, with prompts cut anywhere, and with drafts right and wrong."""
    if not library.supports(torch.float32, torch.device("cpu")):
        pytest.skip("no native library here")
    family = families()[name]
    subject, result = Subject(family, saved(name), num_tokens=12), Result(name)
    engine = subject.engine()
    assert engine.target.decoder is not None  # type: ignore[attr-defined]
    assert isinstance(engine.round, NativeRound)
    for mode in ("alone", "chunks of 17", "flash", "replay"):
        MODES[mode](Trial(subject, result, mode))
    assert not result.failures
