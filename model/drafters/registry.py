"""How tokens are drafted, one file per way. `load_drafter` picks by name."""

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
    """The target's layers that the draft of a resolved config reads; None where there is none."""
    if config.drafter not in TRAINED or config.draft is None:
        return None
    return checkpoint.described(Path(config.draft)).config.aux_layers


def load_drafter(config: EngineConfig, target: Target, room: Room) -> Drafter | None:
    """The drafter that a resolved config names; None: nothing is drafted."""
    if config.drafter == "off":
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    assert config.draft is not None
    network = checkpoint.load(Path(config.draft), target)
    drafter: Drafter = KINDS[config.drafter](config.drafter, target, network, room)
    return drafter
