"""Defines the FLASH draft as a network: fuse the target's hidden states, compress the visual ones, draft a block per
pass.

Source of the method: arXiv 2505.12728, sections "latent-aware token compression" and "semi-autoregressive drafting".
Ours departs from the paper in three ways (docs/decisions/0012): the context enters every layer as keys and values, a
recurrent sequential head restores the dependence between the tokens of a block, and text positions of the context keep
their full resolution.

Knows nothing of requests, caches or trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.drafters.layers import Attend, DraftLayer, Fuse, first_tokens, rotary_table

ALL = -1  # `num_latents`: keep every row of a medium, uncompressed
ENOUGH = 32  # about the most positions averaged per row; larger media are subsampled


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a draft. `aux_layers` are the target's decoder layers whose outputs it reads."""

    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    aux_layers: tuple[int, ...]
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 512
    block: int = 7  # tokens proposed per pass
    pooled: int = 0  # rows to which an image or video is averaged first; 0: no averaging
    num_latents: int = 16  # per image or video; 0: the draft reads text only; ALL: every row, uncompressed
    sequential_rank: int = 64  # 0: positions of a block are independent
    rope_theta: float = 10000.0
    vocabulary: int = 0  # size of the draft vocabulary; 0: all of the target's tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class LatentCompressor(nn.Module):
    """Pools the visual positions of one medium into a few latents: softmax(Q K(F)^T / sqrt d) V(F), Q learned."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.queries = nn.Parameter(torch.randn(config.num_latents, config.hidden_size) * 0.5)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, fused: Tensor) -> Tensor:
        """Compress one medium: (batch, visual positions, hidden) -> (batch, num_latents, hidden)."""
        batch = fused.shape[0]
        queries = self.queries.expand(batch, -1, -1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, self.key(fused), self.value(fused))
        )
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents: Tensor = self.norm(self.out(pooled))
        return latents


class SequentialHead(nn.Module):
    """Restores the dependence between the tokens of a block, which are proposed independently, by a recurrent cell.

    s_j = silu(B[x_j] + C h_j + S s_(j-1)); A s_j is added to the logits that h_j gives for the token behind x_j.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank = config.sequential_rank
        self.before = nn.Embedding(config.vocab_size, rank)  # B
        self.context = nn.Linear(config.target_hidden_size, rank, bias=False)  # C
        self.state = nn.Linear(rank, rank, bias=False)  # S
        self.after = nn.Linear(rank, config.vocabulary or config.vocab_size, bias=False)  # A
        nn.init.normal_(self.before.weight, std=0.5)
        nn.init.zeros_(self.after.weight)

    def forward(self, tokens: Tensor, context: Tensor, states: Tensor | None) -> Tensor:
        """Compute the states (..., rank) of token ids (...,).

        context: (..., rank), C of their row; states: (..., rank), of the tokens before them, None if they are the
        newest tokens.
        """
        entering = self.before(tokens) + context
        return F.silu(entering if states is None else entering + self.state(states))

    def along(self, contexts: Tensor) -> Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """Build the head's step function for one pass of the draft. contexts: (batch, block, rank), C of its rows.

        The function takes a depth, the tokens (batch, any) before that depth, and the states of the tokens before
        those. It returns the tokens' states and the bias of the logits.
        """

        def step(depth: int, tokens: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
            """Advance the states by one depth and compute the bias."""
            states = self(tokens, contexts[:, depth, None], states)
            return states, self.after(states)

        return step

    def bias(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Compute the bias of the logits along one path: (drafts, block, vocab).

        hidden: (drafts, block, target_hidden); tokens: (drafts, block), the token before each proposed one.
        """
        contexts, states = self.context(hidden), list[Tensor]()
        for depth in range(tokens.shape[1]):
            states.append(self(tokens[:, depth], contexts[:, depth], states[-1] if states else None))
        bias: Tensor = self.after(torch.stack(states, 1))
        return bias


def _apart(pooled: int, total: int) -> int:
    """Return the stride, an odd number, at which the positions of a medium of `total` are subsampled."""
    return max(1, total // (pooled * ENOUGH)) | 1


class DraftNetwork(nn.Module):
    """Holds all trained weights. Token embeddings and `lm_head` are the target's, frozen, and stay with the target."""

    def __init__(self, config: DraftConfig) -> None:
        """Create an untrained draft."""
        super().__init__()
        self.config = config
        self.offered: Tensor | None
        self.register_buffer("offered", first_tokens(config.vocabulary))
        self.fuse = Fuse(config)
        self.compressor = LatentCompressor(config) if config.num_latents > 0 else None
        self.embed = nn.Linear(config.target_hidden_size, config.hidden_size, bias=False)
        self.feature = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.masks = nn.Parameter(torch.randn(config.block - 1, config.hidden_size) * 0.5)
        self.embed_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.layers = nn.ModuleList([DraftLayer(config, i) for i in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.out = nn.Linear(config.hidden_size, config.target_hidden_size, bias=False)
        self.sequential = SequentialHead(config) if config.sequential_rank else None

    def read(self, aux_hidden_states: Tensor, at: int, total: int) -> Tensor:
        """Subsample positions at.. of a medium of `total`, (positions, width), before they are averaged.

        Keeps every position, or for long media evenly spaced ones. The stride is odd, so that all columns of a picture
        occur.
        """
        return aux_hidden_states[-at % _apart(self.config.pooled, total) :: _apart(self.config.pooled, total)]

    def rows_of(self, total: int) -> int:
        """Return the number of context rows of a medium of `total` positions."""
        config = self.config
        if self.compressor is not None:
            return config.num_latents
        return min(config.pooled or total, total) if config.num_latents else 0

    def averaged(self, read: Tensor, total: int) -> Tensor:
        """Average neighbouring positions of a medium of `total`: the result of `read`, (read, width) -> (pooled,
        width).

        Neighbours are neighbours in prompt order, and all rows average about the same number. A medium with fewer
        positions than `pooled` has one row per position.
        """
        rows = min(self.config.pooled, total)
        places = torch.arange(0, total, _apart(self.config.pooled, total), device=read.device)
        row_of = (places * rows).div(total, rounding_mode="floor")
        added = read.new_zeros(rows, read.shape[1]).index_add_(0, row_of, read)
        return added / torch.bincount(row_of, minlength=rows)[:, None]

    def context_keys_values(self, context: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute keys and values of context (batch, rows, hidden) at positions (batch, rows), for every layer: each
        (batch, heads, rows, head_dim)."""
        cos, sin = rotary_table(self.config, positions, context.dtype)
        return [layer.keys_values(context, cos, sin) for layer in self.layers]  # type: ignore[operator]

    def block_input(self, last: Tensor, tail: Tensor) -> Tensor:
        """Build the layers' input: last (batch, blocks, target_hidden) and tail (batch, blocks, hidden), as for
        `block_hidden` -> (batch, blocks, block, hidden)."""
        masks = self.masks.expand(*last.shape[:2], -1, -1)
        rows = torch.cat((self.embed(last)[:, :, None], masks), 2)
        entering: Tensor = self.embed_norm(rows + self.feature(tail)[:, :, None])
        return entering

    def block_hidden(self, last: Tensor, tail: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run one pass over blocks: (batch, blocks, block, target_hidden), the input of the target's lm_head.

        last: (batch, blocks, target_hidden), the target's embedding of the newest token of each block; tail: (batch,
        blocks, hidden), the last context row, which is the target's fused state when it chose that token; positions:
        (batch, blocks), the newest token's position in the context. Row j proposes the token j + 1 places after the
        newest one.
        """
        blocks = positions.shape[1]
        x = self.block_input(last, tail).flatten(1, 2)
        places = positions[:, :, None] + torch.arange(self.config.block, device=positions.device)
        cos, sin = rotary_table(self.config, places.flatten(1), x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        hidden: Tensor = self.out(self.norm(x)).unflatten(1, (blocks, self.config.block))
        return hidden
