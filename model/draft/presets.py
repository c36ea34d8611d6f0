"""A new, untrained draft for a target: the shapes that each drafter is trained in.

All are of one size where they have the same parts, so that what is compared is how they draft.
"""

from __future__ import annotations

from model.draft.checkpoint import Network
from model.draft.eagle import EagleConfig, EagleNetwork
from model.draft.medusa import MedusaConfig, MedusaNetwork
from model.draft.network import DraftConfig, DraftNetwork
from model.targets.base import Target

TAP_LAYERS: dict[str, tuple[int, ...]] = {"medusa": (-1,)}  # that a target must offer; else those it offers by itself
# As published in arXiv 2505.12728: one layer, 64 latents, five tokens a pass, none of which knows of the others.
PAPER = {"num_layers": 1, "num_latents": 64, "block": 5, "sequential_rank": 0}


def new(drafter: str, target: Target, *, hidden_size: int = 256) -> Network:
    """`drafter` is one of checkpoint.KINDS. The target offers the layers that TAP_LAYERS names."""
    if drafter == "medusa":
        shape = MedusaConfig(target.hidden_size, target.vocab_size, target.tap_layers)
        return MedusaNetwork(shape, target.final_norm)
    if drafter == "eagle":
        return EagleNetwork(EagleConfig(hidden_size, target.hidden_size, target.vocab_size, target.tap_layers))
    sizes = PAPER if drafter == "flash-paper" else {}
    return DraftNetwork(DraftConfig(hidden_size, target.hidden_size, target.vocab_size, target.tap_layers, **sizes))
