"""Test that a resumed training of the bundled models ends where an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model.demo.training import Training


def trained(file: Path, stop: int, steps: int = 6) -> tuple[nn.Linear, Training]:
    """Run a small training up to step `stop`, with batches that depend on the step alone."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    training = Training(file, steps, {"model": module}, [optimiser])
    while training.step < stop:
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(training.step))
        training.learn((module(batch) - batch.flip(0)).square().mean(), [module.parameters()])
    return module, training


def test_a_resumed_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole.pt", 6)
    _, first = trained(tmp_path / "parts.pt", 3)
    first.save()
    parts, second = trained(tmp_path / "parts.pt", 6)
    assert second.started_at == 3
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_step_is_saved_and_done(tmp_path: Path) -> None:
    """The next stage of a build starts the same training again and must get the finished weights."""
    module, _ = trained(tmp_path / "file.pt", 6)
    again, training = trained(tmp_path / "file.pt", 6)
    assert training.started_at == training.step == 6
    assert torch.equal(module.weight, again.weight)
    assert not (tmp_path / "file.tmp").exists()


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    _, training = trained(tmp_path / "file.pt", 0, steps=1000)
    rates = []
    parameter = next(training.modules["model"].parameters())
    for training.step in (0, 100, 600, 999):
        step = training.step
        training.learn(parameter.square().sum(), [])
        rates.append(training.optimisers[0].param_groups[0]["lr"])
        assert training.step == step + 1
    assert rates[3] < rates[0] < rates[2] < rates[1] == 0.1
