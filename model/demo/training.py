"""Run a training that can be stopped: optimisers on one schedule, and a file to resume from."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.utils.data import IterableDataset

SAVED_EVERY = 50.0  # seconds
Batch = TypeVar("Batch")


class Numbered(IterableDataset[Batch]):
    """Yield batches without end from number `first` on.

    Batch i depends on i alone, so a resumed run sees the batches that it would have seen.
    """

    first: int

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Draw batch `index`."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        index = self.first
        while True:
            yield self.batch(index)
            index += 1


class Training:
    """Train `modules` with `optimisers`, at step `step` of `steps`.

    Weights, optimisers and step are loaded from `file` if it exists.
    """

    def __init__(
        self, file: Path, steps: int, modules: Mapping[str, nn.Module], optimisers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.file, self.steps, self.modules, self.optimisers = file, steps, modules, optimisers
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
        self.step = 0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(saved[name])
            for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.step = saved["step"]
        self.begun, self.started_at, self.saved_at = time.time(), self.step, time.time()

    def learn(self, loss: torch.Tensor, clipped: Sequence[Iterable[nn.Parameter]]) -> None:
        """Take one step on the gradient of `loss`. Each group in `clipped` has its gradients clipped to norm 1."""
        share = min(1.0, (self.step + 1) / 50, 0.01 + 1.25 * (1 - self.step / self.steps))
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            optimiser.param_groups[0]["lr"] = share * peak
            optimiser.zero_grad()
        loss.backward()
        for group in clipped:
            nn.utils.clip_grad_norm_(group, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        if time.time() - self.saved_at > SAVED_EVERY or self.step == self.steps:
            self.save()

    def save(self) -> None:
        """Write a temporary file and rename it, so that a complete file exists at all times."""
        self.saved_at = time.time()
        state = {name: module.state_dict() for name, module in self.modules.items()}
        optimisers = [optimiser.state_dict() for optimiser in self.optimisers]
        scratch = self.file.with_suffix(".tmp")
        torch.save({**state, "optimisers": optimisers, "step": self.step}, scratch)
        scratch.replace(self.file)

    @property
    def pace(self) -> str:
        """Return seconds a step and the minutes left, as text for the log."""
        seconds = (time.time() - self.begun) / max(1, self.step - self.started_at)
        return f"{seconds:.2f} s/step, {(self.steps - self.step) * seconds / 60:.0f} min left"
