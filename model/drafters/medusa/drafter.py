"""Drafts with Medusa: keeps the target's last hidden state at each sequence's last kept position."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.backends.linear import pack, weight_bytes
from model.decoding import tree
from model.decoding.tree import Trees
from model.drafters.base import Room
from model.drafters.medusa.network import MedusaConfig, MedusaNetwork
from model.drafters.slots import exchange_items, exchange_rows
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt
from model.transfer import upload


class MedusaDrafter:
    """Implements `model.drafters.base.Drafter`. It runs in torch, even beside a native target, and exists for
    comparison."""

    native = False

    def __init__(self, name: str, target: Target, network: MedusaNetwork, room: Room, cache: None = None) -> None:  # noqa: ARG002
        self.name = name
        self.target, self.network, self.width = target, network, room.width
        self._ends = torch.tensor(sorted(target.eos_ids), device=target.device)
        self._head = target.head.of(network.offered)
        pack(network)
        self._last = torch.zeros(room.num_slots, target.hidden_size, dtype=target.dtype, device=target.device)
        self._computed: dict[int, int] = {}  # slot -> tokens that the target has computed

    @staticmethod
    def new_cache(target: Target, network: MedusaNetwork, room: Room) -> None:  # noqa: ARG004
        """Return None: Medusa has no keys and values."""

    @staticmethod
    def cache_shape(config: MedusaConfig, room: Room) -> None:  # noqa: ARG004
        """Return None: Medusa has no keys and values."""

    @property
    def num_bytes(self) -> int:
        return weight_bytes(self.network) + (self._head.num_bytes if self.network.offered is not None else 0)

    @property
    def cache_bytes(self) -> int:
        return self._last.nbytes

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:  # noqa: ARG002
        self._computed[slot] = 0

    def share(self, source: int, slot: int, length: int) -> bool:  # noqa: ARG002
        """Accept the shared positions without copying anything."""
        self._computed[slot] = length  # no state to copy: at least one position is prefilled before it proposes
        return True

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:  # noqa: ARG002
        self._computed[slot] = start + len(aux_hidden_states)
        self._last[slot] = aux_hidden_states[-1]

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Draft all depths from one hidden state per sequence."""
        logits, offered = self._head(self.network(self._last[: len(newest)])), self.network.offered
        return tree.best_first(newest, logits, None, self._ends, width=self.width, budgets=budgets, offered=offered)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:  # noqa: ARG002
        """Keep the hidden state of the last kept node."""
        slots = [slot for slot, path in enumerate(paths) if path]
        for slot in slots:
            self._computed[slot] += len(paths[slot])
        rows = [slot * aux_hidden_states.shape[1] + paths[slot][-1] for slot in slots]
        where = upload(np.array((slots, rows)), aux_hidden_states.device)
        self._last.index_copy_(0, where[0], aux_hidden_states.flatten(0, 1).index_select(0, where[1]))

    def free(self, slot: int) -> None:
        del self._computed[slot]

    def exchange(self, one: int, other: int) -> None:
        exchange_items(self._computed, one, other)
        exchange_rows(self._last, one, other)

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        assert self._computed == by_slot, "the draft stands elsewhere than the target"
