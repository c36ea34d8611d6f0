"""Compute the training loss of a draft: predict what the target said next, from random places of its answers.

Places and loss are the same for every drafter. Each drafter's own function puts its network into the state in which
serving would use it at such a place, and returns the logits that the network drafts there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.drafters.checkpoint import Network
from model.drafters.eagle.network import EagleNetwork
from model.drafters.flash.network import DraftNetwork
from model.drafters.medusa.network import MedusaNetwork
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt
from model.train.seen import Seen


@dataclass(frozen=True)
class Anchors:
    """Hold the places where drafts begin; every answer has the same number of them. drafts = batch * anchors.

    places: (batch, anchors), position of the newest token. newest: (batch, anchors), id of that token. labels: (drafts,
    block), ids of the tokens after it, -100 beyond the end of the answer. taught: (drafts, block, tokens offered), the
    target's log-probabilities for those tokens. chosen: (drafts, block), false where a grammar left no choice: such
    tokens are written without a draft, which cannot know the grammar.
    """

    places: Tensor
    newest: Tensor
    labels: Tensor
    taught: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, seen: list[Seen], block: int, count: int, rng: random.Random) -> Anchors:
        """Draw `count` random positions in each answer at which a draft of `block` tokens is trained.

        A position is that of the newest known token: any answer token except the last. Answers need two or more.
        """
        places, newest, labels, taught, chosen = [], [], [], [], []
        for each in seen:
            ids = each.ids
            # The last token has no label, so no draft begins with it.
            first, last = len(each.prompt.ids), len(ids) - 2
            for p in (rng.randint(first, max(first, last)) for _ in range(count)):
                places.append(p)
                newest.append(ids[p])
                labels.append([ids[p + 1 + j] if p + 1 + j < len(ids) else -100 for j in range(block)])
                rows = [min(p + j, len(ids) - 1) - first + 1 for j in range(block)]
                taught.append(each.taught[rows])
                chosen.append(each.chosen[rows])
        device = seen[0].aux_hidden_states.device
        by_answer = (len(seen), count)
        return cls(
            torch.tensor(places, device=device).view(by_answer),
            torch.tensor(newest, device=device).view(by_answer),
            torch.tensor(labels, device=device),
            torch.stack(taught).float(),
            torch.stack(chosen),
        )

    @property
    def previous(self) -> Tensor:
        """Return the token before each label: (drafts, block)."""
        return torch.cat((self.newest.flatten()[:, None], self.labels[:, :-1].clamp_min(0)), 1)


class Learner:
    """Pair a draft network in training with the target's lm_head, limited to the tokens that the draft may propose."""

    def __init__(self, target: Target, network: Network) -> None:
        self.target, self.network = target, network
        self._head, self._place = target.head.of(network.offered), None
        if network.offered is not None:
            self._place = torch.full((target.vocab_size,), -100, device=target.device)
            self._place[network.offered] = torch.arange(len(network.offered), device=target.device)

    def read(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., target_hidden) to logits (..., tokens offered)."""
        return self._head(hidden.to(self.target.dtype))

    def labels(self, tokens: Tensor) -> Tensor:
        """Map token ids to their indices among the tokens offered; -100 for -100 and for tokens not offered."""
        return tokens if self._place is None else torch.where(tokens < 0, tokens, self._place[tokens.clamp_min(0)])


def block_loss(drafted: Tensor, taught: Tensor, labels: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute position-weighted cross-entropy plus |p_draft - p_target|_1, averaged over positions.

    drafted, taught: (blocks, block, tokens), the draft's logits and the target's log-probabilities for the same token.
    labels: (blocks, block), -100 where there is nothing to predict. Position j (from 1) has weight w_j = exp(-(j - 1) /
    gamma), because a token is useful only if all tokens before it were accepted.

    Returns the loss and, for the log, the share of positions whose greedy token is right: (block,).
    """
    block = drafted.shape[1]
    there = labels != -100
    weight = torch.exp(-torch.arange(block, device=labels.device) / gamma) * there
    surprise = F.cross_entropy(drafted.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    apart = (drafted.softmax(-1) - taught.exp()).abs().sum(-1)
    loss = ((surprise.view_as(weight) + apart) * weight).sum() / weight.sum().clamp_min(1e-6)
    hits = ((drafted.argmax(-1) == labels) & there).sum(0) / there.sum(0).clamp_min(1)
    return loss, hits


def draft_loss(
    learner: Learner, seen: list[Seen], *, anchors: int, gamma: float, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Draft `anchors` times per answer at random places, and compute the loss of those drafts.

    Returns the loss and the share of greedy hits by position: (block,).
    """
    network = learner.network
    places = Anchors.of(seen, network.config.block, anchors, rng)
    match network:
        case DraftNetwork():
            drafted = flash_logits(learner, network, seen, places)
        case EagleNetwork():
            drafted = eagle_logits(learner, network, seen, places)
        case MedusaNetwork():
            drafted = medusa_logits(learner, network, seen, places)
    labels = learner.labels(places.labels).masked_fill(~places.chosen, -100)
    return block_loss(drafted.float(), places.taught, labels, gamma=gamma)


# --- logits of each drafter: (drafts, block, tokens offered)


def flash_logits(learner: Learner, network: DraftNetwork, seen: list[Seen], anchors: Anchors) -> Tensor:
    """Draft with a FLASH network at every anchor in one pass.

    A block attends to the context before its newest token and to itself, never to other blocks.
    """
    block, count = network.config.block, anchors.places.shape[1]
    contexts, before = [], []
    for each, places in zip(seen, anchors.places.tolist(), strict=True):
        context, index = context_of(network, each.aux_hidden_states.float(), each.prompt)
        contexts.append(context)
        before.append([index[p] for p in places])
    context = _padded(contexts)
    device, batch, longest = context.device, len(seen), context.shape[1]
    starts = torch.tensor(before, device=device)  # (batch, anchors)
    kept = network.context_keys_values(context, torch.arange(longest, device=device).expand(batch, -1))
    owner = torch.arange(count * block, device=device) // block
    sees_context = torch.arange(longest, device=device) < starts.repeat_interleave(block, 1)[:, :, None]
    sees_block = (owner[:, None] == owner[None, :]).expand(batch, -1, -1)
    mask = torch.cat((sees_context, sees_block), -1)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = kept[layer]
        return F.scaled_dot_product_attention(q, torch.cat((keys, k), 2), torch.cat((values, v), 2), attn_mask=mask)

    tails = context.gather(1, (starts - 1)[:, :, None].expand(-1, -1, context.shape[2]))
    hidden = network.block_hidden(learner.target.embed(anchors.newest).float(), tails, starts, attend)
    drafted, head = learner.read(hidden).flatten(0, 1), network.sequential
    return drafted if head is None else drafted + head.bias(hidden.flatten(0, 1), anchors.previous)


def context_of(network: DraftNetwork, aux_hidden_states: Tensor, prompt: TokenizedPrompt) -> tuple[Tensor, list[int]]:
    """Build the FLASH draft's context of one sequence, with media averaged and compressed as the network's config says.

    aux_hidden_states: (positions, num_taps * hidden). Returns the context rows (rows, hidden) and, for each position,
    the number of rows before it.
    """
    parts, read = list[Tensor](), list[tuple[int, bool]]()  # inputs of fuse; positions of each part, and whether visual
    at = 0
    for start, end in prompt.spans:
        medium = aux_hidden_states[start : end if network.config.num_latents else start]
        if network.config.pooled and len(medium):
            medium = network.averaged(network.read(medium, 0, len(medium)), len(medium))
        parts += [aux_hidden_states[at:start], medium]
        read += [(start - at, False), (end - start, True)]
        at = end
    parts.append(aux_hidden_states[at:])
    read.append((len(aux_hidden_states) - at, False))
    fused = network.fuse(torch.cat(parts)).split([len(part) for part in parts])
    rows: list[Tensor] = []
    index: list[int] = []
    count = 0
    for part, (positions, visual) in zip(fused, read, strict=True):
        if visual:
            rows.append(part if network.compressor is None else network.compressor(part[None])[0])
            count += len(rows[-1])
            index += [count] * positions
        else:
            rows.append(part)
            index += range(count, count + positions)
            count += positions
    return torch.cat(rows), index


def eagle_logits(learner: Learner, network: EagleNetwork, seen: list[Seen], anchors: Anchors) -> Tensor:
    """Draft with an EAGLE network, one pass per depth, each fed with the features of the one before.

    This is the training-time test of EAGLE-3 (arXiv 2503.01840). A draft attends to the context up to the position
    before its newest token, and to its own earlier rows.
    """
    features = _padded([network.fuse(each.aux_hidden_states.float()) for each in seen])
    entries = network.entry(_padded([each.embeds.float() for each in seen]))
    context = network.entering(features[:, :-1], entries[:, 1:])
    device, (batch, longest) = context.device, context.shape[:2]
    count = anchors.places.shape[1]
    kept = network.context_keys_values(context, torch.arange(longest, device=device).expand(batch, -1))
    before = anchors.places - 1  # both the number of context rows and the position of a draft's first row
    sees_context = (torch.arange(longest, device=device) < before[:, :, None])[:, None]
    own = torch.eye(count, dtype=torch.bool, device=device).expand(batch, 1, -1, -1)
    states = features.gather(1, before[:, :, None].expand(-1, -1, features.shape[-1]))
    tokens = anchors.previous.view(batch, count, -1)
    drafted = []
    for depth in range(network.config.block):
        entry = network.entry(learner.target.embed(tokens[:, :, depth]).float())
        mask = torch.cat((sees_context, *[own] * (depth + 1)), -1)
        attend = Growing(*kept, mask)
        states = network.step(network.entering(states, entry), before + depth, attend)
        kept = attend.keys, attend.values
        drafted.append(learner.read(network.hidden(states)))
    return torch.stack(drafted, 2).flatten(0, 1)


class Growing:
    """Attend over keys and values (batch, heads, rows, head_dim), after appending those of the current pass."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """mask: (batch, 1, rows, earlier keys + rows), true where a row may attend to a key."""
        self.keys, self.values, self._mask = keys, values, mask

    def __call__(self, _: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self._mask)


def medusa_logits(learner: Learner, network: MedusaNetwork, seen: list[Seen], anchors: Anchors) -> Tensor:
    """Draft with all Medusa heads from the target's hidden state at the position before the newest token."""
    last = torch.cat([each.aux_hidden_states[p - 1] for each, p in zip(seen, anchors.places, strict=True)])
    return learner.read(network(last.float()))


def _padded(rows: list[Tensor]) -> Tensor:
    """Pad tensors of shape (rows, width) with zeros at the end and stack them: (batch, longest, width)."""
    longest = max(map(len, rows))
    return torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in rows])
