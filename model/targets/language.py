"""Implements the part that targets of all families share: a Llama-like language model and its head, over our KV cache.

The layers are transformers' own, driven through the registered attention. On CPUs the same weights run in the native
stack if it supports them. Knows nothing of media and prompts.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.backends import attention
from model.backends.attention import AttentionMetadata, AttentionTensors
from model.backends.kv_cache import Layers, uniform
from model.backends.native.step import Verifier
from model.config import EngineConfig
from model.errors import ConfigError
from model.request import Kind, VideoMetadata
from model.targets import packed, support
from model.targets.base import Features, Pass, tapped
from model.targets.head import Head
from model.targets.parallel import Group, local, share_of
from model.targets.states import States
from model.transfer import upload

NORMS = ("norm", "final_norm", "embedding_norm", "norm_f", "final_layernorm", "ln_f")  # names of a decoder's final norm


def language_model(model: Any) -> Any:
    """Return the decoder of a conditional generation model of transformers. Raises ConfigError if there is none."""
    for name in ("language_model", "text_model"):
        if (found := getattr(model.base_model, name, None)) is not None:
            return found
    raise ConfigError(f"a model of type {model.config.model_type!r} has no language model of its own")


def _scale_of(language: Any, width: int) -> Tensor:
    """Return the scale of a decoder's final norm: (width,). Some families store it less one."""
    norm = next(found for name in NORMS if (found := getattr(language, name, None)) is not None)
    ones = norm.weight.new_ones(1, width)
    scale: Tensor = norm(ones)[0].detach()
    return torch.where(scale.any(), scale, norm.weight.detach())  # a norm that centres makes zeros of ones


class NativeTower(Protocol):
    """A vision tower that runs in the native library."""

    @property
    def num_bytes(self) -> int: ...


class LanguageModel:
    """The half of `model.targets.base.Target` that all families share; subclasses add the other half."""

    largest_block = 0
    states: States | None = None
    placeholders: dict[str, int]  # tokens in the place of visual tokens, by stream

    def __init__(
        self,
        config: EngineConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        aux_layers: tuple[int, ...] | None,
        *,
        num_axes: int,
        group: Group | None = None,
        layers: Layers | None = None,
        natively: bool = True,
    ) -> None:
        """Take over a loaded model and pack its decoder if it can run natively.

        config: a resolved one; model: a conditional generation model of transformers, whose decoder layers may be
        released; aux_layers: see `model.targets.registry.load_target`; num_axes: of position ids; group: the other
        devices of a tensor-parallel target; layers: what each layer stores, None if all store what the config says;
        natively: whether the native library may run its decoder.
        """
        attention.register()
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self.tokenizer = tokenizer
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._language = language = language_model(self.model)
        language.set_attn_implementation(attention.NAME)
        text = self.model.config.get_text_config()
        self.num_layers, self.vocab_size = text.num_hidden_layers, text.vocab_size
        self.hidden_size = text.hidden_size
        if layers is None:
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            layers = uniform(self.num_layers, share_of(config, text.num_key_value_heads), head_dim)
        self.layers = layers
        first = next(shape for shape in layers if shape is not None)
        self.num_kv_heads, self.head_dim = first.heads * config.tensor_parallel, first.width
        self.max_positions, self.num_axes = text.max_position_embeddings, num_axes
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [eos if eos is not None else tokenizer.eos_token_id])
        self.aux_layers = tapped(self.num_layers, aux_layers)
        self.final_norm = _scale_of(language, self.hidden_size)
        # The last draft trees reach beyond the last position. Nodes there are never kept, but need a rotation.
        alone = config.tensor_parallel == 1
        natively = natively and alone
        reach = self.max_positions + config.nodes
        self.decoder = (
            packed.decoder(language, self.aux_layers, reach, config.context(self.max_positions)) if natively else None
        )
        self.group = group
        self.recordable = alone and self.decoder is None and support.rope_is_fixed(text)
        head = self.model.get_output_embeddings()
        self.head = Head(local(head.weight), None if head.bias is None else local(head.bias))
        self.verifier = None
        scale = None if self.decoder is None else packed.embedding_scale(language)
        if self.decoder is not None and self.head.matrix is not None and scale is not None:
            self.verifier = Verifier(self.decoder, language.embed_tokens.weight, self.head.matrix, num_axes, scale)
        self._taps: dict[int, Tensor] = {}
        for layer in self.aux_layers if self.decoder is None else ():
            language.layers[layer].register_forward_hook(self._tap(layer))

    def _tap(self, layer: int) -> Any:
        """Build a forward hook that keeps the output of a layer as an aux hidden state."""

        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._taps[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def bytes_beside(self, tower: NativeTower | None) -> int:
        """Return the bytes of weights in transformers' modules and of those packed for the native library, `tower`
        included."""
        in_torch = sum(local(parameter).nbytes for parameter in self.model.parameters())
        packed = sum(part.num_bytes for part in (self.decoder, tower) if part is not None)
        return int(in_torch + packed + self.head.packed_bytes)

    def sample_frames(
        self,
        source: VideoMetadata,  # noqa: ARG002
        num_frames: int | None,  # noqa: ARG002
        fps: float | None,  # noqa: ARG002
    ) -> list[int] | None:
        """Leave the choice to the caller (see `Target`)."""
        return None

    def stream(self, kind: Kind) -> str:
        return kind

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._language.embed_tokens(ids)
        return embedded

    def forward(
        self, ids: Tensor, positions: np.ndarray, rows: AttentionMetadata, features: Features | None = None
    ) -> Pass:
        """Run one pass, natively if the decoder was packed (see `Target`). A group's followers run it too."""
        embeds = self._filled(ids, features)
        if self.decoder is not None:
            return Pass(*self.decoder.forward(embeds, positions, rows), embeds)
        if self.group is not None:
            self.group.announce(embeds, positions, rows)
        return self.run_layers(embeds, upload(positions, self.device), rows.plan)

    def run(self, ids: Tensor, positions: Tensor, plan: AttentionTensors, features: Features | None = None) -> Pass:
        """Run one pass through transformers' layers (see `Target`)."""
        return self.run_layers(self._filled(ids, features), positions, plan)

    def run_layers(self, embeds: Tensor, positions: Tensor, plan: AttentionTensors) -> Pass:
        """Run `run` on input embeddings (batch, rows, hidden)."""
        places = positions.long()
        hidden = self._language(
            inputs_embeds=embeds,
            position_ids=places if self.num_axes > 1 else places[0],
            use_cache=False,
            plan=plan,
        ).last_hidden_state
        return Pass(hidden, self._aux(), embeds)

    def _filled(self, ids: Tensor, features: Features | None) -> Tensor:
        """Embed tokens (batch, rows), with features in the place of media: (batch, rows, hidden)."""
        embeds = self.embed(ids)
        for kind, rows in (features or {}).items():
            embeds = embeds.masked_scatter((ids == self.placeholders[kind])[..., None], rows)
        return embeds

    def _aux(self) -> Tensor:
        """Return the aux hidden states that the latest pass left."""
        return torch.cat([self._taps.pop(layer) for layer in self.aux_layers], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
