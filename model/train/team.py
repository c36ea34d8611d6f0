"""Coordinate the processes that train one draft: a single one, or those that `accelerate launch` started.

Each process reads the same data and holds the whole target and draft. Processes synchronise once a step, to average
gradients.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import Tensor

from model.errors import ConfigError


class Team(Protocol):
    """Describe this process's place among the processes of a training, and let them synchronise."""

    rank: int  # 0 writes files, reports and measures
    size: int
    device: str | None  # for this process to use; None: any

    def average(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes; each of them gets the mean."""
        ...

    def wait(self) -> None:
        """Block until all processes have called this."""
        ...


class Alone:
    """Be a team of one process."""

    rank, size = 0, 1
    device: str | None = None

    def average(self, values: Tensor) -> Tensor:
        """Return the values, which are their own mean."""
        return values

    def wait(self) -> None:
        """Return at once."""
        return


class Accelerated:
    """Coordinate through `accelerate`, which knows how the processes were started and how they reach each other."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank, self.size = int(accelerator.process_index), int(accelerator.num_processes)
        self.device: str | None = str(accelerator.device)

    def average(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes with a collective call."""
        mean: Tensor = self._accelerator.reduce(values, reduction="mean")
        return mean

    def wait(self) -> None:
        """Block until all processes have called this."""
        self._accelerator.wait_for_everyone()


def gather() -> Team:
    """Return this process's team.

    Raises ConfigError if several processes were started and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError("several processes train through accelerate: pip install 'flashserve[train]'") from error
    return Accelerated(Accelerator())
