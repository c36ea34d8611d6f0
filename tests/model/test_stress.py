"""Test the judgement of the stress command: which differences rounding explains, and which it does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.decoding import sampling
from model.request import SamplingParams
from tests.model import tiny
from tests.model.stress import NOISE, Stress, noise_between

LOGITS = torch.linspace(0.0, 3.0, 40, dtype=torch.float64)


def test_a_tie_takes_no_noise_and_a_clear_choice_more_than_rounding() -> None:
    tied = LOGITS.clone()
    tied[7] = tied[39] + 1e-8
    assert noise_between(tied, SamplingParams(), 0, {7, 39}) < NOISE
    assert noise_between(LOGITS, SamplingParams(), 0, {30, 39}) == math.inf


@pytest.mark.parametrize("cut", [{"top_k": 8}, {"top_p": 0.0}, {"min_p": 0.0}], ids=lambda cut: next(iter(cut)))
def test_ties_at_the_edge_of_a_cut_are_seen(cut: dict[str, float]) -> None:
    """Whether a token is kept is nearly a tie; if it is, the draw selects another. Each cut is exactly at a token."""
    logits = LOGITS.clone()
    logits[31] = logits[32] + 1e-9  # the eighth and the ninth
    probs = logits.softmax(0)
    ordered = probs.sort(descending=True).values
    if "top_p" in cut:
        cut = {"top_p": float(ordered[:8].sum()) - 1e-9}
    if "min_p" in cut:
        cut = {"min_p": float(ordered[8] / ordered[0]) + 2e-10}
    found = []
    for seed in range(60):
        params = SamplingParams(temperature=1.0, seed=seed, **cut)  # type: ignore[arg-type]
        drawn = torch.tensor([sampling.uniform(seed, 0)], dtype=torch.float64)
        token = int(sampling.invert(sampling.distribution(logits[None], params), drawn)[0])
        swapped = logits.clone()
        swapped[31], swapped[32] = logits[32], logits[31]
        other = int(sampling.invert(sampling.distribution(swapped[None], params), drawn)[0])
        if token != other:
            found.append(noise_between(logits, params, 0, {token, other}))
    assert found
    assert max(found) < NOISE


def test_a_planted_difference_is_not_explained(tmp_path: Path) -> None:
    stress = Stress(tmp_path, "flash")
    request = tiny.ask("q", tiny.image(1), "What is left of the star?", temperature=1.0, seed=3)
    known = tiny.answers(stress.plain, [request])
    stress.compare(0, "same", [request], known, tiny.answers(stress.crowd, [request]))
    assert (stress.requests, stress.differences, stress.unexplained) == (1, 0, 0)
    other = [*known["q"][:5], (known["q"][5] + 200) % 400, *known["q"][6:]]
    stress.compare(0, "planted", [request], known, {"q": other})
    stress.compare(0, "cut short", [request], known, {"q": known["q"][:5]})
    assert (stress.requests, stress.differences, stress.unexplained) == (3, 2, 2)
