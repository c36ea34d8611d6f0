"""What trained drafters share: whether and how they run in the native library, what tokens put into their layers, paths
as an index, and the last of what was kept."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.native import library
from model.backends.native.candidates import MAX_WIDTH
from model.backends.native.library import K_STEP
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack
from model.drafters.layers import LayerConfig, rotary_table
from model.targets.base import Target

MAX_TABLE = 1 << 24  # numbers in a table made at load


def steps_natively(target: Target, width: int) -> bool:
    """Whether steps that read the target's hidden states can be native here, with trees of so many nodes a depth."""
    whole = target.hidden_size % K_STEP == 0  # states lie one behind the other, and are read in such steps
    return library.supports(target.dtype, target.device) and whole and width <= MAX_WIDTH


def native_layers(layers: nn.ModuleList, norm: nn.RMSNorm, config: LayerConfig, positions: int) -> Stack | None:
    """Draft layers and the norm behind them in the native stack, where that can run them; released from the list."""
    weight = norm.weight
    shape = Shape(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        eps=1e-6,
    )
    if not (shape.fits and library.supports(weight.dtype, weight.device)):
        return None
    held: list[Any] = list(layers)
    cos, sin = rotary_table(config, torch.arange(positions)[None], weight.dtype)
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
            for layer in held
        ],
        rotary=Rotary(cos[0, 0], sin[0, 0], np.zeros(config.head_dim, np.int32)),
        final_norm=Norm(norm.weight),
    )
    del layers[:]
    return stack


@torch.inference_mode()
def token_table(target: Target, width: int, entry: Callable[[Tensor], Tensor]) -> Tensor | None:
    """`entry` of every token's embedding, (vocab, target_hidden) -> (vocab, width), where a table of it is small."""
    if target.vocab_size * width > MAX_TABLE:
        return None
    return entry(target.embed(torch.arange(target.vocab_size, device=target.device))).clone()


def take_last(held: Tensor, rows: Tensor, counts: Tensor) -> None:
    """held (batch, width) becomes the last of counts (batch,) int64 rows (batch, rows, width), where there are any."""
    last = rows.gather(1, (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
    held.copy_(torch.where(counts[:, None] > 0, last, held))


def exchange_rows(rows: Tensor, one: int, other: int) -> None:
    """Exchange two rows of a tensor."""
    kept = rows[one].clone()
    rows[one], rows[other] = rows[other], kept


def exchange_items(by_slot: dict[int, Any], one: int, other: int) -> None:
    """Exchange what a table has for two slots, either of which may be missing."""
    found = {slot: by_slot.pop(slot) for slot in (one, other) if slot in by_slot}
    by_slot.update({one + other - slot: item for slot, item in found.items()})


def indexed(paths: Seq[list[int]]) -> np.ndarray:
    """(batch, longest path) int32; nought behind the end of a shorter one."""
    index = np.zeros((len(paths), max(map(len, paths))), np.int32)
    for b, path in enumerate(paths):
        index[b, : len(path)] = path
    return index
