"""Test that the native stack computes what transformers' own language models compute, family by family.

A tiny model with random weights runs a prompt in chunks, beside others and then a tree, and each row is compared with
transformers' forward over all that the row sees. It is one file, since all families share its comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GraniteConfig,
    GraniteModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRTextConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import Blocks, KVCache, LayerShape, uniform
from model.backends.native import library
from model.backends.native.library import PackedLinear
from model.backends.native.stack import Stack, scratch
from model.backends.native.step import Verifier
from model.decoding import tree
from model.decoding.tree import IDLE
from model.engine.native_round import NativeRound
from model.engine.speculation import SpeculationController
from model.engine.stats import Counters
from model.targets import packed
from tests.model.test_native import dtype, normal, some_tree  # noqa: F401

HIDDEN, CONTEXT = 64, 96
SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 40,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Family:
    """A language model of transformers, with what is special in its config."""

    model: type[PreTrainedModel]
    config: type[Any]
    special: dict[str, Any] = field(default_factory=dict)
    num_axes: int = 1

    def build(self) -> Any:
        """Create a model with weights of about unit gain."""
        config = self.config(**{**SMALL, **self.special})
        torch.manual_seed(3)
        model = self.model(config).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(normal(*weight.shape, seed=len(name), scale=1.5 * weight.shape[1] ** -0.5))
            else:
                weight.add_(normal(*weight.shape, seed=len(name), scale=0.2))
        return model


SECTIONS = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [6, 5, 5]}
GEMMA = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 40,
    "query_pre_attn_scalar": 50,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    },
    "use_bidirectional_attention": False,
}
FAMILIES = {
    "gemma3": Family(Gemma3TextModel, Gemma3TextConfig, GEMMA),
    "gemma3-narrow": Family(Gemma3TextModel, Gemma3TextConfig, {**GEMMA, "sliding_window": 5}),
    "glm4v": Family(
        Glm4vTextModel,
        Glm4vTextConfig,
        {
            "num_attention_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
        },
        num_axes=3,
    ),
    "llama": Family(LlamaModel, LlamaConfig, {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "mistral": Family(MistralModel, MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "paddleocr": Family(
        PaddleOCRTextModel, PaddleOCRTextConfig, {"head_dim": 32, "rope_parameters": SECTIONS}, num_axes=3
    ),
    "mistral-window": Family(MistralModel, MistralConfig, {"head_dim": 32, "sliding_window": 33}),
    "qwen2": Family(Qwen2Model, Qwen2Config),
    "qwen2-window": Family(
        Qwen2Model,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1, "head_dim": 16},
    ),
    "qwen2-vl": Family(
        Qwen2VLTextModel, Qwen2VLTextConfig, {"rope_parameters": {**SECTIONS, "mrope_section": [2, 3, 3]}}, num_axes=3
    ),
    "qwen3": Family(Qwen3Model, Qwen3Config, {"head_dim": 32}),
    "qwen3-bias": Family(Qwen3Model, Qwen3Config, {"head_dim": 64, "attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-vl": Family(Qwen3VLTextModel, Qwen3VLTextConfig, {"head_dim": 32, "rope_parameters": SECTIONS}, num_axes=3),
}


def reference(model: Any, embeds: Tensor, positions: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """Run rows (rows, hidden) at positions (axes, rows) through transformers: final hidden states, and each layer's."""
    outputs = list[Tensor]()
    hooks = [layer.register_forward_hook(lambda _m, _i, output: outputs.append(output[0])) for layer in model.layers]
    ids = torch.from_numpy(positions).long()[:, None]
    ids = ids if len(ids) > 1 else ids[0]
    hidden = model(inputs_embeds=embeds[None], position_ids=ids, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return hidden, outputs


def paths(parents: np.ndarray) -> list[list[int]]:
    """Return the way from the root to each node, the node included."""
    found: list[list[int]] = []
    for row, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), row])
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_what_transformers_computes(dtype: torch.dtype, name: str) -> None:  # noqa: F811
    """Run prompts in chunks, one beside another of another length, and a tree behind each; compare every row.

    In bfloat16 both round: the native stack must be no farther from float64 than transformers' own layers are.
    """
    family = FAMILIES[name]
    exact, rounded = family.build().double(), family.build().to(dtype)
    stack = packed.decoder(family.build().to(dtype), (0, 2), 128, CONTEXT)
    assert stack is not None
    assert stack.num_axes == family.num_axes
    rng = np.random.default_rng(5)
    cache = KVCache(
        layers=uniform(3, stack.shape.kv_heads, stack.shape.head_dim), num_slots=3, capacity=CONTEXT, margin=16,
        dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    lengths, nodes = (45, 71), 9
    prompts = [normal(length, HIDDEN, seed=length).to(dtype) for length in lengths]
    # Of one axis, other positions than these would be several sequences to transformers.
    places = [
        rng.integers(0, 80, (3, length)).astype(np.int32)
        if family.num_axes > 1
        else np.arange(length, dtype=np.int32)[None]
        for length in lengths
    ]
    got: list[list[tuple[Tensor, Tensor]]] = [[], []]
    chunks = ((0, 0, 33), (1, 0, 1), (1, 1, 40), (0, 33, 45), (1, 40, 71))
    for b, first, end in chunks:
        start, count = np.array([first], np.int32), np.array([end - first], np.int32)
        rows = AttentionMetadata(cache, 1 + b, end - first, start, count, MaskKind.CAUSAL)
        got[b].append(run(stack, prompts[b][None, first:end], places[b][:, None, first:end], rows, 0))
    parents = some_tree(nodes, 2, seed=8)
    ways = [paths(parents[b]) for b in range(2)]
    depths = np.array([[len(way) - 1 for way in ways[b]] for b in range(2)], np.int32)
    tree = normal(2, nodes, HIDDEN, seed=6).to(dtype)
    at = np.broadcast_to(np.array(lengths, np.int32)[:, None] + depths, (family.num_axes, 2, nodes)).astype(np.int32)
    counts = np.array([nodes, nodes - 2], np.int32)
    rows = AttentionMetadata(cache, 1, nodes, np.array(lengths, np.int32), counts, MaskKind.TREE, parents)
    for b in range(2):
        got[b].append(run(stack, tree, at, rows, b))

    ours, theirs = list[Tensor](), list[Tensor]()
    for b in range(2):
        expected = [list[Tensor](), list[Tensor]()]
        for each, model in zip(expected, (exact, rounded), strict=True):
            each.append(by_transformers(model, prompts[b], places[b]))
            for way in ways[b][: counts[b]]:
                whole = torch.cat((prompts[b], tree[b, way]))
                each.append(by_transformers(model, whole, np.concatenate((places[b], at[:, b, way]), 1))[-1:])
        hidden, aux = (torch.cat([part[i] for part in got[b]])[: lengths[b] + counts[b]] for i in range(2))
        fine, coarse = (torch.cat(each).double() for each in expected)
        ours.append(torch.cat((hidden, aux), -1).double() - fine)
        theirs.append(coarse - fine)
    off, usual = (torch.cat(each).abs() for each in (ours, theirs))
    assert off.mean() < 1.1 * usual.mean() + 1e-6
    assert off.max() < 2 * usual.max() + 1e-5


def run(stack: Stack, x: Tensor, at: np.ndarray, rows: AttentionMetadata, b: int) -> tuple[Tensor, Tensor]:
    hidden, aux = stack.forward(x, np.ascontiguousarray(at), rows)
    return hidden[b], aux[b]


def by_transformers(model: Any, embeds: Tensor, positions: np.ndarray) -> Tensor:
    """Return final hidden states and the outputs of layers 0 and 2, side by side."""
    hidden, outputs = reference(model, embeds.to(model.dtype), positions)
    return torch.cat((hidden, outputs[0], outputs[2]), -1)


def other_scale(model: Any) -> None:
    model.layers[1].self_attn.scaling = 0.5


def other_eps(model: Any) -> None:
    model.layers[2].self_attn.k_norm.variance_epsilon = 1e-3


def half_a_bias(model: Any) -> None:
    model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(128))


def other_matrix(model: Any) -> None:
    class Quantised(torch.nn.Linear):
        pass

    model.layers[2].mlp.down_proj = Quantised(80, HIDDEN, bias=False)


def other_tensor(model: Any) -> None:
    class Quantised(torch.Tensor):
        pass

    weight = model.layers[2].self_attn.o_proj.weight.data.as_subclass(Quantised)
    model.layers[2].self_attn.o_proj.weight = torch.nn.Parameter(weight, requires_grad=False)


def other_forward(model: Any) -> None:
    part = model.layers[2].mlp.up_proj
    part.forward = lambda x: 2 * torch.nn.Linear.forward(part, x)


def other_width(model: Any) -> None:
    model.layers[1].mlp.gate_proj = torch.nn.Linear(HIDDEN, 112, bias=False)


def other_layer(model: Any) -> None:
    model.layers[1].__class__ = type("Gated", (type(model.layers[1]),), {})


def of_its_own_code(model: Any) -> None:
    model.__class__ = type(type(model).__name__, (type(model),), {"__module__": "transformers_modules.remote"})


def no_layers(model: Any) -> None:
    del model.layers[:]


def other_activation(model: Any) -> None:
    model.config.hidden_act = "relu"


def changing_rope(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        other_scale, other_eps, half_a_bias, other_matrix, other_tensor, other_forward, other_width,
        other_layer, of_its_own_code, no_layers, other_activation, changing_rope,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["qwen3", "qwen3-vl"])
def test_a_model_that_differs_in_one_thing_keeps_its_layers(change: Callable[[Any], None], name: str) -> None:
    """Nothing is packed, and nothing raised: such a model runs through transformers."""
    if not library.supports(torch.float32, torch.device("cpu")):
        pytest.skip("no native library here")
    model = FAMILIES[name].build()
    change(model)
    layers = len(model.layers)
    assert packed.decoder(model, (0,), 128, CONTEXT) is None
    assert len(model.layers) == layers


def test_a_family_that_is_not_known_keeps_its_layers() -> None:
    """Among them are some that differ from Llama in factors alone, which no shape shows."""
    others = (GraniteModel, GraniteConfig), (CohereModel, CohereConfig), (Gemma2Model, Gemma2Config)
    for kind, config in others:
        model = Family(kind, config).build()
        assert packed.decoder(model, (0,), 128, CONTEXT) is None
        assert len(model.layers) == 3


def test_more_axes_than_the_stack_has_and_one_for_all(dtype: torch.dtype) -> None:  # noqa: F811
    """Position ids may have a row of text positions in front, or be those of text alone."""
    stack = packed.decoder(FAMILIES["qwen3-vl"].build().to(dtype), (), 128, CONTEXT)
    assert stack is not None
    x = normal(1, 5, HIDDEN, seed=1).to(dtype)
    at = np.array([[[3, 4, 5, 6, 7]], [[3, 9, 9, 1, 7]], [[0, 1, 2, 8, 7]]], np.int32)

    def hidden(positions: np.ndarray) -> Tensor:
        cache = scratch(stack.shape, 1, 64, dtype)
        count = np.array([5], np.int32)
        rows = AttentionMetadata(cache, 0, 5, np.zeros(1, np.int32), count, MaskKind.CAUSAL)
        return stack.forward(x, positions, rows)[0]

    assert torch.equal(hidden(np.concatenate((99 - at[:1], at))), hidden(at))
    assert torch.equal(hidden(at[:1]), hidden(at[[0, 0, 0]]))
    assert not torch.equal(hidden(at[:1]), hidden(at))


@torch.no_grad()
def test_rows_are_added_behind_the_first_layers(dtype: torch.dtype) -> None:  # noqa: F811
    """Qwen3-VL adds features of deeper layers of its tower to the hidden states, where a row is visual."""
    family = FAMILIES["qwen3-vl"]
    exact, rounded = family.build().double(), family.build().to(dtype)
    stack = packed.decoder(family.build().to(dtype), (1, 2), 128, CONTEXT)
    assert stack is not None
    x, at = normal(2, 30, HIDDEN, seed=1).to(dtype), np.arange(60, dtype=np.int32).reshape(1, 2, 30)
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 3:9] = visual[0, 12:25] = visual[1, 29] = True
    deep = normal(2, int(visual.sum()), HIDDEN, seed=2, scale=3.0).to(dtype)
    added = torch.zeros(2, 2, 30, HIDDEN, dtype=dtype)
    added[:, visual] = deep
    cache = scratch(stack.shape, 2, 64, dtype)
    counts = np.array([30, 30], np.int32)
    rows = AttentionMetadata(cache, 0, 30, np.zeros(2, np.int32), counts, MaskKind.CAUSAL)
    hidden, aux = stack.forward(x, at, rows, added)
    plain = stack.forward(x, at, rows)[0]
    assert torch.equal(plain[1, :29], hidden[1, :29])
    assert not torch.equal(plain[0, 3:], hidden[0, 3:])

    def expected(model: Any) -> Tensor:
        ids = torch.from_numpy(at).long().expand(3, -1, -1)
        layers = list[Tensor]()
        hooks = [layer.register_forward_hook(lambda _m, _i, output: layers.append(output)) for layer in model.layers]
        final = model(
            inputs_embeds=x.to(model.dtype),
            position_ids=ids,
            use_cache=False,
            visual_pos_masks=visual,
            deepstack_visual_embeds=list(deep.to(model.dtype)),
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return torch.cat((final, layers[1], layers[2]), -1).double()

    fine = expected(exact)
    off, usual = ((one - fine).abs() for one in (torch.cat((hidden, aux), -1), expected(rounded)))
    assert off.mean() < 1.1 * usual.mean() + 1e-6
    assert off.max() < 2 * usual.max() + 1e-5


class Planted:
    """Propose the same trees at every step."""

    def __init__(self, trees: tree.Trees) -> None:
        self.trees = trees

    def propose(self, _newest: np.ndarray, _budgets: np.ndarray) -> tree.Trees:
        return self.trees

    def observe(self, _trees: tree.Trees, _paths: list[list[int]], _aux: Tensor) -> None:
        pass


def ring_cache(stack: Stack, dtype: torch.dtype, *windows: int | None) -> KVCache:  # noqa: F811
    """Create a cache of 860 positions, whose layers keep these windows."""
    shapes = [LayerShape(stack.shape.kv_heads, stack.shape.head_dim, window) for window in windows]
    cache = KVCache(
        layers=shapes, num_slots=2, capacity=860, margin=16, rows=120, dtype=dtype, device=torch.device("cpu")
    )
    for storage in cache.storages:
        storage.data.fill_(3.0)  # what is not seen must not matter
    return cache


def test_a_layer_that_keeps_a_ring_computes_what_one_that_keeps_all_does(dtype: torch.dtype) -> None:  # noqa: F811
    """Compare bits: chunks that wrap, a tree across the end of a slot, rows that move, and what follows."""
    stack = packed.decoder(FAMILIES["gemma3"].build().to(dtype), (0, 1, 2), 1024, 860)
    assert stack is not None
    caches = [ring_cache(stack, dtype, 40, None, 40), ring_cache(stack, dtype, None, None, None)]
    assert [len(cache.storages) for cache in caches] == [2, 1]
    assert caches[0].storages[0].wraps
    x = normal(850, HIDDEN, seed=1).to(dtype)
    vocab, scale = 48, 0.375
    head = PackedLinear(normal(vocab, HIDDEN, seed=5, scale=HIDDEN**-0.5).to(dtype))
    embeddings = normal(vocab, HIDDEN, seed=4).to(dtype)
    rounds = [
        NativeRound(Verifier(stack, embeddings, head, 1, scale), c, Counters(), SpeculationController(4, 17))
        for c in caches
    ]

    def forward(rows: Callable[[KVCache], AttentionMetadata], x: Tensor, at: np.ndarray) -> None:
        one, other = (stack.forward(x, at, rows(cache)) for cache in caches)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])

    for first, end in ((0, 120), (120, 121), *((at, at + 119) for at in range(121, 835, 119)), (835, 850)):
        starts, counts = np.array([first], np.int32), np.array([end - first], np.int32)
        at = np.arange(first, end, dtype=np.int32)[None, None]
        forward(lambda c: AttentionMetadata(c, 1, end - first, starts, counts, MaskKind.CAUSAL), x[None, first:end], at)  # noqa: B023
    for cache in caches:
        cache.lengths[1] = 850
    trees = tree.roots(np.zeros(2, np.int64), 16)
    rng = np.random.default_rng(2)
    trees.tokens[:], trees.parents[:], trees.sizes[:] = rng.integers(0, vocab, (2, 16)), some_tree(16, 2, seed=7), 16
    for row in range(1, 16):
        trees.depths[:, row] = 1 + trees.depths[np.arange(2), trees.parents[:, row]]
    deepest = int(trees.depths[1].argmax())
    way = paths(trees.parents[1])[deepest][:8]  # the accepted nodes, whose rows have to move
    assert way != list(range(len(way)))
    found = []
    for now in rounds:
        now.use(Planted(trees))  # type: ignore[arg-type]
        now.newest[:2], now.budgets[:2], now.roots[:2] = trees.tokens[:, 0], [IDLE, 15], [0, 850]
        _, chosen, logits = now.draft_and_verify(2, 15)
        wanted = chosen.copy()
        for above, node in pairwise(way):
            wanted[1, above] = trees.tokens[1, node]
        found.append((chosen[1].tolist(), logits[1, :16].clone(), now.commit(wanted)[1][: len(way)]))
    (chosen, logits, kept), (other_chosen, other_logits, other_kept) = found
    assert chosen == other_chosen
    assert torch.equal(logits, other_logits)
    assert kept == other_kept
    length = caches[0].lengths[1]
    assert length == caches[1].lengths[1] >= 850 + len(way)
    starts, counts = np.array([length], np.int32), np.array([1], np.int32)
    last = AttentionMetadata
    forward(lambda c: last(c, 1, 1, starts, counts, MaskKind.CAUSAL), x[None, :1], np.full((1, 1, 1), length, np.int32))


@torch.no_grad()
@pytest.mark.parametrize("blocks", ["whole", "window"])
@pytest.mark.parametrize("window", [40, 9])
def test_rows_of_a_block_see_each_other(dtype: torch.dtype, window: int, blocks: Blocks) -> None:  # noqa: F811
    """Compare with transformers under masks of its own kind: image tokens see their whole image, in all layers."""
    family = replace(FAMILIES["gemma3"], special={**GEMMA, "sliding_window": window})
    exact, rounded = family.build().double(), family.build().to(dtype)
    stack = packed.decoder(family.build().to(dtype), (0, 2), 128, CONTEXT)
    assert stack is not None
    numbers = np.full(70, -1, np.int32)
    numbers[3:20], numbers[20:36], numbers[50:51], numbers[60:70] = 0, 1, 2, 3
    x = normal(70, HIDDEN, seed=1).to(dtype)
    shapes = [LayerShape(stack.shape.kv_heads, stack.shape.head_dim, None, blocks)] * 3
    cache = KVCache(layers=shapes, num_slots=1, capacity=CONTEXT, margin=16, dtype=dtype, device=torch.device("cpu"))
    got = list[Tensor]()
    for first, end in ((0, 2), (2, 50), (50, 70)):
        starts, counts = np.array([first], np.int32), np.array([end - first], np.int32)
        rows = AttentionMetadata(cache, 0, end - first, starts, counts, MaskKind.CAUSAL, blocks=numbers[first:end])
        at = np.arange(first, end, dtype=np.int32)[None, None]
        got.append(torch.cat(run(stack, x[None, first:end], at, rows, 0), -1))

    ahead = np.arange(70) - np.arange(70)[:, None]
    together = (numbers[:, None] == numbers) & (numbers >= 0)
    sees = (ahead <= 0) | together
    near = sees & (ahead > -window) if blocks == "window" else (ahead <= 0) & (ahead > -window) | together

    def expected(model: Any) -> Tensor:
        masks = {
            name: torch.from_numpy(np.where(seen, 0.0, -1e9)).to(model.dtype)[None, None]
            for name, seen in (("full_attention", sees), ("sliding_attention", near))
        }
        outputs = list[Tensor]()
        hooks = [
            layer.register_forward_hook(lambda _m, _i, output: outputs.append(output[0])) for layer in model.layers
        ]
        final = model(
            inputs_embeds=x[None].to(model.dtype),
            position_ids=torch.arange(70)[None],
            attention_mask=masks,
            use_cache=False,
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return torch.cat((final[0], outputs[0], outputs[2]), -1).double()

    fine = expected(exact)
    off, usual = ((one - fine).abs() for one in (torch.cat(got), expected(rounded)))
    assert off.mean() < 1.1 * usual.mean() + 1e-6
    assert off.max() < 2 * usual.max() + 1e-5
