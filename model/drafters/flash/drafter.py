"""Drafts with FLASH: keeps the draft's context of every sequence and proposes one tree per step.

The context of a sequence has one row per entry, in prompt order:  text | latents of a medium | text | answer tokens.
Its keys and values live in a KV cache of their own, with the same slots as the target's. Only positions that the target
has computed *and kept* enter it, so it never has to be rolled back. The newest token is not in it yet, since its hidden
state does not exist; the block pass reads its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backends import attention
from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind
from model.backends.graphs import MAX_ROWS, Replays
from model.backends.kv_cache import KVCache, uniform
from model.backends.linear import pack, weight_bytes
from model.decoding import tree
from model.decoding.tree import FixedTree, Trees
from model.drafters.base import Room
from model.drafters.flash.continuation import Continuation
from model.drafters.flash.native import native_step
from model.drafters.flash.network import DraftConfig, DraftNetwork
from model.drafters.slots import exchange_items, exchange_rows, indexed, take_last
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt
from model.transfer import upload

# The tree of `flash-paper`, children by path of ranks: 25 nodes over five positions, as in the paper. The shape is that
# of EAGLE's static tree (arXiv 2401.15077), which has the same numbers of nodes and positions.
PAPER_TREE = {
    (): 4,
    (0,): 3, (1,): 2, (2,): 2, (3,): 1,
    (0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1,
    (0, 0, 0): 3,
    (0, 0, 0, 0): 2,
}  # fmt: skip


class FlashDrafter:
    """Implements `model.drafters.base.Drafter`.

    It runs in one of two ways: in the native library beside a native target (then `step` is set), or in torch, where
    passes are recorded and replayed if the engine has a recorder. A native round calls `step` itself.
    """

    def __init__(
        self, name: str, target: Target, network: DraftNetwork, room: Room, cache: KVCache | None = None
    ) -> None:
        """Build the drafter. cache: the result of `new_cache`, if it was already created."""
        config = network.config
        self.name = name
        self.target, self.network, self.width = target, network, room.width
        self.block = config.block
        self._fixed = FixedTree.of(PAPER_TREE, config.block) if name == "flash-paper" else None
        self.cache = cache or self.new_cache(target, network, room)
        self.tails = self.cache.data.new_zeros(self.cache.num_slots, config.hidden_size)  # last row of each context
        self._spans: dict[int, tuple[tuple[int, int], ...]] = {}  # slot -> its prompt's media
        self._visual: dict[int, list[Tensor]] = {}  # slot -> kept states of a partly prefilled medium
        self._ends = torch.tensor(sorted(target.eos_ids), device=target.device)
        self._head = target.head.of(network.offered)
        self._continuation = Continuation(network)
        positions = self.cache.stride + config.block
        self.step = native_step(target, network, self._head.matrix, self.width, self._fixed, positions)
        self.drafted: Tensor | None = None  # (slots, block, vocab): the logits of the last block
        self._proposals = self._observations = None
        if self.step is None:
            pack(network)
        if self.step is None and room.recorder is not None and room.margin <= MAX_ROWS:
            self._proposals = Replays(self._propose, self.cache, room.recorder, max_rows=self.block)
            self._observations = Replays(self._observe, self.cache, room.recorder, max_rows=room.margin)
            with torch.inference_mode():
                self._proposals.prepare(1, [self.block])
                width = len(config.aux_layers) * config.target_hidden_size
                self._observations.prepare(0, range(1, room.margin + 1), width)

    @staticmethod
    def new_cache(target: Target, network: DraftNetwork, room: Room) -> KVCache:
        """Allocate the KV cache for this draft."""
        shape = FlashDrafter.cache_shape(network.config, room)
        return KVCache(**shape, num_slots=room.num_slots, dtype=target.dtype, device=target.device)

    @staticmethod
    def cache_shape(config: DraftConfig, room: Room) -> dict[str, Any]:
        """Return the shape of a slot of this draft's KV cache."""
        return {
            "layers": uniform(config.num_layers, config.num_heads, config.head_dim),
            "capacity": room.capacity,
            "margin": max(room.margin, config.block),
        }

    @property
    def native(self) -> bool:
        return self.step is not None

    @property
    def num_bytes(self) -> int:
        own = self._head.num_bytes if self.network.offered is not None else 0
        packed = 0 if self.step is None else self.step.stack.num_bytes + self.step.num_bytes
        return weight_bytes(self.network) + own + packed

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes + self.tails.nbytes

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        self.cache.take(slot)
        self._spans[slot], self._visual[slot] = prompt.spans, []

    def share(self, source: int, slot: int, length: int) -> bool:
        """Copy the context rows of the shared positions. A medium may have fewer rows than positions."""
        media = [last - first for first, last in self._spans[slot] if last <= length]
        self.cache.share(source, slot, length - sum(media) + sum(map(self.network.rows_of, media)))
        return True

    def free(self, slot: int) -> None:
        self.cache.free(slot)
        del self._spans[slot], self._visual[slot]

    def exchange(self, one: int, other: int) -> None:
        self.cache.exchange(one, other)
        exchange_rows(self.tails, one, other)
        exchange_items(self._spans, one, other)
        exchange_items(self._visual, one, other)

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        self.cache.check_integrity()
        assert self.cache.num_free == self.cache.num_slots - len(by_slot), "draft and target hold different slots"
        assert self._spans.keys() == self._visual.keys() == by_slot.keys(), "a medium of a sequence that is gone"

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:  # noqa: ARG002
        """Add one context row per text position, and the rows of a medium after its last position."""
        rows = []
        at, end = start, start + len(aux_hidden_states)
        for first, last in self._spans[slot]:
            if last <= start or first >= end:
                continue
            if first > at:
                rows.append(self._fused(aux_hidden_states[at - start : first - start]))
            at = max(first, at)
            upto = min(last, end)
            if self.network.config.num_latents:
                self._visual[slot].append(
                    self._seen(aux_hidden_states[at - start : upto - start], at - first, last - first)
                )
                if upto == last:
                    rows.append(self._latents(self._visual[slot], last - first))
                    self._visual[slot] = []
            at = upto
        if at < end:
            rows.append(self._fused(aux_hidden_states[at - start :]))
        if rows:
            context = torch.cat(rows)
            behind = self._behind(slot, len(context), [len(context)])
            if self.step is not None:
                self.step.stack.write_kv(context[None], None, behind)
            else:
                self._hold(behind.plan, context[None])
            self.tails[slot] = context[-1]
            self._advance(slot, [len(context)])

    def _fused(self, aux_hidden_states: Tensor) -> Tensor:
        """Fuse aux hidden states (rows, num_taps * target_hidden) into context rows (rows, hidden)."""
        return self.network.fuse(aux_hidden_states) if self.step is None else self.step.fused(aux_hidden_states)

    def _seen(self, aux_hidden_states: Tensor, at: int, total: int) -> Tensor:
        """Reduce the positions at.. of a medium of `total` positions to the states that are kept until the whole medium
        is known."""
        return (
            self.network.read(aux_hidden_states, at, total).clone()
            if self.network.config.pooled
            else self._fused(aux_hidden_states)
        )

    def _latents(self, seen: list[Tensor], total: int) -> Tensor:
        """Compute the context rows of a medium of `total` positions from its kept states: (rows, hidden)."""
        rows = torch.cat(seen)
        if self.network.config.pooled:
            rows = self._fused(self.network.averaged(rows, total))
        return rows if self.network.compressor is None else self.network.compressor(rows[None])[0]

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:  # noqa: ARG002
        """Add one context row per kept node."""
        counts = [len(path) for path in paths]
        rows = self._behind(0, max(counts), counts)
        if self.step is not None:
            self.step.observe(aux_hidden_states, indexed(paths, aux_hidden_states.shape[1]), rows, self.tails)
        else:
            self._observe_in_torch(indexed(paths, rows.num), rows, aux_hidden_states)
        self._advance(0, counts)

    def _observe_in_torch(self, index: np.ndarray, rows: AttentionMetadata, aux_hidden_states: Tensor) -> None:
        """Add the rows of aux_hidden_states with indices index (batch, rows) to each context."""
        inputs = upload(np.concatenate((index, rows.counts[:, None]), 1), aux_hidden_states.device).long()
        kept = aux_hidden_states.gather(1, inputs[:, :-1, None].expand(-1, -1, aux_hidden_states.shape[-1]))
        if self._observations is not None:
            (context,) = self._observations(rows, np.zeros((0, *index.shape), np.int64), kept)
        else:
            context = self.network.fuse(kept)
            self._hold(rows.plan, context)
        take_last(self.tails[: rows.batch], context, inputs[:, -1])

    def _observe(self, plan: AttentionTensors, _: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
        """Fuse the target's hidden states of kept rows, and write their keys and values to the draft's cache.

        Reads tensors alone, so that it can be recorded (see graphs.py).
        """
        assert kept is not None
        context = self.network.fuse(kept)
        self._hold(plan, context)
        return (context,)

    def _hold(self, plan: AttentionTensors, context: Tensor) -> None:
        """Write keys and values of context (batch, rows, hidden)."""
        for layer, (keys, values) in enumerate(self.network.context_keys_values(context, plan.positions)):
            self.cache.write(layer, plan.locations(layer), keys, values)

    def _behind(self, first_slot: int, num: int, counts: list[int]) -> AttentionMetadata:
        """Describe `num` rows behind the contexts of slots first_slot.., of which counts[b] are real."""
        starts = np.array(self.cache.lengths[first_slot : first_slot + len(counts)], np.int32)
        return AttentionMetadata(self.cache, first_slot, num, starts, np.array(counts, np.int32), MaskKind.CAUSAL)

    def _advance(self, first_slot: int, counts: list[int]) -> None:
        """Advance the context lengths of slots first_slot.. by `counts`."""
        for b, count in enumerate(counts):
            self.cache.lengths[first_slot + b] += count

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Draft a block per slot in one pass and prune its candidates to the budgets."""
        starts = np.array(self.cache.lengths[: len(newest)], np.int32)
        counts = (budgets > 0).astype(np.int32) * np.int32(self.block)
        rows = AttentionMetadata(self.cache, 0, self.block, starts, counts, MaskKind.FULL)
        numbers = np.repeat(newest[None, :, None], self.block, 2)
        if self.step is not None:
            trees, self.drafted = self.step.propose(newest, budgets, rows, self.tails)
            return trees
        if self._proposals is not None:
            nodes, self.drafted, contexts = self._proposals(rows, numbers)
        else:
            nodes, self.drafted, contexts = self._propose(rows.plan, upload(numbers, self.target.device), None)
        self._continuation.take(newest, budgets > 0, self.drafted, contexts)
        found = nodes.cpu().numpy()
        if self._fixed is not None:
            return tree.planted(newest, found, self._fixed, budgets)
        return tree.pruned(newest, found, width=self.width, budgets=budgets)

    def _propose(self, plan: AttentionTensors, numbers: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
        """Draft a block for every slot and choose nodes from it, as a pass that can be recorded. Nodes are as
        `tree.levels` returns them. numbers: (1, batch, block), the newest token of each slot, repeated."""
        newest = numbers[0, :, 0]
        hidden: Tensor = self.network.block_hidden(
            self.target.embed(newest)[:, None],
            self.tails[: len(newest), None],
            plan.positions[:, :1],
            lambda layer, q, k, v: attention.attend(plan, layer, q, k, v),
        )[:, 0]
        logits, head = self._head(hidden), self.network.sequential
        contexts = hidden[..., :0] if head is None else head.context(hidden)
        if self._fixed is not None:
            return tree.fill(self._fixed, logits, self.network.offered), logits, contexts
        along = None if head is None else head.along(contexts)
        nodes = tree.candidates(newest, logits, along, self._ends, width=self.width, offered=self.network.offered)
        return nodes, logits, contexts

    def best(self, slot: int, path: Seq[int], allowed: bytes, num: int) -> list[tuple[int, float]]:
        """Choose the likeliest allowed tokens behind a path of the last block (see guided_trees.Continuing). A native
        round does that itself."""
        return self._continuation.best(slot, path, allowed, num)
