"""The processes that train one draft together: one alone, or those that `accelerate launch` has started.

Each of them reads the same data and holds the whole target and draft; they meet once a step, to average gradients.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import Tensor

from model.errors import ConfigError


class Team(Protocol):
    rank: int  # 0 writes, tells and measures
    size: int
    device: str | None  # that this process is to use; None: any

    def average(self, values: Tensor) -> Tensor:
        """The mean over all processes, in each of them."""
        ...

    def wait(self) -> None:
        """Until all have come here."""
        ...


class Alone:
    rank, size = 0, 1
    device: str | None = None

    def average(self, values: Tensor) -> Tensor:
        return values

    def wait(self) -> None:
        return


class Accelerated:
    """Through `accelerate`, which knows how the processes were started and how they reach each other."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank, self.size = int(accelerator.process_index), int(accelerator.num_processes)
        self.device: str | None = str(accelerator.device)

    def average(self, values: Tensor) -> Tensor:
        mean: Tensor = self._accelerator.reduce(values, reduction="mean")
        return mean

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def gather() -> Team:
    """This process's team. Raises ConfigError where it was started as one of several and accelerate is not here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError("several processes train through accelerate: pip install 'flashserve[train]'") from error
    return Accelerated(Accelerator())
