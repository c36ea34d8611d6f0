"""The FLASH drafter at work: keeps the draft's context of every sequence and proposes a tree per step.

Context of a sequence, one row each, in the order of the prompt:  text | latents of a medium | text | answer tokens.
Its keys and values live in a KV cache of their own, slot for slot beside the target's. Only what the target has
computed *and kept* enters it, so it is rolled back together with the target's cache; the newest token is not in it yet
(its hidden state does not exist) and is handed to the block pass as an embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model import attention, tree
from model.draft.network import DraftNetwork
from model.kv_cache import KVCache
from model.targets.base import Target
from model.tree import Trees


class FlashDrafter:
    def __init__(
        self, target: Target, network: DraftNetwork, *, num_slots: int, capacity: int, margin: int, width: int
    ) -> None:
        config = network.config
        self.target, self.network, self.width = target, network, width
        self.block = config.block
        self.cache = KVCache(
            num_layers=config.num_layers,
            num_slots=num_slots,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            capacity=capacity,
            margin=max(margin, config.block),
            dtype=target.dtype,
            device=target.device,
        )
        self._visual: dict[int, list[Tensor]] = {}  # slot -> fused states of a medium whose prefill is under way
        self._whole_block = torch.ones(1, config.block, config.block, dtype=torch.bool, device=target.device)

    def start(self, slot: int) -> None:
        self.cache.take(slot)
        self._visual[slot] = []

    def free(self, slot: int) -> None:
        self.cache.free(slot)
        del self._visual[slot]

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self._visual[target] = self._visual.pop(source)

    def prefill(self, slot: int, taps: Tensor, start: int, spans: tuple[tuple[int, int], ...]) -> None:
        """Take in prompt positions start.. of one sequence. taps: (positions, taps * hidden); spans: the media's."""
        fused = self.network.fuse(taps)
        end = start + len(fused)
        rows: list[Tensor] = []
        at = start
        for first, last in spans:
            if last <= start or first >= end:
                continue
            if first > at:
                rows.append(fused[at - start : first - start])
            upto = min(last, end)
            seen = fused[max(first, at) - start : upto - start]
            if self.network.compressor is None:
                pass  # num_latents == 0: the draft reads text alone
            elif upto == last:
                rows.append(self.network.compressor(torch.cat([*self._visual[slot], seen])[None])[0])
                self._visual[slot] = []
            else:
                self._visual[slot].append(seen)
            at = upto
        if at < end:
            rows.append(fused[at - start :])
        if rows:
            context = torch.cat(rows)
            self._append(slot, context[None], [len(context)])

    def observe(self, taps: Tensor, paths: list[list[int]]) -> None:
        """Take in what a verify step kept. taps: (slots, rows, taps * hidden) of slots 0..; paths: rows, ascending."""
        longest = max(map(len, paths))
        index = np.zeros((len(paths), longest), np.int64)
        for b, path in enumerate(paths):
            index[b, : len(path)] = path
        rows = torch.from_numpy(index).to(taps.device)
        kept = taps.gather(1, rows[:, :, None].expand(-1, -1, taps.shape[-1]))
        self._append(0, self.network.fuse(kept), [len(path) for path in paths])

    def _append(self, first_slot: int, context: Tensor, counts: list[int]) -> None:
        """Write context (batch, rows, hidden) behind what slots first_slot.. hold; counts[b] rows of it are real."""
        batch, rows = context.shape[:2]
        held = self.cache.lengths[first_slot : first_slot + batch]
        positions = torch.tensor(held, device=context.device)[:, None] + torch.arange(rows, device=context.device)
        locations = self.cache.locations(first_slot, positions)
        for layer, (keys, values) in enumerate(self.network.context_keys_values(context, positions)):
            self.cache.write(layer, locations, keys, values)
        for b, count in enumerate(counts):
            self.cache.lengths[first_slot + b] += count

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """A tree for each of slots 0.., of at most budgets[b] nodes. newest: (slots,) the last token of each."""
        slots = len(newest)
        starts = torch.tensor(self.cache.lengths[:slots], device=self.target.device)
        rows = attention.plan(self.cache, 0, starts, self._whole_block, self.target.dtype)
        last = torch.from_numpy(newest).to(self.target.device)
        hidden = self.network.block_hidden(
            self.target.embed(last)[:, None],
            starts[:, None],
            lambda layer, q, k, v: attention.attend(rows, layer, q, k, v),
        )
        logits = self.target.logits(hidden[:, 0])
        return tree.best_first(last, logits, self.network.sequential, width=self.width, budgets=budgets)
