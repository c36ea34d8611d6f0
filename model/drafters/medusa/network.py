"""Defines the Medusa draft as a network: independent heads that predict the tokens after the target's next one.

Source: arXiv 2401.10774 (Medusa), section "Medusa heads": each head is one residual block over the target's last hidden
state, h + SiLU(W h + b). As in its first training stage the target is frozen; unlike there, heads share the target's
own lm_head instead of each learning one. Knows nothing of requests, caches or trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.drafters.layers import first_tokens


@dataclass(frozen=True)
class MedusaConfig:
    """Shape of a draft. `aux_layers` is the target's last decoder layer alone."""

    target_hidden_size: int
    vocab_size: int
    aux_layers: tuple[int, ...]
    block: int = 7  # heads: tokens proposed per pass
    vocabulary: int = 0  # size of the draft vocabulary; 0: all of the target's tokens


class MedusaNetwork(nn.Module):
    """Holds all trained weights. `lm_head` is the target's, frozen, and stays with the target."""

    def __init__(self, config: MedusaConfig, final_norm: Tensor | None = None) -> None:
        """Create an untrained draft, which proposes the target's next token at every depth. final_norm: (hidden,), the
        target's."""
        super().__init__()
        width = config.target_hidden_size
        self.config = config
        self.offered: Tensor | None
        self.register_buffer("offered", first_tokens(config.vocabulary))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.heads = nn.Linear(width, config.block * width)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        if final_norm is not None:
            with torch.no_grad():
                self.norm.weight.copy_(final_norm)

    def forward(self, last: Tensor) -> Tensor:
        """Predict hidden states for the next tokens: (..., target_hidden) -> (..., block, target_hidden), the input of
        lm_head.

        last: the target's last hidden states. Row j proposes the token j + 1 places after the one that the target
        itself chooses.
        """
        normed = self.norm(last)
        guessed: Tensor = normed[..., None, :] + F.silu(self.heads(normed)).unflatten(-1, (self.config.block, -1))
        return guessed
