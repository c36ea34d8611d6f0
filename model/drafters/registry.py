"""Picks the drafter by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.config import TRAINED, EngineConfig
from model.drafters import checkpoint
from model.drafters.base import Drafter, Room
from model.drafters.eagle.drafter import EagleDrafter
from model.drafters.flash.drafter import FlashDrafter
from model.drafters.medusa.drafter import MedusaDrafter
from model.drafters.ngram import NgramDrafter
from model.targets.base import Target

KINDS: dict[str, Any] = {
    "flash": FlashDrafter,
    "flash-paper": FlashDrafter,
    "eagle": EagleDrafter,
    "medusa": MedusaDrafter,
}


def aux_layers(config: EngineConfig) -> tuple[int, ...] | None:
    """Return the target's layers that the draft of a resolved config reads; None if there is no trained draft."""
    if config.drafter not in TRAINED or config.draft is None:
        return None
    return checkpoint.described(Path(config.draft)).config.aux_layers


def cache_shape(config: EngineConfig, room: Room) -> dict[str, Any] | None:
    """Return the shape of a slot of the KV cache of a resolved config's drafter; None if it has none."""
    if config.drafter not in TRAINED or config.draft is None:
        return None
    shape: dict[str, Any] | None = KINDS[config.drafter].cache_shape(
        checkpoint.described(Path(config.draft)).config, room
    )
    return shape


def load_drafter(config: EngineConfig, target: Target, room: Room) -> Drafter | None:
    """Load the drafter that a resolved config names; None for `off`. Raises ConfigError if it does not fit."""
    if config.drafter == "off":
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    assert config.draft is not None
    network = checkpoint.load(Path(config.draft), target)
    drafter: Drafter = KINDS[config.drafter](config.drafter, target, network, room)
    return drafter
