"""Tiny language models with layers that carry a state, driven as a target drives them, and the family's own forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model.backends import attention
from model.backends.attention import AttentionMetadata, MaskKind, prompt_rows
from model.backends.kv_cache import KVCache, LayerShape
from model.backends.slot_states import SlotStates
from model.targets.states import States

HIDDEN = 64
COMMON = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, LINEAR = "full_attention", "linear_attention"
DELTA = {
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "lfm2": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", FULL, "conv"],
        "block_ff_dim": 96,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm3": {
        "num_hidden_layers": 5,
        "layer_types": ["conv", FULL, "conv", "sliding_attention", "conv"],
        "sliding_window": 20,  # longer than a tree is deep
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny(kind: str) -> Any:
    """Build a language model with random weights that matter, states included."""
    torch.manual_seed(0)
    options = COMMON | CONFIGS[kind]
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**options), attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3 if "conv" in name else 0.12)
            elif name.endswith("A_log"):
                weight.uniform_(-4.0, 1.0)  # heads that forget slowly, and heads that forget at once
            elif name.endswith("dt_bias"):
                weight.uniform_(-2.0, 1.0)
    return model.requires_grad_(False)


def shapes(model: Any) -> list[LayerShape | None]:
    """Return what each layer keeps in the KV cache: nothing in those without attention."""
    layers: list[LayerShape | None] = [None] * model.config.num_hidden_layers
    for module in model.modules():
        if hasattr(module, "q_proj"):
            layers[module.layer_idx] = LayerShape(2, 16, getattr(module, "sliding_window", None))
    return layers


class Hybrid:
    """Slots of a tiny model, and what each was kept of its sequence."""

    def __init__(self, kind: str, num_slots: int = 4) -> None:
        attention.register()
        self.model = tiny(kind)
        self.reference = copy.deepcopy(self.model)
        layers = States.of(self.model)
        assert layers is not None
        states = layers.allocate(num_slots, saving=True)
        self.model.set_attn_implementation(attention.NAME)
        self.cache = KVCache(
            layers=shapes(self.model),
            num_slots=num_slots,
            capacity=256,
            margin=32,
            rows=160,  # of a prompt chunk
            dtype=torch.float32,
            device=torch.device("cpu"),
            states=states,
        )
        self.kept = [torch.zeros(0, HIDDEN) for _ in range(num_slots)]

    def start(self, slot: int, source: int = -1, length: int = 0, save_at: Sequence[int] = ()) -> None:
        """Begin a sequence in a free slot, with the first `length` positions of slot `source`."""
        self.cache.take(slot, save_at)
        if length:
            self.cache.share(source, slot, length)
        self.kept[slot] = self.kept[source][:length] if length else torch.zeros(0, HIDDEN)

    @property
    def states(self) -> SlotStates:
        """Return the states of all slots."""
        assert isinstance(self.cache.states, SlotStates)
        return self.cache.states

    def run(self, embeds: Tensor, depths: np.ndarray, rows: AttentionMetadata) -> Tensor:
        """Run a pass over embeds (batch, rows, hidden); nothing is kept of it yet."""
        places = torch.from_numpy(rows.starts[:, None] + depths).long()
        with torch.inference_mode(), self.states.begin(rows):
            out: Tensor = self.model(
                inputs_embeds=embeds, position_ids=places, use_cache=False, plan=rows.plan
            ).last_hidden_state
        return out

    def read(self, slot: int, embeds: Tensor) -> Tensor:
        """Compute a prompt chunk (rows, hidden) and keep it."""
        count = len(embeds)
        rows = prompt_rows(self.cache, slot, self.cache.lengths[slot], count)
        out = self.run(embeds[None], np.arange(count)[None], rows)[0]
        self.keep([slot], [list(range(count))], embeds[None])
        return out

    def verify(self, embeds: Tensor, parents: list[list[int]]) -> Tensor:
        """Compute a tree for each of slots 0.., without keeping a row. parents[b]: of slot b's rows, which come before
        them; [] for a slot that idles. embeds: (batch, rows, hidden), padding included."""
        batch, num = embeds.shape[:2]
        padded = np.array([[*tree, *[-1] * (num - len(tree))] for tree in parents], np.int32)
        depths = np.zeros((batch, num), np.int64)
        for row in range(num):
            depths[:, row] = np.where(padded[:, row] < 0, 0, depths[np.arange(batch), padded[:, row]] + 1)
        starts = np.array(self.cache.lengths[:batch], np.int32)
        counts = np.array([len(tree) for tree in parents], np.int32)
        return self.run(embeds, depths, AttentionMetadata(self.cache, 0, num, starts, counts, MaskKind.TREE, padded))

    def keep(self, slots: Sequence[int], paths: list[list[int]], embeds: Tensor) -> None:
        """Keep rows of the latest pass, over embeds (slots, rows, hidden)."""
        with torch.inference_mode():
            self.cache.keep(slots, paths)
        for slot, path, given in zip(slots, paths, embeds, strict=True):
            self.kept[slot] = torch.cat((self.kept[slot], given[path]))

    def exchange(self, one: int, other: int) -> None:
        """Exchange two slots."""
        self.cache.exchange(one, other)
        self.kept[one], self.kept[other] = self.kept[other], self.kept[one]

    def expected(self, embeds: Tensor) -> Tensor:
        """Compute a whole sequence (rows, hidden) by the family's own forward, without a cache."""
        with torch.inference_mode():
            out: Tensor = self.reference(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
        return out

    def check(self, out: Tensor, slot: int, embeds: Tensor, paths: Sequence[list[int]]) -> None:
        """Assert that rows out (rows, hidden) of a slot are what the family computes for each path behind what was
        kept before."""
        for path in paths:
            expected = self.expected(torch.cat((self.kept[slot], embeds[path])))[-len(path) :]
            close(out[path], expected)

    def check_next(self, slots: Sequence[int]) -> None:
        """Assert that a row behind each of these slots is what the family computes; the row is not kept."""
        batch = max(slots) + 1
        embeds = some(batch, 1, seed=99)
        out = self.verify(embeds, [[-1] if slot in slots else [] for slot in range(batch)])
        for slot in slots:
            self.check(out[slot], slot, embeds[slot], [[0]])


def some(*shape: int, seed: int) -> Tensor:
    """Return random embeddings (*shape, hidden)."""
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 0.5


def close(out: Tensor, expected: Tensor) -> None:
    """Assert that two results differ by rounding only."""
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
