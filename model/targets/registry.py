"""Picks the model family by the `model_type` of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.config import EngineConfig
from model.targets import checkpoint as checkpoints
from model.targets import support
from model.targets.base import Target
from model.targets.generic import GenericTarget
from model.targets.llava import LlavaTarget
from model.targets.parallel import Group
from model.targets.qwen2_5_vl import Qwen25VLTarget
from model.targets.stored import StoredWeights, stored_weights


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has been read, but for its weights.

    checkpoint: transformers' config; stored_bytes: of its weights once loaded, None if unknown; keeps_stored_form:
    whether they are quantised and stay so.
    """

    config: EngineConfig
    checkpoint: Any
    stored_bytes: int | None
    keeps_stored_form: bool

    @cached_property
    def skeleton(self) -> Any:
        """Build the model on the meta device, None if that cannot be done, and check the files of its weights. Raises
        ConfigError if one is damaged, or tensors are missing."""
        return checkpoints.build_skeleton(self.config, self.checkpoint)


FAMILIES: dict[str, Any] = {"llava": LlavaTarget, "qwen2_5_vl": Qwen25VLTarget}


def read_checkpoint(config: EngineConfig) -> tuple[Any, StoredWeights | None]:
    """Read transformers' config of the target that a resolved config names, and the names and size of its weights, but
    not the weights.

    Raises ConfigError if there is none, or if the checkpoint needs an unsupported feature.
    """
    checkpoint = checkpoints.read_config(config)
    dtype = getattr(torch, config.dtype)
    weights = stored_weights(config.model, dtype, checkpoint.dtype, checkpoints.hub_options(config))
    support.check(config, checkpoint)
    return checkpoint, weights


def open_checkpoint(config: EngineConfig) -> Opened:
    """Read the checkpoint that a resolved config names, but not its weights. Raises ConfigError."""
    checkpoint, weights = read_checkpoint(config)
    quantised = checkpoints.quantisation(config, checkpoint)
    kept = quantised is not None and not quantised.dequantised
    return Opened(config, checkpoint, weights.num_bytes if weights else None, kept)


def target_class(config: EngineConfig) -> Any:
    """Return the class of the target that a resolved config names. Raises ConfigError as `read_checkpoint` does."""
    checkpoint, _ = read_checkpoint(config)
    return _class_of(config, checkpoint)


def _class_of(config: EngineConfig, checkpoint: Any) -> Any:
    """Return the class for a checkpoint: its family's own if that knows all it has, else the one for all."""
    own = FAMILIES.get(checkpoint.model_type)
    return own if own is not None and support.is_plain(config, checkpoint) else GenericTarget


def load_target(
    config: EngineConfig, aux_layers: tuple[int, ...] | None = None, opened: Opened | None = None
) -> Target:
    """Load the target that a resolved config names.

    aux_layers: the layers that its draft reads, where -1 is the last; None: some, evenly spaced. opened: the same
    checkpoint, if it has been opened. Raises ConfigError if it cannot be served.
    """
    opened = opened or open_checkpoint(config)
    if Path(config.model).is_dir():
        opened.skeleton  # noqa: B018  (checks the files before weights are read)
    else:
        checkpoints.build_skeleton(config, opened.checkpoint, download=True)
    named = _class_of(config, opened.checkpoint)
    group = Group(config, aux_layers) if config.tensor_parallel > 1 else None
    target: Target = named(config, aux_layers=aux_layers, group=group)
    return target
