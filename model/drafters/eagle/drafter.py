"""Drafts with EAGLE: keeps its layer's keys and values of every position of a sequence, and runs one pass per depth.

Row p of its context joins the feature of position p with the token (or the piece of a medium) at p + 1. So the last
kept position has no row yet: its feature is *pending* until the token after it is kept, or proposed from:

    target has computed    0 1 2 ... n-1                 newest: position n, known but not computed
    context rows           0 1 2 ... n-2                 pending: the feature of n-1
    tree                   root = (pending, newest), below it rows of the draft's own features, a pass per depth

The tree grows by confidence, as in arXiv 2406.16858 (EAGLE-2), section "Dynamic draft tree": at every depth the nodes
with the highest cumulative probability are expanded, and the best of all nodes become the tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backends import attention
from model.backends.attention import AttentionMetadata, MaskKind, prompt_rows
from model.backends.kv_cache import KVCache, uniform
from model.backends.linear import pack, weight_bytes
from model.decoding import tree
from model.decoding.tree import Trees
from model.drafters.base import Room
from model.drafters.eagle.network import EagleConfig, EagleNetwork
from model.drafters.slots import exchange_rows, indexed, take_last
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt
from model.transfer import upload


class EagleDrafter:
    """Implements `model.drafters.base.Drafter`. It runs in torch, even beside a native target, and exists for
    comparison."""

    native = False

    def __init__(
        self, name: str, target: Target, network: EagleNetwork, room: Room, cache: KVCache | None = None
    ) -> None:
        """Build the drafter. cache: the result of `new_cache`, if it was already created."""
        config = network.config
        self.name = name
        self.target, self.network, self.width = target, network, room.width
        self._ends = torch.tensor(sorted(target.eos_ids), device=target.device)
        self._head = target.head.of(network.offered)
        self.cache = cache or self.new_cache(target, network, room)
        self._pending = torch.zeros(room.num_slots, config.hidden_size, dtype=target.dtype, device=target.device)
        pack(network)

    @staticmethod
    def new_cache(target: Target, network: EagleNetwork, room: Room) -> KVCache:
        """Allocate the KV cache for this draft."""
        shape = EagleDrafter.cache_shape(network.config, room)
        return KVCache(**shape, num_slots=room.num_slots, dtype=target.dtype, device=target.device)

    @staticmethod
    def cache_shape(config: EagleConfig, room: Room) -> dict[str, Any]:
        """Return the shape of a slot of this draft's KV cache."""
        most_rows = 1 + (config.block - 1) * room.width  # of a growing tree: the root and the expanded nodes
        return {
            "layers": uniform(1, config.num_heads, config.head_dim),
            "capacity": room.capacity,
            "margin": max(room.margin, most_rows),
        }

    @property
    def num_bytes(self) -> int:
        return weight_bytes(self.network) + (self._head.num_bytes if self.network.offered is not None else 0)

    @property
    def cache_bytes(self) -> int:
        return self.cache.data.nbytes + self._pending.nbytes

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:  # noqa: ARG002
        self.cache.take(slot)

    def share(self, source: int, slot: int, length: int) -> bool:  # noqa: ARG002
        """Return False: the pending feature of the position before the shared end is not stored."""
        return False  # the pending feature is only kept for the last position

    def free(self, slot: int) -> None:
        self.cache.free(slot)

    def exchange(self, one: int, other: int) -> None:
        self.cache.exchange(one, other)
        exchange_rows(self._pending, one, other)

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        self.cache.check_integrity()
        assert self.cache.num_free == self.cache.num_slots - len(by_slot), "draft and target hold different slots"
        for slot, computed in by_slot.items():
            assert self.cache.lengths[slot] == max(0, computed - 1), "the draft's context is not what the target kept"

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        """Pair each feature with the next position's embedding and keep the last feature as pending."""
        fused = self.network.fuse(aux_hidden_states)
        features, entries = torch.cat((self._pending[slot][None], fused[:-1])), self.network.entry(embeds)
        if start == 0:  # no position comes before the first one
            features, entries = features[1:], entries[1:]
        self._pending[slot] = fused[-1]
        if (count := len(features)) == 0:
            return
        rows = prompt_rows(self.cache, slot, self.cache.lengths[slot], count)
        entering = self.network.entering(features, entries)[None]
        self._write(rows, entering)
        self.cache.lengths[slot] += count

    def _write(self, rows: AttentionMetadata, entering: Tensor) -> None:
        """Write keys and values of input rows (batch, rows, hidden)."""
        keys, values = self.network.context_keys_values(entering, rows.plan.positions)
        self.cache.write(0, rows.plan.locations(0), keys, values)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:
        """Add a row to the draft's context for each kept node, from its token and the fused states before it."""
        index = indexed(paths, max(map(len, paths)))
        starts = np.array(self.cache.lengths[: len(paths)], np.int32)
        counts = np.array([len(path) for path in paths], np.int32)
        rows = AttentionMetadata(self.cache, 0, index.shape[1], starts, counts, MaskKind.CAUSAL)
        tokens = np.take_along_axis(trees.tokens, index.astype(np.int64), 1)
        places = upload(index, aux_hidden_states.device).long()
        fused = self.network.fuse(
            aux_hidden_states.gather(1, places[:, :, None].expand(-1, -1, aux_hidden_states.shape[-1]))
        )
        pending = self._pending[: len(fused)]
        features = torch.cat((pending[:, None], fused[:, :-1]), 1)
        self._write(rows, self.network.entering(features, self._entry(upload(tokens, aux_hidden_states.device))))
        take_last(pending, fused, upload(counts, aux_hidden_states.device).long())
        for slot, path in enumerate(paths):
            self.cache.lengths[slot] += len(path)

    def _entry(self, tokens: Tensor) -> Tensor:
        """Embed tokens (...,) as the layer's second input: (..., hidden)."""
        return self.network.entry(self.target.embed(tokens))

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Grow the trees depth by depth and prune them to the budgets."""
        starts = np.array(self.cache.lengths[: len(newest)], np.int32)
        last, depths = upload(newest, self.target.device), min(self.network.config.block, int(budgets.max()))
        offered = self.network.offered
        expansion = Expansion(self, starts, budgets > 0)
        found = tree.levels(last, expansion, self._ends, depths=depths, width=self.width, offered=offered)
        return tree.pruned(newest, found.cpu().numpy(), width=self.width, budgets=budgets)


class Expansion:
    """Computes the logits behind each depth's nodes, by a pass over all nodes that were expanded so far."""

    def __init__(self, drafter: EagleDrafter, starts: np.ndarray, drafting: np.ndarray) -> None:
        """Start trees. starts: (batch,) int32, the end of each slot's context; drafting: (batch,) bool, slots that
        draft."""
        self._drafter, self._starts, self._drafting = drafter, starts, drafting
        batch = len(starts)
        self._entering: list[Tensor] = []  # of each depth, (batch, nodes, hidden)
        self._parents = np.zeros((batch, 0), np.int32)
        self._depths = np.zeros(0, np.int32)
        self._features = drafter._pending[:batch, None]  # of all nodes expanded so far: (batch, nodes, hidden)

    def __call__(self, depth: int, tokens: Tensor, parents: Tensor) -> Tensor:
        """Expand the nodes of one depth: tokens, parents (batch, nodes) -> logits (batch, nodes, draft vocabulary)."""
        drafter, network = self._drafter, self._drafter.network
        wide = self._features.shape[-1]
        from_parents = self._features.gather(1, parents.clamp(min=0)[:, :, None].expand(-1, -1, wide))
        self._entering.append(network.entering(from_parents, drafter._entry(tokens)))
        self._parents = np.concatenate((self._parents, parents.cpu().numpy().astype(np.int32)), 1)
        self._depths = np.concatenate((self._depths, np.full(tokens.shape[1], depth, np.int32)))
        num = self._parents.shape[1]
        counts = np.where(self._drafting, num, 0).astype(np.int32)
        rows = AttentionMetadata(drafter.cache, 0, num, self._starts, counts, MaskKind.TREE, self._parents)
        plan = rows.plan
        positions = plan.starts[:, None] + upload(self._depths, plan.starts.device)
        self._features = network.step(
            torch.cat(self._entering, 1), positions, lambda layer, q, k, v: attention.attend(plan, layer, q, k, v)
        )
        return drafter._head(network.hidden(self._features[:, -tokens.shape[1] :]))
