"""Packs the target's own weights for the native stack, which computes the same as transformers' layers in one call.

Nothing is approximated. If a decoder or a tower is not built as expected, `decoder` or `tower` returns None, and the
model runs through transformers' own layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.native.library import PackedLinear
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack, scratch
from model.targets.support import rope_is_fixed, windows

# Language models of transformers and their layers, whose forwards are Llama's: two RMS norms a layer, a gated MLP, rope
# that turns halves of a head. Attention may also normalise each head's queries and keys.
LLAMA_LIKE = {
    "LlamaModel": "LlamaDecoderLayer",
    "MistralModel": "MistralDecoderLayer",
    "PaddleOCRTextModel": "PaddleOCRDecoderLayer",
    "Qwen2Model": "Qwen2DecoderLayer",
    "Qwen2VLTextModel": "Qwen2VLDecoderLayer",
    "Qwen2_5_VLTextModel": "Qwen2_5_VLDecoderLayer",
    "Qwen3Model": "Qwen3DecoderLayer",
    "Qwen3VLTextModel": "Qwen3VLTextDecoderLayer",
}
NUM_AXES = 3  # of multimodal rotary embeddings: time, height, width
AT_ONCE = 1 << 15  # positions of which rotations are computed at once


def joined(*parts: Tensor | None) -> Tensor | None:
    """Concatenate weights along the first axis; None if the first one is None."""
    return None if parts[0] is None else torch.cat([part.detach() for part in parts if part is not None])


def decoder(model: Any, aux_layers: tuple[int, ...], num_positions: int, context: int) -> Stack | None:
    """Pack a Llama-like language model and release its own layers; None if the native stack does not support it.

    num_positions: position ids are below this; context: tokens of the longest sequence; aux_layers: layers whose output
    is returned too.
    """
    shape = _shape(model, context)
    if shape is None:
        return None
    weight = model.layers[0].mlp.gate_proj.weight
    rotary = _rotary(model.rotary_emb, weight, num_positions, shape.head_dim)
    if rotary is None:
        return None
    return Stack(
        shape,
        _released(model.layers),
        rotary=rotary,
        final_norm=Norm(model.norm.weight),
        aux_layers=aux_layers,
    )


def _shape(model: Any, context: int) -> Shape | None:
    """Return the shape of a decoder's layers; None if the native stack does not compute what they do."""
    if not _is_known(model):
        return None
    config, layers = model.config, model.layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    head_dim, hidden = attention.head_dim, config.hidden_size
    shape = Shape(
        hidden=hidden,
        heads=attention.q_proj.out_features // head_dim,
        kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        intermediate=mlp.gate_proj.out_features,
        eps=model.norm.variance_epsilon,
    )
    fits = (
        config.hidden_act == "silu"
        and rope_is_fixed(config)
        and tuple(model.norm.weight.shape) == (hidden,)
        and all(_fits(layer, shape) for layer in layers)
        and all(size >= context for size in windows(config).values())
    )
    return shape if fits and shape.runs_natively(mlp.gate_proj.weight) else None


def _is_known(model: Any) -> bool:
    """Return whether transformers' own code of a language model is known to be Llama's, over plain matrices."""
    name = type(model).__name__
    if name not in LLAMA_LIKE or not len(getattr(model, "layers", ())):
        return False
    kinds = {(part.__module__.startswith("transformers.models."), part.__name__) for part in map(type, model.layers)}
    return (
        kinds == {(True, LLAMA_LIKE[name])}
        and type(model).__module__.startswith("transformers.models.")
        and all(type(part) is nn.Linear for layer in model.layers for part in _matrices(layer))
    )


def _matrices(layer: Any) -> tuple[Any, ...]:
    """Return the linear layers of a layer: queries, keys, values, output, gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = attention.q_proj, attention.k_proj, attention.v_proj
    return *heads, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _norms(layer: Any) -> list[Any]:
    """Return the norms of a layer: before attention, before the MLP, and those of queries and keys if it has them."""
    own = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in own if norm is not None)]


def _fits(layer: Any, shape: Shape) -> bool:
    """Return whether a layer's parts have the shape and the settings that all layers of a stack have."""
    hidden, inner, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    queries, keys = shape.heads * head_dim, shape.kv_heads * head_dim
    sizes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (inner, hidden), (inner, hidden)]
    matrices, norms = _matrices(layer), _norms(layer)
    biased = [part.bias is not None for part in matrices]
    return (
        [tuple(part.weight.shape) for part in matrices] == [*sizes, (hidden, inner)]
        and len(set(biased[:3])) == len(set(biased[4:6])) == 1
        and len({part.weight.dtype for part in matrices}) == 1
        and math.isclose(layer.self_attn.scaling, head_dim**-0.5)
        and [tuple(norm.weight.shape) for norm in norms] in ([(hidden,)] * 2, [(hidden,)] * 2 + [(head_dim,)] * 2)
        and all(norm.variance_epsilon == shape.eps for norm in norms)
    )


def _released(layers: nn.ModuleList) -> Iterator[LayerWeights]:
    """Yield the weights of the layers and drop each layer from the model. So no layer is in memory twice, which for a
    large model would take most of a machine's memory."""
    while len(layers):
        yield _llama_layer(layers.pop(0))


@torch.no_grad()
def _rotary(embedding: Any, like: Tensor, num_positions: int, head_dim: int) -> Rotary | None:
    """Tabulate a rotary embedding of the first positions, in the dtype of `like`; None if it is not as expected.

    Which axis of the position ids turns a place of a head is seen by turning one axis at a time.
    """
    x = like.new_zeros(1)
    parts = [
        embedding(x, position_ids=part[None]) for part in torch.arange(num_positions, device=like.device).split(AT_ONCE)
    ]
    cos, sin = (torch.cat([part[i][0] for part in parts]) for i in range(2))
    if cos.shape != (num_positions, head_dim) or not torch.equal(*cos[-1].chunk(2)):
        return None
    axes = np.zeros(head_dim, np.int32)
    alone = embedding(x, position_ids=torch.eye(NUM_AXES, dtype=torch.long, device=like.device)[:, None])[1]
    if alone.ndim == 3:  # one table for all axes
        turned = alone[0] != 0
        if not torch.equal(turned.sum(0), torch.ones_like(turned[0], dtype=torch.long)):
            return None
        axes = turned.int().argmax(0).numpy().astype(np.int32)
    first_half, second_half = sin.chunk(2, -1)
    return Rotary(cos, torch.cat((-first_half, second_half), -1), axes, NUM_AXES if alone.ndim == 3 else 1)


def _llama_layer(layer: Any) -> LayerWeights:
    """Collect the weights of a Llama-like decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = joined(*(part.weight for part in heads))
    up = joined(mlp.gate_proj.weight, mlp.up_proj.weight)
    assert qkv is not None
    assert up is not None
    before, behind, *of_heads = (norm.weight for norm in _norms(layer))
    return LayerWeights(
        norm1=Norm(before),
        qkv=qkv,
        qkv_bias=joined(*(part.bias for part in heads)),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        norm2=Norm(behind),
        up=up,
        up_bias=joined(mlp.gate_proj.bias, mlp.up_proj.bias),
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        q_norm=of_heads[0] if of_heads else None,
        k_norm=of_heads[1] if of_heads else None,
    )


class Tower:
    """Runs a CLIP tower up to the selected layer, and the projector: pixels to features."""

    def __init__(self, tower: Any, projector: Any, shape: Shape, num_layers: int, *, drop_class: bool) -> None:
        """Pack the tower and release its layers. num_layers: layers to run; drop_class: drop the class token."""
        self.norm, self.drop_class, self.shape = tower.pre_layrnorm, drop_class, shape
        convolution, embeddings = tower.embeddings.patch_embedding, tower.embeddings
        self.patch = convolution.kernel_size[0]
        self.patches = PackedLinear(convolution.weight.flatten(1), convolution.bias)
        self.places = embeddings.position_embedding.weight.detach()
        self.first_place = embeddings.class_embedding.detach() + self.places[0]
        self.stack = Stack(shape, [_clip_layer(layer) for layer in tower.encoder.layers[:num_layers]])
        self.first = PackedLinear(projector.linear_1.weight, projector.linear_1.bias)
        self.act = projector.act
        self.second = PackedLinear(projector.linear_2.weight, projector.linear_2.bias)
        tower.encoder.layers = nn.ModuleList()

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the packed weights."""
        return self.stack.num_bytes + sum(m.packed.nbytes for m in (self.patches, self.first, self.second))

    def __call__(self, patches: Tensor) -> Tensor:
        """Compute features: (images, patches, numbers) -> (images, tokens, hidden of the language model)."""
        batch, num = patches.shape[0], patches.shape[1] + 1
        x = patches.new_empty(batch, num, self.shape.hidden)
        x[:, 0] = self.first_place
        torch.add(self.patches(patches), self.places[1:], out=x[:, 1:])
        x = self.norm(x)
        cache = scratch(self.shape, batch, num, x.dtype)
        starts, counts = np.zeros(batch, np.int32), np.full(batch, num, np.int32)
        places = np.zeros((1, batch, num), np.int32)
        seen, _ = self.stack.forward(x, places, AttentionMetadata(cache, 0, num, starts, counts, MaskKind.FULL))
        projected: Tensor = self.second(self.act(self.first(seen[:, 1:] if self.drop_class else seen)))
        return projected


def tower(model: Any, config: Any) -> Tower | None:
    """Pack the tower and projector of a LLaVA model and release their own layers; None if they are not CLIP's."""
    vision, projector = model.vision_tower, model.multi_modal_projector
    if type(vision).__name__ != "CLIPVisionModel" or not isinstance(config.vision_feature_layer, int):
        return None
    weight = vision.embeddings.patch_embedding.weight
    settings = vision.config
    shape = Shape(
        hidden=settings.hidden_size,
        heads=settings.num_attention_heads,
        kv_heads=settings.num_attention_heads,
        head_dim=settings.hidden_size // settings.num_attention_heads,
        intermediate=settings.intermediate_size,
        eps=settings.layer_norm_eps,
        norm="layer",
        activation=settings.hidden_act,
    )
    known = settings.hidden_act in ("quick_gelu", "gelu", "gelu_pytorch_tanh") and settings.num_channels == 3
    if not (known and shape.runs_natively(weight)):
        return None
    # transformers' hidden_states begin with the embeddings: -1 is the output of the last layer, -2 of the one before.
    wanted = config.vision_feature_layer % (settings.num_hidden_layers + 1)
    return Tower(vision, projector, shape, wanted, drop_class=config.vision_feature_select_strategy == "default")


def _clip_layer(layer: Any) -> LayerWeights:
    """Collect the weights of a CLIP encoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = joined(*(part.weight for part in heads))
    assert qkv is not None
    return LayerWeights(
        norm1=Norm(layer.layer_norm1.weight, layer.layer_norm1.bias),
        qkv=qkv,
        qkv_bias=joined(*(part.bias for part in heads)),
        out=attention.out_proj.weight,
        out_bias=attention.out_proj.bias,
        norm2=Norm(layer.layer_norm2.weight, layer.layer_norm2.bias),
        up=mlp.fc1.weight,
        up_bias=mlp.fc1.bias,
        down=mlp.fc2.weight,
        down_bias=mlp.fc2.bias,
    )
