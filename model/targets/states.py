"""Gives every slot its own state in the layers of a model that carry one from row to row (hybrids: Qwen3.5, LFM2,
Nemotron-H).

Such a layer is found by what its forward does: it stores a state in transformers' cache. The functions that it computes
the state with are replaced by those of model/backends/recurrences.py; all else is the family's own code. Outside of the
passes of model/backends/slot_states.py nothing changes.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from model.backends.recurrences import Convolution, DeltaRule, Rows, SelectiveScan, State
from model.backends.slot_states import SlotStates, passing
from model.errors import ConfigError

# What transformers' functions are replaced by, and which method of its cache says that a layer needs one of them.
KINDS: dict[str, type[Any]] = {
    "causal_conv1d_fn": Convolution,
    "torch_chunk_gated_delta_rule": DeltaRule,
    "mamba2_chunk_scan": SelectiveScan,
}
STORING = {"update_conv_state": {"causal_conv1d_fn"}, "update_recurrent_state": set(KINDS) - {"causal_conv1d_fn"}}


class States:
    """The layers of a language model that carry a state."""

    def __init__(self, layers: list[State]) -> None:
        """Take over layers that have been called once."""
        self._layers = layers

    @classmethod
    def of(cls, language: Any) -> States | None:
        """Find a language model's layers that carry a state, and replace what they compute it with.

        The weights may be on the meta device. Returns None if no layer carries a state; raises ConfigError if one
        cannot be served.
        """
        found = [(module, layers) for module in language.modules() if (layers := _replaced(module))]
        if not found:
            return None
        hidden = torch.zeros(1, 1, language.config.hidden_size, dtype=language.dtype, device=language.device)
        one = Rows(0, 1, 1, False, [[]], None, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=hidden.device))
        for module, layers in found:
            name = type(module).__name__
            try:
                with torch.no_grad(), passing(layers, [None] * len(layers), one):
                    module(hidden)
            except Exception as error:  # whatever the family's own code raises
                raise ConfigError(
                    f"layers of type {name} carry a state and cannot be run alone: {type(error).__name__}: {error}"
                ) from error
            if any(layer.calls != 1 for layer in layers):
                raise ConfigError(f"layers of type {name} compute a state more than once, or not at all")
        return cls([layer for _, layers in found for layer in layers])

    def bytes_per_slot(self, *, saving: bool) -> int:
        """Return the bytes of one slot of a cache. saving: whether states are ever saved."""
        return SlotStates.bytes_per_slot(self._layers, saving=saving)

    def allocate(self, num_slots: int, *, saving: bool) -> SlotStates:
        """Allocate the states of the slots of a cache. saving: whether states are ever saved."""
        return SlotStates(self._layers, num_slots, saving=saving)


def _storing(module: nn.Module) -> set[str]:
    """Return the methods of transformers' cache with which a module's forward stores a state."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(STORING).intersection(code.co_names) if code else set()


def _replaced(module: nn.Module) -> list[State]:
    """Replace the functions that a module computes its state with, if it carries one.

    Raises ConfigError if it computes one with functions that have no replacement.
    """
    methods, layers = _storing(module), []
    forward = inspect.unwrap(type(module).forward)
    for method in methods:
        names = STORING[method].intersection(forward.__code__.co_names).intersection(forward.__globals__)
        if len(names) != 1:
            raise ConfigError(
                f"layers of type {type(module).__name__} carry a state from token to token in a way that is not "
                "supported; gated delta rules, Mamba2 and short convolutions are"
            )
        layers.append((name := names.pop(), KINDS[name](forward.__globals__[name])))
    if layers:
        function = FunctionType(
            forward.__code__,
            forward.__globals__ | dict(layers),
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        function.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(function, module)
    return [layer for _, layer in layers]
