"""How tokens are drafted, one file per way. `load` picks by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.config import TRAINED, EngineConfig
from model.draft import checkpoint
from model.drafters.base import Drafter, Room
from model.drafters.eagle import EagleDrafter
from model.drafters.flash import FlashDrafter
from model.drafters.medusa import MedusaDrafter
from model.drafters.ngram import NgramDrafter
from model.targets.base import Target


def tap_layers(config: EngineConfig) -> tuple[int, ...] | None:
    """The target's layers that the draft of a resolved config reads; None where there is none."""
    if config.drafter not in TRAINED or config.draft is None:
        return None
    return checkpoint.described(Path(config.draft)).config.tap_layers


def load(config: EngineConfig, target: Target, room: Room) -> Drafter | None:
    """The drafter that a resolved config names; None: nothing is drafted."""
    if config.drafter == "off":
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    assert config.draft is not None
    return trained(config.drafter, target, checkpoint.load(Path(config.draft), target), room)


def trained(name: str, target: Target, network: checkpoint.Network, room: Room) -> Drafter:
    """The drafter of this name with what it has learnt; the network's weights are packed, where they can be."""
    kinds: dict[str, Any] = {
        "flash": FlashDrafter,
        "flash-paper": FlashDrafter,
        "eagle": EagleDrafter,
        "medusa": MedusaDrafter,
    }
    drafter: Drafter = kinds[name](name, target, network, room)
    return drafter
