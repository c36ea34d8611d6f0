"""Describes the FLASH draft to the native library, which then computes a whole step: see native/step.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.linear import Packed, pack
from model.backends.native.candidates import Candidates, Sequential
from model.backends.native.library import PackedLinear, constant
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack
from model.backends.native.step import DraftStep
from model.decoding.tree import FixedTree
from model.drafters.flash.network import DraftNetwork
from model.drafters.layers import rotary_table
from model.targets.base import Target

MAX_TABLE = 1 << 24  # maximum numbers in the table of input embeddings


def native_step(
    target: Target,
    network: DraftNetwork,
    head: PackedLinear | None,
    width: int,
    fixed: FixedTree | None,
    positions: int,
) -> DraftStep | None:
    """Pack the network for the native library, and release its own layers.

    head: the target's lm_head for the draft vocabulary; width: nodes kept at each depth; positions: maximum length of a
    context. Returns None, with nothing changed, if some part of a step cannot run natively.
    """
    if target.verifier is None or head is None or not _fits(target, network, width):
        return None
    stack = _stack(network, positions)
    if stack is None:
        return None
    pack(network)
    return DraftStep(
        stack,
        token_table=_token_table(target, network),
        embeddings=target.verifier.embeddings,
        embedding_scale=target.verifier.embedding_scale,
        masks=network.masks,
        input_norm=network.embed_norm.weight,
        embed=_packed(network.embed),
        feature=_packed(network.feature),
        out=_packed(network.out),
        head=head,
        aux_norms=torch.stack([norm.weight for norm in network.fuse.norms]),  # type: ignore[misc]
        fuse=_packed(network.fuse.linear),
        fuse_norm=network.fuse.norm.weight,
        candidates=_candidates(target, network, width, fixed),
    )


def _fits(target: Target, network: DraftNetwork, width: int) -> bool:
    """Return whether the sizes are within the limits of the native library."""
    config = network.config
    return (
        target.hidden_size % constant("K_STEP") == 0  # rows are stored back to back and read in whole steps
        and width <= constant("MAX_WIDTH")
        and config.block <= constant("MAX_BLOCK")
        and config.sequential_rank <= constant("MAX_RANK")
    )


def _packed(linear: nn.Module) -> PackedLinear:
    """Return the packed weights of a linear layer."""
    assert isinstance(linear, Packed)
    return linear.matrix


def _stack(network: DraftNetwork, positions: int) -> Stack | None:
    """Pack the draft's layers and the final norm; None if the native stack cannot run such layers."""
    config, norm = network.config, network.norm
    shape = Shape(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        eps=1e-6,
    )
    if not shape.runs_natively(norm.weight):
        return None
    layers: list[Any] = list(network.layers)
    half = config.head_dim // 2
    cos, sin = (
        table[0, :, :, half:] for table in rotary_table(config, torch.arange(positions)[None], norm.weight.dtype)
    )
    stack = Stack(
        shape,
        [
            LayerWeights(
                norm1=Norm(layer.attention_norm.weight),
                qkv=torch.cat((layer.q.weight, layer.kv.weight)),
                out=layer.out.weight,
                norm2=Norm(layer.mlp_norm.weight),
                up=layer.gate_up.weight,
                down=layer.down.weight,
            )
            for layer in layers
        ],
        rotary=Rotary(cos, sin, np.zeros(half, np.int32)),
        final_norm=Norm(norm.weight),
    )
    del network.layers[:]
    return stack


@torch.inference_mode()
def _token_table(target: Target, network: DraftNetwork) -> Tensor | None:
    """Compute the draft's input embedding of every token, (vocab, hidden); None if the table would be large."""
    if target.vocab_size * network.config.hidden_size > MAX_TABLE:
        return None
    table: Tensor = network.embed(target.embed(torch.arange(target.vocab_size, device=target.device)))
    return table.clone()


def _candidates(target: Target, network: DraftNetwork, width: int, fixed: FixedTree | None) -> Candidates:
    """Describe to the native library how trees are grown."""
    head, of_target = network.sequential, (target.eos_ids, target.vocab_size)
    if fixed is not None:
        return Candidates(fixed.width, *of_target, fixed=fixed, draft_vocab=network.offered)
    own = None
    if head is not None:
        own = Sequential(head.before.weight, _packed(head.context), _packed(head.state), _packed(head.after))
    return Candidates(width, *of_target, own, draft_vocab=network.offered)
