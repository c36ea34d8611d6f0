"""Creates new, untrained drafts, in the shape in which each drafter is trained.

Parts that several drafters have are of one size, so that comparisons show the method and not the size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model.drafters.checkpoint import KINDS, DraftShape, Network
from model.drafters.flash.network import ALL
from model.drafters.medusa.network import MedusaNetwork
from model.errors import ConfigError
from model.targets.base import Target

# Aux layers that a target must offer for a drafter; otherwise the target's default ones. For FLASH the last layer alone
# was the best in our study of layers.
TAP_LAYERS: dict[str, tuple[int, ...]] = {"flash": (-1,), "medusa": (-1,)}
# As published in arXiv 2505.12728: one layer, 64 latents, five tokens per pass, drafted independently of each other.
PAPER = {"num_layers": 1, "num_latents": 64, "block": 5, "sequential_rank": 0, "vocabulary": 0}
# The best shape in our study (docs/decisions/0012): means of neighbouring positions, and long blocks.
FLASH = {"pooled": 16, "num_latents": ALL, "block": 10}
HEAD_DIM = 64
SHAPES: dict[str, dict[str, int]] = {"flash": FLASH, "flash-paper": PAPER}
LEAST = {"pooled": 0, "num_latents": ALL, "sequential_rank": 0, "vocabulary": 0}
# For a target with more tokens than LARGE_VOCABULARY, the draft vocabulary has the VOCABULARY most frequent ones.
LARGE_VOCABULARY, VOCABULARY = 32768, 16384
FEWEST_TOKENS = 64  # smallest draft vocabulary, end-of-sequence tokens included
FULL_WIDTH = 512  # up to this hidden size a draft is as wide as its target


@dataclass(frozen=True)
class Sizes:
    """The parts of a draft's shape that a user may choose; None: the preset. A size for a part that the drafter does
    not have is an error."""

    hidden_size: int | None = None
    num_layers: int | None = None
    block: int | None = None
    pooled: int | None = None
    num_latents: int | None = None
    sequential_rank: int | None = None
    vocabulary: int | None = None


def width(target_hidden_size: int) -> int:
    """Return the hidden size for a draft: that of a small target, half that of a large one, in whole heads."""
    wanted = target_hidden_size if target_hidden_size <= FULL_WIDTH else max(FULL_WIDTH, target_hidden_size // 2)
    return max(1, wanted // HEAD_DIM) * HEAD_DIM


def shape(drafter: str, target: Target, sizes: Sizes) -> DraftShape:
    """Build the configuration of a new draft. Raises ConfigError if a size does not fit."""
    chosen: dict[str, Any] = {name: value for name, value in asdict(sizes).items() if value is not None}
    kind, _ = KINDS[drafter]
    if drafter in SHAPES:
        chosen = SHAPES[drafter] | chosen
    elif unknown := chosen.keys() - kind.__dataclass_fields__.keys():
        raise ConfigError(f"--drafter {drafter} has no {', '.join(sorted(unknown))}")
    common = {"target_hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    offered = chosen.setdefault("vocabulary", VOCABULARY if target.vocab_size > LARGE_VOCABULARY else 0)
    if offered and not FEWEST_TOKENS <= offered <= target.vocab_size:
        raise ConfigError(f"vocabulary must be 0 or {FEWEST_TOKENS} to {target.vocab_size} tokens; got {offered}")
    if drafter != "medusa":
        hidden = chosen.setdefault("hidden_size", width(target.hidden_size))
        if hidden % HEAD_DIM:
            raise ConfigError(f"hidden_size must be a multiple of {HEAD_DIM}; got {hidden}")
        common |= {"num_heads": hidden // HEAD_DIM, "intermediate_size": 2 * hidden}
    for name, value in chosen.items():
        if value < LEAST.get(name, 1):
            raise ConfigError(f"{name} is out of range: {value}")
    made: DraftShape = kind(**common, aux_layers=target.aux_layers, **chosen)
    return made


def new(drafter: str, target: Target, *, hidden_size: int | None = None, sizes: Sizes | None = None) -> Network:
    """Create an untrained draft network. drafter: one of checkpoint.KINDS. The target must offer the layers that
    TAP_LAYERS names."""
    if sizes is None:
        sizes = Sizes(hidden_size=None if drafter == "medusa" else hidden_size)
    made = shape(drafter, target, sizes)
    if drafter == "medusa":
        return MedusaNetwork(made, target.final_norm)  # type: ignore[arg-type]
    network: Network = KINDS[drafter][1](made)
    return network
