"""Runs the process of a further device of a tensor-parallel target (`python -m model.targets.follower`): see
parallel.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import distributed

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import KVCache, Move
from model.config import EngineConfig
from model.targets.parallel import join, read
from model.targets.registry import target_class
from model.transfer import upload

log = logging.getLogger("flashserve.parallel")


class Follower:
    """Executes the leader's orders on one further device: its share of the target and of the KV cache."""

    def __init__(self, arguments: dict[str, Any], aux_layers: tuple[int, ...] | None, rank: int, address: str) -> None:
        """Join the group and load this device's share. arguments: an EngineConfig's fields; rank: from 1."""
        config = EngineConfig(**arguments)
        join(config, rank, address)
        self._target = target_class(config)(config, aux_layers=aux_layers)
        self._cache: KVCache | None = None

    @torch.inference_mode()
    def obey(self, orders: BinaryIO) -> None:
        """Execute orders until the leader closes the pipe."""
        while (order := read(orders)) is not None:
            name, arguments = order
            getattr(self, f"_{name}")(*arguments)

    def _cache_of(self) -> KVCache:
        """Return the KV cache. Raises RuntimeError if the leader has not ordered one."""
        if self._cache is None:
            raise RuntimeError("the leader has not said how large its cache is")
        return self._cache

    def _make(self, shape: dict[str, Any]) -> None:
        """Execute the order `make`: allocate the KV cache."""
        self._cache = KVCache(**shape, dtype=self._target.dtype, device=self._target.device)

    def _pass(self, shape: tuple[int, ...], positions: np.ndarray, metadata: tuple[Any, ...]) -> None:
        """Execute the order `pass`: receive the input embeddings and run this device's share of the layers."""
        first_slot, num, starts, counts, mask_kind, parents = metadata
        embeds = torch.empty(shape, dtype=self._target.dtype, device=self._target.device)
        distributed.broadcast(embeds, src=0)
        rows = AttentionMetadata(self._cache_of(), first_slot, num, starts, counts, MaskKind(mask_kind), parents)
        self._target.run_layers(embeds, upload(positions, self._target.device), rows.plan)

    def _swap(self, one: int, other: int, from_one: int, from_other: int) -> None:
        self._cache_of().swap(one, other, from_one, from_other)

    def _clear(self, slot: int, first: int, end: int) -> None:
        self._cache_of().clear(slot, first, end)

    def _rearrange(self, moves: Sequence[Move]) -> None:
        self._cache_of().rearrange(moves)


def main() -> None:
    """Read the arguments from standard input and obey. Exits with 1 on an error, which ends the leader too."""
    orders = os.fdopen(os.dup(0), "rb")
    begin = read(orders)
    if begin is None:
        return
    _, arguments = begin
    try:
        Follower(*arguments).obey(orders)
    except Exception:
        log.exception("a tensor-parallel follower cannot go on")
        os._exit(1)
    os._exit(0)  # torch's own exit would wait for the other processes


if __name__ == "__main__":
    main()
