"""Defines the interface between the engine and a target model. One file per family implements it; registry.py picks
one.

An adapter contains only what differs between families: where the visual tokens are, how features are computed, position
ids, the chat template, how a video becomes tokens. The layers are transformers' own and stay unforked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.backends.attention import AttentionMetadata, AttentionTensors
from model.backends.kv_cache import Layers
from model.backends.native.step import Verifier
from model.errors import ConfigError
from model.request import Geometry, Kind, Medium, Message, TemplateOptions, VideoMetadata
from model.targets.chat_template import ChatTemplate
from model.targets.head import Head
from model.targets.parallel import Group
from model.targets.prompt import PLAIN, TokenizedPrompt
from model.targets.states import States

Features = Mapping[str, Tensor]  # by stream (see Target.stream): (visual tokens, width), in the order of the tokens


class Pass(NamedTuple):
    """The result of one pass.

    hidden: (batch, rows, hidden), the final hidden states; aux: (batch, rows, num_aux * hidden), the aux hidden states
    side by side; embeds: (batch, rows, hidden), what entered the first layer. The values in padding rows (see
    AttentionMetadata) are undefined.
    """

    hidden: Tensor
    aux: Tensor
    embeds: Tensor


class Target(Protocol):
    """The whole interface of a target. Tensors are on the target's device, in its dtype."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: Layers  # what each decoder layer stores, on one device
    states: States | None  # its layers that carry a state; None if it has none
    largest_block: int  # most tokens that see each other in both directions; 0 if none do
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_axes: int  # of position ids
    eos_ids: frozenset[int]
    tokens_per_image: int
    placeholders: dict[str, int]  # tokens in the place of visual tokens, by stream
    geometry: Geometry
    template: ChatTemplate
    head: Head  # lm_head
    verifier: Verifier | None  # for a native round; None if the decoder does not run natively
    native: bool  # whether decoder and tower both run in the native library
    recordable: bool  # `run` equals `forward` and never reads a value back to the host: see graphs.py
    aux_layers: tuple[int, ...]  # decoder layers whose output `forward` also returns
    group: Group | None  # the devices that share its decoder; None for one device
    final_norm: Tensor  # (hidden,) scale of the norm between the last layer and lm_head

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its weights as they are stored in memory."""
        ...

    def prompt(self, messages: tuple[Message, ...], options: TemplateOptions = PLAIN) -> TokenizedPrompt:
        """Apply the chat template and tokenise. User text never becomes special tokens. Raises RequestError if the
        messages do not fit the template or the model."""
        ...

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        """Return the indices of the frames of a video that the target's own processor takes; None if it leaves the
        choice to the caller. Raises RequestError."""
        ...

    def stream(self, kind: Kind) -> str:
        """Return the name under which the features of a kind of medium enter a pass."""
        ...

    def pieces(self, medium: Medium) -> int:
        """Return into how many pieces a medium can be split for encoding. Pieces have equally many visual tokens and do
        not attend to each other."""
        ...

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        """Compute the features of the visual tokens of pieces first..last: (tokens, width)."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Embed tokens: (...,) -> (..., hidden)."""
        ...

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Compute the prompt's position ids: (axes, tokens) int32, below `max_positions`.

        The last token has the same id on every axis, and generated tokens continue from there.
        """
        ...

    def forward(
        self, ids: Tensor, positions: np.ndarray, rows: AttentionMetadata, features: Features | None = None
    ) -> Pass:
        """Run one pass: ids (batch, rows) int64 on the device, positions (axes, batch, rows) int32.

        features: those of the visual tokens among `ids`, for a part of a prompt; None for generated tokens.
        """
        ...

    def run(self, ids: Tensor, positions: Tensor, plan: AttentionTensors, features: Features | None = None) -> Pass:
        """Run `forward` by torch alone, with all inputs on the device; positions (axes, batch, rows) integers."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply lm_head: (..., hidden) -> (..., vocab)."""
        ...


def evenly_spaced(num_layers: int, count: int = 3) -> tuple[int, ...]:
    """Choose aux layers: early, middle and late decoder layers, but not the last of a deep target, whose output serves
    only the next token."""
    places = (round(num_layers * (i + 1) / (count + 1)) for i in range(count))
    return tuple(dict.fromkeys(min(place, num_layers - 1) for place in places))


def tapped(num_layers: int, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Resolve the aux layers that a target is to offer. wanted: layers, where -1 is the last; None: some, evenly
    spaced.

    Raises ConfigError if the target has no such layer.
    """
    if wanted is None:
        return evenly_spaced(num_layers)
    if not all(-num_layers <= layer < num_layers for layer in wanted):
        raise ConfigError(f"a draft that reads layers {wanted} is for another target: this one has {num_layers}")
    return tuple(sorted({layer % num_layers for layer in wanted}))
