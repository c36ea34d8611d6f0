"""What the engine needs of a target model. One file per family implements it; registry.py picks one.

An adapter holds only what differs between families: where the visual tokens are, how features are computed, position
ids, the chat template, how a video becomes tokens. The layers are transformers' own and stay unforked.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.backends.attention import AttentionMetadata, AttentionTensors
from model.backends.native.step import Verifier
from model.errors import ConfigError
from model.request import Geometry, Medium, Message
from model.targets.head import Head
from model.targets.parallel import Group
from model.targets.prompt import TokenizedPrompt


class Target(Protocol):
    """Tensors are on the target's device, in its dtype."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_axes: int  # of position ids
    eos_ids: frozenset[int]
    tokens_per_image: int
    geometry: Geometry
    head: Head  # lm_head
    verifier: Verifier | None  # what a native round needs, where the decoder runs natively
    native: bool  # all that takes long runs in the native library, nothing in torch
    recordable: bool  # `run` computes what `forward` does and never looks at a number on its way: see graphs.py
    aux_layers: tuple[int, ...]  # decoder layers whose output `forward` also returns
    group: Group | None  # the devices that share its decoder, where that is not one alone
    final_norm: Tensor  # (hidden,) scale of the norm between the last layer and lm_head

    @property
    def num_bytes(self) -> int:
        """Of its weights, as they are held."""
        ...

    def prompt(self, messages: tuple[Message, ...]) -> TokenizedPrompt:
        """Template and tokenise; user text never becomes special tokens. Raises RequestError."""
        ...

    def pieces(self, medium: Medium) -> int:
        """Into how many pieces of equally many visual tokens, none of which looks at another, a medium falls."""
        ...

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        """Features of the visual tokens of pieces first..last: (tokens, hidden)."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: (...,) -> (..., hidden)."""
        ...

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Position ids of the prompt: (axes, tokens) int32, below `max_positions`. Its last token has the same on every
        axis, and generated tokens go on from there."""
        ...

    def forward(self, embeds: Tensor, positions: np.ndarray, rows: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """One pass: embeds (batch, rows, hidden), positions (axes, batch, rows) int32.

        Returns the final hidden states (batch, rows, hidden) and the tapped layers' outputs side by side
        (batch, rows, num_taps * hidden). What they hold in rows that are not real (see AttentionMetadata) does not
        matter.
        """
        ...

    def run(self, embeds: Tensor, positions: Tensor, plan: AttentionTensors) -> tuple[Tensor, Tensor]:
        """`forward` by torch alone, all that it reads being on the device; positions (axes, batch, rows) integers."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """By lm_head: (..., hidden) -> (..., vocab)."""
        ...


def evenly_spaced(num_layers: int, count: int = 3) -> tuple[int, ...]:
    """Early, middle and late decoder layers; of deep ones not the last: its output serves the next token alone."""
    places = (round(num_layers * (i + 1) / (count + 1)) for i in range(count))
    return tuple(dict.fromkeys(min(place, num_layers - 1) for place in places))


def tapped(num_layers: int, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers whose output a target is to offer: those wanted, -1 being the last; None: some, evenly spaced."""
    if wanted is None:
        return evenly_spaced(num_layers)
    if not all(-num_layers <= layer < num_layers for layer in wanted):
        raise ConfigError(f"a draft that reads layers {wanted} is for another target: this one has {num_layers}")
    return tuple(sorted({layer % num_layers for layer in wanted}))
