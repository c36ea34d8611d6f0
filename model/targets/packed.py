"""Packs the target's own weights for the native stack, which computes the same as transformers' layers in one call.

Nothing is approximated. If a decoder or a tower is not built as expected, `decoder` or `tower` returns None, and the
model runs through transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.native.library import PackedLinear
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack, scratch
from model.targets.support import rope_is_fixed, windows

LLAMA_LIKE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen2_5_VLDecoderLayer")
NUM_AXES = 3  # of multimodal rotary embeddings: time, height, width


def joined(*parts: Tensor | None) -> Tensor | None:
    """Concatenate weights along the first axis; None if the first one is None."""
    return None if parts[0] is None else torch.cat([part.detach() for part in parts if part is not None])


def decoder(model: Any, aux_layers: tuple[int, ...], num_positions: int, context: int) -> Stack | None:
    """Pack a Llama-like language model and release its own layers; None if the native stack does not support it.

    num_positions: position ids are below this; context: tokens of the longest sequence; aux_layers: layers whose output
    is returned too.
    """
    config, first = model.config, model.layers[0]
    shape = Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.self_attn.head_dim,
        intermediate=config.intermediate_size,
        eps=config.rms_norm_eps,
    )
    weight = first.mlp.gate_proj.weight
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    fits = (
        all(type(layer).__name__ in LLAMA_LIKE for layer in model.layers)
        and config.hidden_act == "silu"
        and rope_is_fixed(config)
        and all(size >= context for size in windows(config).values())
    )
    if not (fits and shape.runs_natively(weight)):
        return None
    places = torch.arange(num_positions, device=weight.device)[None]
    cos, sin = model.rotary_emb(weight.new_zeros(1), position_ids=places)
    first_half, second_half = sin[0].chunk(2, -1)
    stack = Stack(
        shape,
        _released(model.layers),
        rotary=Rotary(
            cos[0],
            torch.cat((-first_half, second_half), -1),
            _axes(rope_parameters.get("mrope_section"), shape.head_dim),
        ),
        final_norm=Norm(model.norm.weight),
        aux_layers=aux_layers,
    )
    return stack


def _released(layers: nn.ModuleList) -> Iterator[LayerWeights]:
    """Yield the weights of the layers and drop each layer from the model. So no layer is in memory twice, which for a
    large model would take most of a machine's memory."""
    while len(layers):
        yield _llama_layer(layers.pop(0))


def _axes(sections: list[int] | None, head_dim: int) -> np.ndarray:
    """Return the axis of the position ids that rotates each place of a head: (head_dim,).

    sections: sizes within half a head, which take the axes in turn; None: there is one axis.
    """
    if sections is None:
        return np.zeros(head_dim, np.int32)
    half = np.concatenate([np.full(size, i % NUM_AXES, np.int32) for i, size in enumerate(sections)])
    assert 2 * len(half) == head_dim
    return np.tile(half, 2)


def _llama_layer(layer: Any) -> LayerWeights:
    """Collect the weights of a Llama-like decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = joined(*(part.weight for part in heads))
    up = joined(mlp.gate_proj.weight, mlp.up_proj.weight)
    assert qkv is not None
    assert up is not None
    return LayerWeights(
        norm1=Norm(layer.input_layernorm.weight),
        qkv=qkv,
        qkv_bias=joined(*(part.bias for part in heads)),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        norm2=Norm(layer.post_attention_layernorm.weight),
        up=up,
        up_bias=joined(mlp.gate_proj.bias, mlp.up_proj.bias),
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
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
