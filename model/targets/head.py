"""Provides the output head (lm_head) that a target and its draft share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.backends.native import library
from model.backends.native.library import PackedLinear
from model.errors import ConfigError

After = Callable[[Tensor], Tensor]
CLOSE = 2e-2  # largest difference of logits, in the largest of them: rounding in bfloat16


class Head:
    """Applies lm_head, for all tokens or a subset: (..., hidden) -> (..., tokens). Differentiable in `hidden`, since
    drafts are trained through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, after: After | None = None) -> None:
        """Pack the weights if the native library can. weight: (tokens, hidden); bias: (tokens,); after: what the family
        does to the products."""
        self._weight, self._bias, self._after = weight, bias, after
        self.matrix = PackedLinear(weight, bias) if library.supports(weight.dtype, weight.device) else None

    def of(self, tokens: Tensor | None) -> Head:
        """Return a head for these tokens (num,), in their order; None: this head."""
        if tokens is None:
            return self
        return Head(self._weight[tokens], None if self._bias is None else self._bias[tokens], self._after)

    @property
    def like(self) -> Tensor:
        """Return a tensor of its dtype and device."""
        return self._weight

    @property
    def is_matrix(self) -> bool:
        """Return whether logits are the products alone."""
        return self._after is None

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the packed weights, which are stored beside the original ones."""
        return 0 if self.matrix is None else self.matrix.packed.nbytes

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its weights."""
        return self._weight.nbytes + self.packed_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.matrix is None or hidden.requires_grad:  # packed weights have no gradient
            products = F.linear(hidden, self._weight, self._bias)
        else:
            products = self.matrix(hidden)
        return products if self._after is None else self._after(products)


@torch.no_grad()
def matching_head(model: Any, config: Any, head: Head) -> Head:
    """Return the head that computes the logits of a conditional generation model of transformers.

    head: its lm_head. Families scale or cap the products in their outer forward, so that is run on random states and
    compared. Raises ConfigError if it does something else.
    """
    weight = head._weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    outer = copy.copy(model)
    outer._modules = {**model._modules, model.base_model_prefix: _Echo()}
    theirs, products = outer.forward(inputs_embeds=hidden, use_cache=False).logits.float(), head(hidden).float()
    cap = getattr(config, "final_logit_softcapping", None)
    factor = float((theirs * products).sum() / products.square().sum())
    candidates: list[After | None] = [None, _Scale(factor)]
    if cap:
        candidates.append(_Softcap(float(cap)))
    for after in candidates:
        ours = products if after is None else after(products)
        if (ours - theirs).abs().max() <= CLOSE * theirs.abs().max():
            return head if after is None else Head(head._weight, head._bias, after)
    raise ConfigError("its logits follow from hidden states in a way that is not supported")


class _Echo(nn.Module):
    """Stands in for a base model: returns the input embeddings as final hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        """Return `inputs_embeds`."""
        return _EchoOutput(last_hidden_state=inputs_embeds)


class _EchoOutput(BaseModelOutputWithPast):
    """Has every further field that a family's own output has, all None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Scale:
    """Multiplies logits by a factor."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, logits: Tensor) -> Tensor:
        return logits * self._factor


class _Softcap:
    """Caps logits: cap * tanh(logit / cap)."""

    def __init__(self, cap: float) -> None:
        self._cap = cap

    def __call__(self, logits: Tensor) -> Tensor:
        return self._cap * torch.tanh(logits / self._cap)
