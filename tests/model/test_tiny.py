"""Test that the tiny checkpoint is fit for tests: its logit gaps are wide, and its answers depend on its media."""

from __future__ import annotations

import torch

from model.engine.engine import Engine
from tests.model import tiny


def test_answers_depend_on_the_picture_and_on_the_words(plain_engine: Engine) -> None:
    """Otherwise a wrong mask, position or feature would change no token, and equality tests would prove nothing."""
    requests = [
        tiny.ask("a", tiny.image(0), "Describe the image."),
        tiny.ask("b", tiny.image(1), "Describe the image."),
        tiny.ask("c", tiny.image(0), "How many objects are there?"),
        tiny.ask("d", "Describe the image."),
    ]
    answers = tiny.answers(plain_engine, requests)
    assert len({tuple(a) for a in answers.values()}) == 4
    assert all(len(set(a)) > 6 for a in answers.values()), "an answer runs in a short circle"


def test_the_best_token_is_best_by_far(plain_engine: Engine) -> None:
    """Rounding would decide near ties, and equal answers would be luck."""
    torch.manual_seed(0)
    target = plain_engine.target
    logits = target.logits(torch.nn.functional.normalize(torch.randn(200, target.hidden_size), dim=-1) * 8)
    best = logits.topk(2, -1).values
    assert ((best[:, 0] - best[:, 1]) / logits.std(-1)).median() > 0.1
