"""Decides how many KV cache slots fit into the free memory, before weights are loaded and again afterwards.

An engine may take `memory_utilization` of the memory that is free when it starts: for weights, KV cache and encoder
cache of the target, and for weights and KV cache of its draft. Each slot has `max_model_len` tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from model.backends import free_memory
from model.backends.kv_cache import ALIGNED, KVCache, Layers, uniform
from model.config import TRAINED, EngineConfig
from model.drafters import registry as drafters
from model.drafters.base import Room
from model.errors import ConfigError
from model.targets import registry as targets
from model.targets.base import Target
from model.targets.parallel import share_of
from model.targets.stored import stored_weights

log = logging.getLogger("flashserve.engine")

MIB = 1 << 20
SHORTEST = 16  # smallest max_model_len


def read_free_memory(config: EngineConfig) -> int | None:
    """Return the free bytes on the device of a resolved config; None if unknown."""
    device = torch.device(config.device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory.of_machine() if config.free_host_memory is None else config.free_host_memory


@dataclass(frozen=True)
class Sizing:
    """The memory that an engine may take, and its needs as known before the target is loaded.

    budget: bytes, None if unknown, and then nothing is checked; draft_weights: bytes.
    """

    config: EngineConfig
    budget: int | None
    draft_weights: int

    @classmethod
    def read(cls, config: EngineConfig, target: Target | None) -> Sizing:
        """Measure the free memory for a resolved config. The memory of an already loaded target counts as free."""
        free = read_free_memory(config)
        draft = 0
        if config.drafter in TRAINED and config.draft is not None:
            stored = stored_weights(str(Path(config.draft)), getattr(torch, config.dtype), None)
            draft = stored.num_bytes if stored else 0
        budget = None
        if free is not None:
            # On a CPU the devices of one target are one machine.
            share = config.memory_utilization / (1 if config.device.startswith("cuda") else config.tensor_parallel)
            budget = int(share * (free + (target.num_bytes if target else 0)))
        return cls(config, budget, draft)

    def check_before_loading(self) -> None:
        """Raise ConfigError if not even one sequence will fit, by the target's files. Reads no weights."""
        if self.budget is None or self.config.kv_cache_bytes is not None:
            return
        checkpoint, weights = targets.read_checkpoint(self.config)
        if checkpoint.model_type not in targets.FAMILIES:
            return
        text = checkpoint.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = uniform(text.num_hidden_layers, share_of(self.config, text.num_key_value_heads), head_dim)
        slots = _Slots(self.config, layers, getattr(torch, self.config.dtype))
        self._fitting(slots, self.config.context(text.max_position_embeddings), weights.num_bytes if weights else 0)

    def num_slots(self, target: Target, max_model_len: int) -> int:
        """Return the number of slots: `max_num_seqs`, or as many as fit into memory or into `kv_cache_bytes`. Raises
        ConfigError if none fits."""
        config = self.config
        states = target.states.bytes_per_slot(saving=config.prefix_cache) if target.states else 0
        slots = _Slots(config, target.layers, target.dtype, target.largest_block, states)
        if config.kv_cache_bytes is not None:
            each = slots.target_bytes(max_model_len)
            if config.kv_cache_bytes < each:
                raise ConfigError(
                    f"kv_cache_bytes {config.kv_cache_bytes} holds no sequence; "
                    f"one of {max_model_len} tokens takes {each}"
                )
            return min(config.max_num_seqs, config.kv_cache_bytes // each)
        if self.budget is None:
            return config.max_num_seqs
        fitting = self._fitting(slots, max_model_len, target.num_bytes)
        if fitting < config.max_num_seqs:
            log.warning(
                "%d sequences of %d tokens fit into memory, not --max-num-seqs %d: of %d MiB the weights take %d, each "
                "sequence %d; a smaller --max-model-len or a larger --memory-utilization (now %g) makes room for more",
                fitting,
                max_model_len,
                config.max_num_seqs,
                self.budget // MIB,
                (target.num_bytes + self.draft_weights) // MIB,
                slots.num_bytes(max_model_len) // MIB,
                config.memory_utilization,
            )
        return min(config.max_num_seqs, fitting)

    def _fitting(self, slots: _Slots, max_model_len: int, weights: int) -> int:
        """Return how many slots fit beside the weights. Raises ConfigError with a remedy if none does."""
        assert self.budget is not None
        left = self.budget - weights - self.draft_weights - self.config.encoder_cache_bytes
        if (fitting := left // slots.num_bytes(max_model_len)) >= 1:
            return fitting
        longest = max_model_len // ALIGNED * ALIGNED
        while longest >= SHORTEST and slots.num_bytes(longest) > left:
            longest -= ALIGNED
        cure = (
            "free some memory, give a larger --memory-utilization, a smaller --encoder-cache-bytes or another --dtype"
        )
        if longest >= SHORTEST:
            cure = f"give --max-model-len {longest} or less, or a larger --memory-utilization"
        raise ConfigError(
            f"not even one sequence of {max_model_len} tokens fits into memory: {self.budget // MIB} MiB may be used "
            f"(memory_utilization {self.config.memory_utilization:g} of what is free), the weights take "
            f"{(weights + self.draft_weights) // MIB} MiB, the encoder cache "
            f"{self.config.encoder_cache_bytes // MIB} and a sequence {slots.num_bytes(max_model_len) // MIB}; {cure}"
        )


@dataclass(frozen=True)
class _Slots:
    """Computes the bytes of one slot in the KV caches of the target and its draft."""

    config: EngineConfig
    layers: Layers
    dtype: torch.dtype
    largest_block: int = 0
    states: int = 0  # bytes of the states of a slot

    def target_bytes(self, max_model_len: int) -> int:
        """Return the bytes of a slot in the target's KV cache."""
        return self.states + KVCache.bytes_per_slot(
            layers=self.layers,
            capacity=max_model_len,
            margin=self.config.nodes + 1,
            rows=self.config.prefill_chunk + self.largest_block,
            dtype=self.dtype,
        )

    def num_bytes(self, max_model_len: int) -> int:
        """Return the bytes of a slot in both KV caches."""
        room = Room(1, max_model_len, self.config.nodes + 1, self.config.tree_width)
        shape = drafters.cache_shape(self.config, room)
        draft = 0 if shape is None else KVCache.bytes_per_slot(**shape, dtype=self.dtype)
        return self.target_bytes(max_model_len) + draft
