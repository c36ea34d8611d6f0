"""Provides the parts of draft networks: fusing the target's hidden states, rotary positions, one transformer layer.

Attention is a function argument, so that training (many drafts over one context at once) and serving (one draft over a
KV cache) run the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# (layer, queries, keys, values) -> mixed values, all (batch, heads, rows, head_dim)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class LayerConfig(Protocol):
    """The fields of a draft's configuration that its layers need."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def target_hidden_size(self) -> int: ...

    @property
    def aux_layers(self) -> tuple[int, ...]: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def rope_theta(self) -> float: ...


def first_tokens(vocabulary: int) -> Tensor | None:
    """Return the initial draft vocabulary: (vocabulary,) token ids, ascending; None for 0, which means all tokens.

    A small draft vocabulary avoids reading the target's whole lm_head, which would be most of a draft's work for a
    large vocabulary (FR-Spec, arXiv 2502.14856). Training replaces the ids by the most frequent tokens.
    """
    return torch.arange(vocabulary) if vocabulary else None


class Fuse(nn.Module):
    """Fuses hidden states of several target layers into one context vector: linear, then RMSNorm."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        width = config.target_hidden_size
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6) for _ in config.aux_layers])
        self.linear = nn.Linear(width * len(config.aux_layers), config.hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, aux_hidden_states: Tensor) -> Tensor:
        """Fuse aux hidden states: (..., num_taps * target_hidden) -> (..., hidden)."""
        parts = aux_hidden_states.unflatten(-1, (len(self.norms), -1))
        weights = torch.stack([norm.weight for norm in self.norms])  # type: ignore[misc]
        scaled = F.rms_norm(parts, parts.shape[-1:], eps=1e-6) * weights  # all norms at once: it runs at every step
        fused: Tensor = self.norm(self.linear(scaled.flatten(-2)))
        return fused


def rotary_table(config: LayerConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for positions (batch, rows) in float32: each (batch, 1, rows, head_dim).

    The first half of sin is negated, so that `rotate` only needs to swap halves.
    """
    half = config.head_dim // 2
    speed = config.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = positions[:, None, :, None] * speed
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to (batch, heads, rows, head_dim), with the tables of `rotary_table`."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((right, left), -1) * sin


class DraftLayer(nn.Module):
    """One transformer layer. Queries come from the block; keys and values from the context and the block."""

    def __init__(self, config: LayerConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.index, self.heads = index, config.num_heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """Split heads: (batch, rows, heads * head_dim) -> (batch, heads, rows, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of x (batch, rows, hidden): each (batch, heads, rows, head_dim)."""
        keys, values = self.kv(x).chunk(2, -1)
        return rotate(self.split(keys), cos, sin), self.split(values)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Run the layer over x (batch, rows, hidden), the rows being drafted. cos, sin: see `rotary_table`."""
        y = self.attention_norm(x)
        keys, values = self.keys_values(y, cos, sin)
        mixed = attend(self.index, rotate(self.split(self.q(y)), cos, sin), keys, values)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result
