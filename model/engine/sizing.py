"""Plans memory: what a target and its draft take, and how many sequences of what length fit beside them.

An engine may take `memory_utilization` of the memory that is free when it starts: for weights, KV cache and encoder
cache of the target, and for weights and KV cache of its draft. Each slot has `max_model_len` tokens. Before weights are
loaded the plan follows from the target's skeleton (checkpoint.py), afterwards from the target itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.backends import free_memory
from model.backends.kv_cache import ALIGNED, KVCache, Layers, uniform
from model.backends.native import library
from model.config import TRAINED, EngineConfig
from model.drafters import registry as drafters
from model.drafters.base import Room
from model.errors import ConfigError
from model.targets import packed, probe
from model.targets.base import Target
from model.targets.language import language_model
from model.targets.parallel import share_of
from model.targets.registry import Opened
from model.targets.states import States
from model.targets.stored import stored_weights

log = logging.getLogger("flashserve.engine")

MIB = 1 << 20
SHORTEST = 16  # smallest max_model_len
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)  # for which a plan says how many sequences fit


def read_free_memory(config: EngineConfig) -> int | None:
    """Return the free bytes on the device of a resolved config; None if unknown."""
    device = torch.device(config.device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory.of_machine() if config.free_host_memory is None else config.free_host_memory


@dataclass(frozen=True)
class Needs:
    """What a target needs of memory, on one device.

    weights: bytes; layers: what each decoder layer stores; states: bytes a sequence that layers with a recurrent state
    take; largest_block: most tokens that see each other in both directions; activations: bytes of the largest pass of
    the decoder, about.
    """

    weights: int
    layers: Layers
    states: int
    largest_block: int
    max_positions: int
    activations: int

    @classmethod
    def of_target(cls, config: EngineConfig, target: Target) -> Needs:
        """Read them off a loaded target."""
        states = target.states
        text = target.model.config.get_text_config() if hasattr(target, "model") else None
        return cls(
            target.num_bytes,
            target.layers,
            states.bytes_per_slot(saving=config.prefix_cache) if states else 0,
            target.largest_block,
            target.max_positions,
            _activations(config, text),
        )

    @classmethod
    def of_checkpoint(cls, config: EngineConfig, opened: Opened) -> Needs:
        """Find them out before the target is loaded. Raises ConfigError if its attention cannot be served."""
        text, skeleton = opened.checkpoint.get_text_config(), opened.skeleton
        layers, states = _shapes(config, opened)
        beside = 0
        dtype = getattr(torch, config.dtype)
        if library.supports(dtype, torch.device(config.device)):
            beside = text.vocab_size * text.hidden_size * dtype.itemsize  # lm_head is packed beside the original
            if skeleton is not None and type(language_model(skeleton)).__name__ in packed.KINDS:
                width = max(shape.width for shape in layers if shape is not None)
                beside += text.max_position_embeddings * width * dtype.itemsize  # rotations of all positions
        weights = opened.stored_bytes or 0
        if skeleton is not None and not opened.keeps_stored_form:
            weights = sum(parameter.nbytes for parameter in skeleton.parameters())
        block = getattr(opened.checkpoint, "mm_tokens_per_image", None) or 0
        return cls(weights + beside, layers, states, block, text.max_position_embeddings, _activations(config, text))


def _shapes(config: EngineConfig, opened: Opened) -> tuple[Layers, int]:
    """Return what each decoder layer stores, and the bytes of states a sequence."""
    text, skeleton = opened.checkpoint.get_text_config(), opened.skeleton
    if skeleton is not None and config.tensor_parallel == 1:
        try:
            language = language_model(skeleton)
            states = States.of(language)
            shapes = probe.layer_shapes(skeleton, language, text.num_hidden_layers)
            return shapes, states.bytes_per_slot(saving=config.prefix_cache) if states else 0
        except ConfigError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise ConfigError(f"model {config.model!r} cannot be served: {error}") from error
            # Without weights some forwards cannot run: of experts that ask which tokens they have, of some ropes.
            log.debug("the layers of %s cannot be probed before weights are loaded: %s", config.model, error)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return uniform(text.num_hidden_layers, share_of(config, heads), width), 0


def _activations(config: EngineConfig, text: Any) -> int:
    """Estimate the bytes of the tensors of the largest pass of a decoder with this text config."""
    if text is None:
        return 0
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    itemsize = getattr(torch, config.dtype).itemsize
    rows = config.prefill_chunk * (6 * text.hidden_size + 3 * inner) * itemsize
    logits = min(config.max_verify_tokens, config.max_num_seqs * (config.nodes + 1)) * text.vocab_size
    return int(rows + logits * (itemsize + 4))


@dataclass(frozen=True)
class Sizing:
    """The memory that an engine may take. budget: bytes, None if unknown, and then nothing is checked."""

    config: EngineConfig
    free: int | None
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
        return cls(config, free, budget, draft)

    def plan(self, needs: Needs) -> MemoryPlan:
        """Plan for a target with these needs."""
        return MemoryPlan(self, needs, self.config.context(needs.max_positions))

    def check_before_loading(self, opened: Opened) -> MemoryPlan:
        """Plan by a target's files, and raise ConfigError if not even one sequence will fit. Reads no weights."""
        if opened.stored_bytes is not None and self.config.kv_cache_bytes is None:
            self._check_weights(opened.stored_bytes)
        plan = self.plan(Needs.of_checkpoint(self.config, opened))
        if self.config.kv_cache_bytes is None:
            plan.check()
        return plan

    def _check_weights(self, weights: int) -> None:
        """Raise ConfigError if the weights alone do not fit."""
        if self.budget is not None and weights > self.budget:
            raise ConfigError(
                f"the weights do not fit into memory: {self.budget // MIB} MiB may be used (memory_utilization "
                f"{self.config.memory_utilization:g} of what is free), and they take {weights // MIB} MiB in "
                f"{self.config.dtype}; free some memory, or give another --device, --dtype or a smaller or quantised "
                "--model"
            )

    def num_slots(self, target: Target) -> int:
        """Return the number of slots: `max_num_seqs`, or as many as fit into memory or into `kv_cache_bytes`. Raises
        ConfigError if none fits."""
        plan, wanted = self.plan(Needs.of_target(self.config, target)), self.config.max_num_seqs
        plan.check()
        fitting = plan.num_sequences
        if fitting < wanted and self.config.kv_cache_bytes is None:
            log.warning(
                "%d sequences of %d tokens fit into memory, not --max-num-seqs %d; a smaller --max-model-len or a "
                "larger --memory-utilization (now %g) makes room for more",
                fitting,
                plan.max_model_len,
                wanted,
                self.config.memory_utilization,
            )
        log.info("memory in MiB:\n%s", plan.table())
        return fitting


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is shared out."""

    sizing: Sizing
    needs: Needs
    max_model_len: int

    @property
    def config(self) -> EngineConfig:
        return self.sizing.config

    @property
    def fixed(self) -> int:
        """Return the bytes that are taken whatever is decoded."""
        return self.needs.weights + self.sizing.draft_weights + self.config.encoder_cache_bytes

    def kv_bytes(self, length: int) -> int:
        """Return the bytes of one sequence of this length in the target's KV cache, with its states."""
        needs = self.needs
        return needs.states + KVCache.bytes_per_slot(
            layers=needs.layers,
            capacity=length,
            margin=self.config.nodes + 1,
            rows=self.config.prefill_chunk + needs.largest_block,
            dtype=getattr(torch, self.config.dtype),
        )

    def draft_bytes(self, length: int) -> int:
        """Return the bytes of one sequence of this length in the draft's KV cache."""
        room = Room(1, length, self.config.nodes + 1, self.config.tree_width)
        shape = drafters.cache_shape(self.config, room)
        return 0 if shape is None else KVCache.bytes_per_slot(**shape, dtype=getattr(torch, self.config.dtype))

    def fitting(self, length: int) -> int | None:
        """Return how many sequences of this length fit; None if nobody knows what is free."""
        if self.config.kv_cache_bytes is not None:
            return self.config.kv_cache_bytes // self.kv_bytes(length)
        if self.sizing.budget is None:
            return None
        left = self.sizing.budget - self.fixed
        return max(0, left // (self.kv_bytes(length) + self.draft_bytes(length)))

    @property
    def num_sequences(self) -> int:
        """Return how many sequences are decoded together at most."""
        fitting = self.fitting(self.max_model_len)
        return self.config.max_num_seqs if fitting is None else min(self.config.max_num_seqs, fitting)

    def check(self) -> None:
        """Raise ConfigError, with a remedy, if not even one sequence fits."""
        if self.num_sequences >= 1:
            return
        length, config = self.max_model_len, self.config
        if config.kv_cache_bytes is not None:
            raise ConfigError(
                f"kv_cache_bytes {config.kv_cache_bytes} holds no sequence; one of {length} tokens takes "
                f"{self.kv_bytes(length)}"
            )
        budget = self.sizing.budget
        assert budget is not None
        longest = length // ALIGNED * ALIGNED
        while longest >= SHORTEST and not self.fitting(longest):
            longest -= ALIGNED
        cure = (
            "free some memory, give a larger --memory-utilization, a smaller --encoder-cache-bytes or another --dtype"
        )
        if longest >= SHORTEST:
            cure = f"give --max-model-len {longest} or less, or a larger --memory-utilization"
        raise ConfigError(
            f"not even one sequence of {length} tokens fits into memory: {budget // MIB} MiB may be used "
            f"(memory_utilization {config.memory_utilization:g} of what is free), the weights take "
            f"{(self.needs.weights + self.sizing.draft_weights) // MIB} MiB, the encoder cache "
            f"{config.encoder_cache_bytes // MIB} and a sequence "
            f"{(self.kv_bytes(length) + self.draft_bytes(length)) // MIB}; {cure}"
        )

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of sequences for which a plan says how many fit."""
        limit = self.needs.max_positions
        return sorted({self.max_model_len, *(length for length in LENGTHS if length <= limit)})

    def table(self, *, lengths: bool = False) -> str:
        """Write the plan as text, in MiB. lengths: also say how many sequences of several lengths fit."""
        length, number = self.max_model_len, self.num_sequences
        kv, draft = self.kv_bytes(length), self.draft_bytes(length)
        rows = [
            ("weights", self.needs.weights, ""),
            ("draft", self.sizing.draft_weights, ""),
            ("encoder cache", self.config.encoder_cache_bytes, "at most"),
            ("KV cache", number * (kv + draft), f"{number} sequences of {length} tokens"),
        ]
        total = self.fixed + number * (kv + draft)
        rows.append(("total", total, _share(self.sizing)))
        rows.append(("activations", self.needs.activations, "of the largest pass, about; from the rest"))
        lines = [f"{name:<14} {_mib(size):>10}  {note}".rstrip() for name, size, note in rows if size]
        if lengths:
            lines += ["", f"{'tokens':>8} {'MiB each':>10} {'sequences':>10}"]
            for each in self.lengths:
                fitting = self.fitting(each)
                size = self.kv_bytes(each) + self.draft_bytes(each)
                lines.append(f"{each:>8} {_mib(size):>10} {'?' if fitting is None else fitting:>10}")
        return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}" if num_bytes < 100 * MIB else f"{num_bytes / MIB:.0f}"


def _share(sizing: Sizing) -> str:
    """Say how much memory may be used."""
    if sizing.budget is None or sizing.free is None:
        return "it is not known how much is free"
    return f"of {_mib(sizing.budget)} ({sizing.config.memory_utilization:g} of {_mib(sizing.free)} free)"
