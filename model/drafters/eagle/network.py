"""Defines the EAGLE draft as a network: one decoder layer that continues the target's hidden states, token by token.

Source: arXiv 2401.15077 (EAGLE), section "Drafting phase": the draft reads pairs of a feature and the token after it,
and predicts the next feature, which the target's lm_head turns into a token; arXiv 2503.01840 (EAGLE-3): the feature
fuses several of the target's layers, and training continues along the draft's own features, as serving does. Every
position of the sequence stays in the draft's context, visual ones uncompressed.

    row of position p    feature p, fused from the target's layers, or the draft's own beyond the target's last position
                       + embedding of position p + 1: a token, or a piece of a medium

Knows nothing of requests, caches or trees.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from model.drafters.layers import Attend, DraftLayer, Fuse, first_tokens, rotary_table


@dataclass(frozen=True)
class EagleConfig:
    """Shape of a draft. `aux_layers` are the target's decoder layers whose outputs it reads."""

    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    aux_layers: tuple[int, ...]
    num_heads: int = 4
    intermediate_size: int = 512
    block: int = 7  # maximum depth of a tree, one pass each
    rope_theta: float = 10000.0
    vocabulary: int = 0  # size of the draft vocabulary; 0: all of the target's tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class EagleNetwork(nn.Module):
    """Holds all trained weights. Token embeddings and `lm_head` are the target's, frozen, and stay with the target."""

    def __init__(self, config: EagleConfig) -> None:
        """Create an untrained draft."""
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.offered: Tensor | None
        self.register_buffer("offered", first_tokens(config.vocabulary))
        self.fuse = Fuse(config)
        self.feature = nn.Linear(width, width, bias=False)
        self.embed_norm = nn.RMSNorm(config.target_hidden_size, eps=1e-6)
        self.embed = nn.Linear(config.target_hidden_size, width, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config, 0)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, config.target_hidden_size, bias=False)

    def entry(self, embedded: Tensor) -> Tensor:
        """Project the embedding of the next position: (..., target_hidden) -> (..., hidden)."""
        added: Tensor = self.embed(self.embed_norm(embedded))
        return added

    def entering(self, features: Tensor, entries: Tensor) -> Tensor:
        """Build the layer's input rows from features and entries (..., hidden): (..., hidden)."""
        rows: Tensor = self.feature(features) + entries
        return rows

    def context_keys_values(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of rows (batch, rows, hidden) at positions (batch, rows): each (batch, heads, rows,
        head_dim)."""
        (layer,) = self.layers
        cos, sin = rotary_table(self.config, positions, rows.dtype)
        keys, values = layer.keys_values(layer.attention_norm(rows), cos, sin)  # type: ignore[operator]
        return keys, values

    def step(self, rows: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Predict the next features: rows (batch, rows, hidden) at positions (batch, rows) -> (batch, rows, hidden).

        `hidden` reads the result, and the rows of the next depth start from it.
        """
        (layer,) = self.layers
        cos, sin = rotary_table(self.config, positions, rows.dtype)
        features: Tensor = self.norm(layer(rows, cos, sin, attend))
        return features

    def hidden(self, features: Tensor) -> Tensor:
        """Project features (..., hidden) to (..., target_hidden), the input of the target's lm_head."""
        read: Tensor = self.out(features)
        return read
