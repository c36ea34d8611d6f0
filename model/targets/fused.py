"""A Llama-like decoder with less between its products: the transformers model's own weights, driven in fewer calls.

transformers' layers issue some fifty small operations each; for few rows on a CPU they outweigh the products.
Here query, key and value are one product, gate and up another, and a norm is one call. Nothing is approximated; where a
decoder is not built as expected, `fits` says so and the model runs through transformers' own layers and the registered
attention (attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.attention import Rows, attend
from model.linear import Product


class FusedLayer:
    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.head_dim: int = attention.head_dim
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.out = Product([attention.o_proj])
        self.gate_up = Product([mlp.gate_proj, mlp.up_proj])
        self.down = Product([mlp.down_proj])
        self.norms = [
            (norm.weight.detach(), norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Rows) -> Tensor:
        """x: (batch, rows, hidden); cos, sin: (batch, rows, 1, head_dim), sin's first half negated."""
        weight, eps = self.norms[0]
        y = F.rms_norm(x, weight.shape, weight, eps)
        every = self.qkv(y).unflatten(-1, (-1, self.head_dim))
        turning = every[:, :, : self.heads + self.kv_heads]
        left, right = turning.chunk(2, -1)
        turned = turning * cos + torch.cat((right, left), -1) * sin
        turned = turned.transpose(1, 2)
        mixed = attend(
            rows,
            self.index,
            turned[:, : self.heads],
            turned[:, self.heads :],
            every[:, :, self.heads + self.kv_heads :].transpose(1, 2),
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        weight, eps = self.norms[1]
        gate, up = self.gate_up(F.rms_norm(x, weight.shape, weight, eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class FusedDecoder:
    """All layers, the final norm and the output head. The layers' own copies of the weights are released."""

    def __init__(self, decoder: Any, lm_head: nn.Linear, tap_layers: tuple[int, ...]) -> None:
        self.rotary = decoder.rotary_emb
        self.layers = [FusedLayer(layer, i) for i, layer in enumerate(decoder.layers)]
        self.norm = (decoder.norm.weight.detach(), decoder.norm.variance_epsilon)
        self.logits = Product([lm_head])
        self.tap_layers = tap_layers
        decoder.layers = nn.ModuleList()

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether these are layers as Llama, Mistral and Qwen2 have them, on a CPU."""
        config, first = decoder.config, decoder.layers[0]
        names = {name for name, _ in first.named_modules() if name and "." in name}
        expected = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
        return (
            first.mlp.gate_proj.weight.device.type == "cpu"
            and names - {"mlp.act_fn"} == expected
            and {name for name, _ in first.named_children()}
            == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
            and type(first).__name__ in ("LlamaDecoderLayer", "MistralDecoderLayer")
            and config.hidden_act == "silu"
            and hasattr(first.input_layernorm, "variance_epsilon")
        )

    def __call__(self, embeds: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """embeds: (batch, rows, hidden), positions: (batch, rows); as Target.forward."""
        cos, sin = self.rotary(embeds, position_ids=positions)
        half = sin.shape[-1] // 2
        cos, sin = cos[:, :, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]
        taps = []
        x = embeds
        for layer in self.layers:
            x = layer(x, cos, sin, rows)
            if layer.index in self.tap_layers:
                taps.append(x)
        weight, eps = self.norm
        return F.rms_norm(x, weight.shape, weight, eps), torch.cat(taps, -1)
