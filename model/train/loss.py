"""The loss of a block drafter. Knows logits only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def block_loss(drafted: Tensor, taught: Tensor, labels: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Position-weighted cross-entropy plus |p_draft - p_target|_1.

    drafted, taught: (blocks, block, vocab) logits of draft and target for the same token; labels: (blocks, block), -100
    where there is nothing to predict. Position j (from 1) counts with w_j = exp(-(j - 1) / gamma): a token is of no use
    unless all before it were accepted. Returns the loss and, for the log, the share of greedy hits per position.
    """
    block = drafted.shape[1]
    there = labels != -100
    weight = torch.exp(-torch.arange(block, device=labels.device) / gamma) * there
    surprise = F.cross_entropy(drafted.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    apart = (drafted.softmax(-1) - taught.softmax(-1)).abs().sum(-1)
    loss = ((surprise.view_as(weight) + apart) * weight).sum() / weight.sum().clamp_min(1e-6)
    hits = ((drafted.argmax(-1) == labels) & there).sum(0) / there.sum(0).clamp_min(1)
    return loss, hits
