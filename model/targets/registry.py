"""Picks the model family by the `model_type` of a checkpoint."""

from __future__ import annotations

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


def target_class(config: EngineConfig) -> Any:
    """Return the class of the target that a resolved config names. Raises ConfigError as `read_checkpoint` does."""
    checkpoint, _ = read_checkpoint(config)
    return _class_of(config, checkpoint)


def _class_of(config: EngineConfig, checkpoint: Any) -> Any:
    """Return the class for a checkpoint: its family's own if that knows all it has, else the one for all."""
    own = FAMILIES.get(checkpoint.model_type)
    return own if own is not None and support.is_plain(config, checkpoint) else GenericTarget


def load_target(config: EngineConfig, aux_layers: tuple[int, ...] | None = None) -> Target:
    """Load the target that a resolved config names.

    aux_layers: the layers that its draft reads, where -1 is the last; None: some, evenly spaced. Raises ConfigError if
    it cannot be served.
    """
    checkpoint, _ = read_checkpoint(config)
    checkpoints.build_skeleton(config, checkpoint)  # checks the files before weights are read
    named = _class_of(config, checkpoint)
    group = Group(config, aux_layers) if config.tensor_parallel > 1 else None
    target: Target = named(config, aux_layers=aux_layers, group=group)
    return target
