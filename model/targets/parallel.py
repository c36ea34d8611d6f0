"""Spreads a target's decoder layers over several devices of one machine, by transformers' own tensor-parallel plan.

The process that has the engine leads. For every further device it starts a follower (follower.py), which has its share
of the layers and of the KV cache's heads and executes orders one after the other: a pass, or a change within the cache.
Everything else runs in the leader only: prompts and media, embeddings and lm_head, draft, trees, sampling, schedule. So
none of it is computed twice, or has to agree between devices.

    leader                                        follower
    engine -> LanguageModel.forward -- "pass" --> the same layers, its heads
                embeds --------- broadcast -----> embeds
                every layer's sums <-- reduced --> every layer's sums
    engine -> KVCache.keep, share --- "rearrange", "swap" --> its heads' rows

Orders go through a pipe. When the leader ends, the pipe closes and the follower ends too. When a follower dies, the
leader's process exits, since it would wait forever for that follower's sums.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from model.backends.attention import AttentionMetadata
from model.backends.kv_cache import KVCache, Move
from model.config import EngineConfig
from model.errors import ConfigError

log = logging.getLogger("flashserve.parallel")

COMMAND = [sys.executable, "-m", "model.targets.follower"]
WATCHED_EVERY = 0.2  # seconds
Order = tuple[str, tuple[Any, ...]]


def loading(config: EngineConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for the tensor-parallel plan. Only layers are spread; embeddings and
    lm_head stay whole, since drafts use them too."""
    if config.tensor_parallel == 1:
        return {}
    from transformers.distributed import DistributedConfig

    whole = {"lm_head": "replicate", "model.language_model.embed_tokens": "replicate"}
    return {"distributed_config": DistributedConfig(tp_size=config.tensor_parallel, tp_plan=whole)}


def share_of(config: EngineConfig, heads: int) -> int:
    """Return how many key-value heads of a layer one device has. Raises ConfigError if they do not divide evenly."""
    if heads % config.tensor_parallel:
        raise ConfigError(
            f"tensor_parallel {config.tensor_parallel} does not divide the model's {heads} key-value heads"
        )
    return heads // config.tensor_parallel


def local(parameter: Tensor) -> Tensor:
    """Return this device's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Group:
    """The leader's side of the group. One group per process, since torch has one default process group."""

    def __init__(self, config: EngineConfig, aux_layers: tuple[int, ...] | None) -> None:
        """Start the followers, which load the target while the leader does. config: a resolved one.

        Raises ConfigError if there are too few devices, or if the process already has a group.
        """
        if distributed.is_initialized():
            raise ConfigError("this process already is part of a group: one engine with tensor_parallel a process")
        first = torch.device(config.device).index or 0
        if config.device.startswith("cuda") and first + config.tensor_parallel > torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel {config.tensor_parallel} from {config.device} on needs "
                f"{first + config.tensor_parallel} GPUs; there are {torch.cuda.device_count()}"
            )
        address = f"tcp://127.0.0.1:{_free_port()}"
        self._followers = [
            subprocess.Popen(COMMAND, stdin=subprocess.PIPE)  # noqa: S603
            for _ in range(1, config.tensor_parallel)
        ]
        for rank, follower in enumerate(self._followers, 1):
            device = f"cuda:{first + rank}" if config.device.startswith("cuda") else config.device
            _write(follower, ("begin", (asdict(config) | {"device": device}, aux_layers, rank, address)))
        threading.Thread(target=self._watch, name="followers", daemon=True).start()
        join(config, 0, address)

    def tell(self, name: str, *arguments: Any) -> None:
        """Send an order to every follower."""
        for follower in self._followers:
            _write(follower, (name, arguments))

    def cache(self, **shape: Any) -> KVCache:
        """Allocate a KV cache for the leader's heads, and order the followers to allocate theirs."""
        self.tell("make", {name: value for name, value in shape.items() if name not in ("dtype", "device")})
        return _LeadingCache(self, shape)

    def announce(self, embeds: Tensor, positions: np.ndarray, rows: AttentionMetadata) -> None:
        """Order a pass over these rows, and broadcast the input embeddings."""
        metadata = (rows.first_slot, rows.num, rows.starts, rows.counts, int(rows.mask_kind), rows.parents)
        self.tell("pass", tuple(embeds.shape), positions, metadata)
        distributed.broadcast(embeds.contiguous(), src=0)

    def _watch(self) -> None:
        """Exit the process as soon as a follower dies."""
        while all(follower.poll() is None for follower in self._followers):
            time.sleep(WATCHED_EVERY)
        log.critical("a tensor-parallel follower died: exit codes %s", [f.poll() for f in self._followers])
        os._exit(1)


class _LeadingCache(KVCache):
    """A KV cache that repeats every change within it on all devices."""

    def __init__(self, group: Group, shape: dict[str, Any]) -> None:
        super().__init__(**shape)
        self._group = group

    def is_finite(self, slot: int, length: int) -> bool:  # noqa: ARG002
        """Return False, so that nothing is left in a slot to be shared: the leader does not know the followers'
        heads."""
        return False

    def swap(self, one: int, other: int, from_one: int, from_other: int) -> None:
        self._group.tell("swap", one, other, from_one, from_other)
        super().swap(one, other, from_one, from_other)

    def clear(self, slot: int, first: int, end: int) -> None:
        self._group.tell("clear", slot, first, end)
        super().clear(slot, first, end)

    def rearrange(self, moves: Sequence[Move]) -> None:
        self._group.tell("rearrange", moves)
        super().rearrange(moves)


def join(config: EngineConfig, rank: int, address: str) -> None:
    """Join the process group. Returns when all processes have joined."""
    on_gpus = config.device.startswith("cuda")
    # transformers reads the device of a process from here.
    os.environ["LOCAL_RANK"] = str(torch.device(config.device).index or 0) if on_gpus else str(rank)
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=address, rank=rank, world_size=config.tensor_parallel
    )


def _free_port() -> int:
    """Find a free TCP port on the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _write(follower: subprocess.Popen[bytes], order: Order) -> None:
    """Send one order to a follower."""
    assert follower.stdin is not None
    pickle.dump(order, follower.stdin)
    follower.stdin.flush()


def read(orders: BinaryIO) -> Order | None:
    """Read the next order; None if the pipe is closed."""
    try:
        order: Order = pickle.load(orders)  # noqa: S301 - from the process that started this one
    except EOFError:
        return None
    return order
