"""Finds out what a decoder's layers store and see, by one pass with a recording attention function.

Reads no weights' values, so it also works on the meta device, before a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from model.backends.attention import NAME as KV_SLOTS
from model.backends.attention import unsupported
from model.backends.kv_cache import LayerShape
from model.errors import ConfigError

RECORDING = "shape_probe"
ROWS = 3  # of the recorded pass


@dataclass(frozen=True)
class _Call:
    """One call of the attention function."""

    layer: int
    shape: LayerShape
    rows: int  # of its keys


class _Recorder:
    """Keeps the calls of a pass."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Record a call, and return zeros in the shape of a result."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ConfigError(f"its attention ({type(module).__name__}) does not say which layer it belongs to")
        if problem := unsupported(attention_mask, options):
            raise ConfigError(f"its attention {problem}")
        width = max(key.shape[-1], value.shape[-1])
        shape = LayerShape(key.shape[1], width, options.get("sliding_window"))
        self.calls.append(_Call(int(layer), shape, key.shape[2]))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@contextmanager
def attention(language: Any, name: str) -> Iterator[None]:
    """Let a language model use another attention function for a while."""
    before = language.config._attn_implementation
    language.set_attn_implementation(name)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


@torch.no_grad()
def layer_shapes(model: Any, language: Any, num_layers: int) -> list[LayerShape | None]:
    """Return what each decoder layer of a conditional generation model stores; None for a layer without attention.

    Raises ConfigError if its attention needs what ours does not have.
    """
    recorder = _Recorder()
    AttentionInterface.register(RECORDING, recorder)
    device = next(language.parameters()).device
    ids = torch.arange(ROWS, device=device)[None]
    positions = model._prepare_position_ids_for_generation(ids, {})
    try:
        with attention(language, RECORDING):
            model.base_model(input_ids=ids, position_ids=positions.to(device), use_cache=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever its own code raises
        raise ConfigError(f"transformers' own forward fails: {type(error).__name__}: {error}") from error
    shapes: list[LayerShape | None] = [None] * num_layers
    for call in recorder.calls:
        if call.rows != ROWS:
            raise ConfigError(f"layer {call.layer} attends to keys of its own making")
        if call.layer >= num_layers or shapes[call.layer] not in (None, call.shape):
            raise ConfigError(f"layer {call.layer} attends more than once")
        shapes[call.layer] = call.shape
    if not recorder.calls:
        raise ConfigError(f"none of its layers uses transformers' attention interface, so {KV_SLOTS} cannot serve it")
    return shapes
