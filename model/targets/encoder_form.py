"""Turns the output of a family's vision encoder into one tensor, which caches keep, and parts of that tensor back into
such an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Outputs of an encoder that a base model reads by token, or not at all.
ENCODER_OUTPUTS = frozenset(
    {"pooler_output", "deepstack_features", "last_hidden_state", "hidden_states", "attentions", "attention_mask"}
)


@dataclass(frozen=True)
class EncoderForm:
    """The form in which a family's base model expects features.

    output: the class of its encoder's output; pooled: the type of its features, one tensor or a list of tensors, None
    without features for the input; layers: one entry for each further set of features, the decoder layer that they are
    added to, None where the family only counts them; width: of the features; rest: further fields of the output, the
    same for every medium.
    """

    output: Any
    pooled: type | None
    layers: tuple[int | None, ...]
    width: int
    rest: Mapping[str, Any]

    @classmethod
    def read(cls, output: Any) -> tuple[EncoderForm, Tensor]:
        """Return the form of an encoder's output, and all its features side by side: (tokens, sets * width)."""
        pooled, layers = output.pooler_output, []
        parts = [] if pooled is None else [_flat(pooled)]
        for each in output.get("deepstack_features") or ():
            layer, rows = each if _numbered(each) else (None, each)
            layers.append(layer)
            parts.append(_flat(rows))
        kind = None if pooled is None else Tensor if isinstance(pooled, Tensor) else list
        rest = {name: value for name, value in output.items() if name not in ENCODER_OUTPUTS and value is not None}
        return cls(type(output), kind, tuple(layers), parts[0].shape[-1], rest), torch.cat(parts, -1)

    def rebuilt(self, features: Tensor) -> Any:
        """Return an encoder's output that has these features, (tokens, sets * width)."""
        sets = list(features.split(self.width, -1))
        fields: dict[str, Any] = {}
        if self.pooled is not None:
            pooled = sets.pop(0)
            fields["pooler_output"] = pooled[None] if self.pooled is Tensor else [pooled]
        if sets:
            fields["deepstack_features"] = [
                [rows] if layer is None else (layer, [rows]) for layer, rows in zip(self.layers, sets, strict=True)
            ]
        return self.output(**fields, **self.rest)

    def nothing(self, like: Tensor) -> Tensor:
        """Return the features of no tokens."""
        return like.new_empty(0, self.width * (len(self.layers) + (self.pooled is not None)))


def _flat(features: Any) -> Tensor:
    """Join the features of several pictures: (tokens, width)."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([_flat(part) for part in features])


def _numbered(each: Any) -> bool:
    """Return whether an entry of deepstack features is a pair of a layer's number and features."""
    return isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], int)
