"""Packs the target's own weights for the native stack, which computes the same as transformers' layers in one call.

Nothing is approximated. If a decoder or a tower is not built as expected, `decoder` or `tower` returns None, and the
model runs through transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import Layers
from model.backends.native.library import PackedLinear
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack, scratch
from model.targets.blocks import Rule
from model.targets.support import rope_is_fixed

NUM_AXES = 3  # of multimodal rotary embeddings: time, height, width
AT_ONCE = 1 << 15  # positions of which rotations are computed at once
GATES = ("silu", "gelu", "gelu_pytorch_tanh")  # activations of a gated MLP
ADDING = ("Qwen3VLTextModel",)  # language models that add features of inner layers of their tower to hidden states
SCALED_EMBEDDINGS = ("Gemma3TextScaledWordEmbedding",)  # embeddings times `embed_scale`


@dataclass(frozen=True)
class Kind:
    """What the layers of one of transformers' language models compute, beside what their weights say.

    norms: the names of those before attention and before the MLP, and of those of what both add to a row; rope turns
    neighbours of a head, or the halves of its first places.
    """

    layer: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: Literal["rms", "rms_plus_one"] = "rms"
    neighbours: bool = False


GLM_NORMS = "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
KINDS = {
    "Gemma3TextModel": Kind(
        "Gemma3DecoderLayer",
        norms=(
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ),
        norm="rms_plus_one",
    ),
    "Glm4vTextModel": Kind("Glm4vTextDecoderLayer", norms=GLM_NORMS, neighbours=True),
    "GlmOcrTextModel": Kind("GlmOcrTextDecoderLayer", norms=GLM_NORMS, neighbours=True),
    "LlamaModel": Kind("LlamaDecoderLayer"),
    "MistralModel": Kind("MistralDecoderLayer"),
    "PaddleOCRTextModel": Kind("PaddleOCRDecoderLayer"),
    "Qwen2Model": Kind("Qwen2DecoderLayer"),
    "Qwen2VLTextModel": Kind("Qwen2VLDecoderLayer"),
    "Qwen2_5_VLTextModel": Kind("Qwen2_5_VLDecoderLayer"),
    "Qwen3Model": Kind("Qwen3DecoderLayer"),
    "Qwen3VLTextModel": Kind("Qwen3VLTextDecoderLayer"),
}


def joined(*parts: Tensor | None) -> Tensor | None:
    """Concatenate weights along the first axis; None if the first one is None."""
    return None if parts[0] is None else torch.cat([part.detach() for part in parts if part is not None])


def decoder(model: Any, aux_layers: tuple[int, ...], num_positions: int, context: int) -> Stack | None:
    """Pack a language model and release its own layers; None if the native stack does not support it.

    num_positions: position ids are below this; context: tokens of the longest sequence; aux_layers: layers whose output
    is returned too.
    """
    kind = _kind(model)
    if kind is None:
        return None
    shape = _shape(model, kind)
    if shape is None:
        return None
    like = model.layers[0].self_attn.q_proj.weight
    turned = _rotary(model.rotary_emb, like, num_positions, shape.head_dim, kind)
    if turned is None:
        return None
    rotary, order = turned
    tables = _tables(model.rotary_emb)

    def released() -> Iterator[LayerWeights]:
        """Yield the weights of the layers and drop each layer from the model. So no layer is in memory twice, which for
        a large model would take most of a machine's memory."""
        while len(model.layers):
            layer = model.layers.pop(0)
            window = _window(layer, model.config)
            yield _weights(
                layer,
                kind,
                order,
                window=window if window is not None and window < context else None,
                table=tables.index(layer.self_attn.layer_type) if tables else 0,
            )

    return Stack(shape, released(), rotary=rotary, final_norm=Norm(model.norm.weight), aux_layers=aux_layers)


def adds_rows(model: Any) -> bool:
    """Return whether a language model adds rows behind its first layers in the way that `Stack.forward` does."""
    return type(model).__name__ in ADDING


def sees_blocks(layers: Layers, rule: Rule | None) -> bool:
    """Return whether the native stack follows a rule of which tokens see each other in both directions."""
    return rule is None or (rule.who == "runs" and {shape and shape.blocks for shape in layers} == {rule.blocks})


def embedding_scale(model: Any) -> float | None:
    """Return what a language model multiplies its token embeddings by; None if they are not a table's rows."""
    table = model.embed_tokens
    if type(table) is nn.Embedding and table.max_norm is None:
        return 1.0
    if type(table).__name__ in SCALED_EMBEDDINGS and type(table).__module__.startswith("transformers.models."):
        return float(table.embed_scale.to(table.weight.dtype))
    return None


def _kind(model: Any) -> Kind | None:
    """Return the kind of a language model; None if it is not transformers' own code over plain matrices."""
    kind = KINDS.get(type(model).__name__)
    if kind is None or not len(getattr(model, "layers", ())):
        return None
    own = all(type(part).__module__.startswith("transformers.models.") for part in (model, *model.layers))
    if not own or any(type(layer).__name__ != kind.layer for layer in model.layers):
        return None
    plain = all(_is_plain(part) for layer in model.layers for part in _matrices(layer).values())
    replaced = any("forward" in vars(part) for layer in model.layers for part in layer.modules())
    return kind if plain and not replaced else None


def _is_plain(part: Any) -> bool:
    """Return whether a module multiplies by its weight and does nothing else: quantised ones do more."""
    return type(part) is nn.Linear and type(part.weight) is nn.Parameter


def _shape(model: Any, kind: Kind) -> Shape | None:
    """Return the shape of a decoder's layers; None if the native stack does not compute what they do."""
    config, attention = model.config, model.layers[0].self_attn
    matrices, head_dim = _matrices(model.layers[0]), attention.head_dim
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in GATES:
        return None
    shape = Shape(
        hidden=config.hidden_size,
        heads=matrices["q"].out_features // head_dim,
        kv_heads=matrices["k"].out_features // head_dim,
        head_dim=head_dim,
        intermediate=matrices["down"].in_features,
        eps=_eps(model.norm),
        norm=kind.norm,
        activation=activation,
        scale=attention.scaling,
    )
    fits = (
        rope_is_fixed(config)
        and {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "use_bidirectional_attention", None)
        and tuple(model.norm.weight.shape) == (shape.hidden,)
        and all(_fits(layer, shape, kind) for layer in model.layers)
    )
    return shape if fits and shape.runs_natively(matrices["q"].weight) else None


def _matrices(layer: Any) -> dict[str, Any]:
    """Return the linear layers of a decoder layer by role. Gate and up may be one."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
    inner = ("gate_up",) if hasattr(mlp, "gate_up_proj") else ("gate", "up")
    return heads | {name: getattr(mlp, f"{name}_proj") for name in (*inner, "down")}


def _norms(layer: Any, kind: Kind) -> tuple[list[Any], list[Any]]:
    """Return the norms of a layer's rows, and those of its queries and keys, if it has them."""
    own = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [getattr(layer, name) for name in kind.norms], [norm for norm in own if norm is not None]


def _eps(norm: Any) -> float:
    """Return what a norm adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _window(layer: Any, config: Any) -> int | None:
    """Return how many positions a row of a layer sees; None for all. Mistral has one window for all layers."""
    attention = layer.self_attn
    if type(layer).__name__ == "MistralDecoderLayer":
        window: int | None = config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)


def _fits(layer: Any, shape: Shape, kind: Kind) -> bool:
    """Return whether a layer's parts have the shape and the settings that all layers of a stack have."""
    hidden, inner, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    queries, keys = shape.heads * head_dim, shape.kv_heads * head_dim
    sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    sizes |= {"gate": (inner, hidden), "up": (inner, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    matrices, (norms, of_heads) = _matrices(layer), _norms(layer, kind)
    biased = {name: part.bias is not None for name, part in matrices.items()}
    return (
        all(tuple(part.weight.shape) == sizes[name] for name, part in matrices.items())
        and biased["q"] == biased["k"] == biased["v"]
        and biased.get("gate") == biased.get("up")
        and len({part.weight.dtype for part in matrices.values()}) == 1
        and layer.self_attn.scaling == shape.scale
        and len(of_heads) in (0, 2)
        and all(tuple(norm.weight.shape) == (hidden,) for norm in norms)
        and all(tuple(norm.weight.shape) == (head_dim,) for norm in of_heads)
        and all(_eps(norm) == shape.eps for norm in (*norms, *of_heads))
    )


def _tables(embedding: Any) -> list[str]:
    """Return the types of layers for which a rotary embedding has tables of their own."""
    return list(getattr(embedding, "layer_types", ()))


@torch.no_grad()
def _rotary(
    embedding: Any, like: Tensor, num_positions: int, head_dim: int, kind: Kind
) -> tuple[Rotary, Tensor | None] | None:
    """Tabulate a rotary embedding of the first positions, in the dtype of `like`; None if it is not as expected.

    Which axis of the position ids turns a place of a head is seen by turning one axis at a time. Also returns in which
    order the places of a head must be so that the two that turn together are half a head apart, and those that do not
    turn are turned by nothing; None if they are in order.
    """
    half, x = head_dim // 2, like.new_zeros(1)

    def angles(ids: Tensor, **of_layers: str) -> tuple[Tensor, ...]:
        """Compute cos and sin of the pairs of places that turn together: (..., pairs)."""
        found: tuple[Tensor, ...] = embedding(x, position_ids=ids, **of_layers)
        pairs = found[0].shape[-1] // 2
        repeated = torch.equal(found[1][..., 0::2], found[1][..., 1::2])  # as neighbours, not as halves
        return tuple(table[..., 0::2] if repeated else table[..., :pairs] for table in found)

    types = [{"layer_type": name} for name in _tables(embedding)] or [{}]
    ids = torch.arange(num_positions, device=like.device).split(AT_ONCE)
    parts = [[angles(part[None], **of_layers) for part in ids] for of_layers in types]
    cos, sin = (torch.stack([torch.cat([part[i][0] for part in table]) for table in parts]) for i in range(2))
    pairs = cos.shape[-1]
    if cos.shape[:2] != (len(types), num_positions) or pairs > half or (pairs < half and not kind.neighbours):
        return None
    alone = angles(torch.eye(NUM_AXES, dtype=torch.long, device=like.device)[:, None], **types[0])[1]
    several = alone.ndim == 3  # one table for all axes
    axes = np.zeros(half, np.int32)
    if several:
        turned = alone[0] != 0
        if not torch.equal(turned.sum(0), torch.ones(pairs, dtype=torch.long, device=like.device)):
            return None
        axes[:pairs] = turned.int().argmax(0).numpy()
    cos, sin = (
        torch.cat((table, table.new_full((*table.shape[:2], half - pairs), still)), -1)
        for table, still in ((cos, 1.0), (sin, 0.0))
    )
    order = None
    if kind.neighbours:
        rest = torch.arange(2 * pairs, head_dim).chunk(2)
        even = torch.arange(0, 2 * pairs, 2)
        order = torch.cat((even, rest[0], even + 1, rest[1])) if pairs < half else torch.cat((even, even + 1))
    return Rotary(cos, sin, axes, NUM_AXES if several else 1), order


def _ordered(weights: Tensor | None, order: Tensor | None) -> Tensor | None:
    """Put the places of each head of a projection's weights (heads * head_dim, ...) in order."""
    if weights is None or order is None:
        return weights
    return weights.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _weights(layer: Any, kind: Kind, order: Tensor | None, *, window: int | None, table: int) -> LayerWeights:
    """Collect the weights of a decoder layer. order: of the places of its queries and keys."""
    matrices, (norms, of_heads) = _matrices(layer), _norms(layer, kind)
    q, k, v, out, down = (matrices[name] for name in ("q", "k", "v", "o", "down"))
    inner = [matrices[name] for name in ("gate_up", "gate", "up") if name in matrices]
    qkv = joined(_ordered(q.weight, order), _ordered(k.weight, order), v.weight)
    up = joined(*(part.weight for part in inner))
    assert qkv is not None
    assert up is not None
    q_norm, k_norm = (_ordered(norm.weight, order) for norm in of_heads) if of_heads else (None, None)
    before, middle, *post = (Norm(norm.weight) for norm in norms)
    return LayerWeights(
        norm1=before,
        qkv=qkv,
        qkv_bias=joined(_ordered(q.bias, order), _ordered(k.bias, order), v.bias),
        out=out.weight,
        out_bias=out.bias,
        norm2=middle,
        up=up,
        up_bias=joined(*(part.bias for part in inner)),
        down=down.weight,
        down_bias=down.bias,
        q_norm=q_norm,
        k_norm=k_norm,
        post1=post[0] if post else None,
        post2=post[1] if post else None,
        window=window,
        table=table,
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


def is_plain(module: nn.Module) -> bool:
    """Return whether all matrices of a module are ordinary ones, not quantised or otherwise replaced."""
    return all(type(part) is nn.Linear for part in module.modules() if isinstance(part, nn.Linear))


def tower(model: Any, config: Any) -> Tower | None:
    """Pack the tower and projector of a LLaVA model and release their own layers; None if they are not CLIP's."""
    vision, projector = model.vision_tower, model.multi_modal_projector
    if type(vision).__name__ != "CLIPVisionModel" or not isinstance(config.vision_feature_layer, int):
        return None
    if not (is_plain(vision) and is_plain(projector)):
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
        gated=False,
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
