"""Runs Qwen2.5-VL's tower in the native stack: patches to features. Nothing is approximated. If a tower is not built as
expected, `tower` returns None, and the model runs through transformers' own layers.

The patches of a frame are stored in merge order: the merge x merge patches of one token side by side, tokens from left
to right and top to bottom. Most layers attend within windows only. There each window is one sequence of a batch; in the
other layers a frame is.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.native import library
from model.backends.native.library import PackedLinear
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack, scratch
from model.targets.packed import is_plain, joined


class WindowTower:
    """Qwen2.5-VL's vision tower in the native stack."""

    def __init__(self, visual: Any, shape: Shape, longest: int) -> None:
        """Pack the tower and release its layers. longest: maximum patches along a side."""
        settings = visual.config
        self.shape, self.merge = shape, int(settings.spatial_merge_size)
        self.window = settings.window_size // settings.spatial_merge_size // settings.patch_size  # tokens along a side
        convolution, merger = visual.patch_embed.proj, visual.merger
        self.patches = PackedLinear(convolution.weight.flatten(1), convolution.bias)
        rotary = _rotary(visual.rotary_pos_emb, shape.head_dim, longest)
        kinds = [index in settings.fullatt_block_indexes for index in range(len(visual.blocks))]
        self.stages: list[tuple[bool, Stack]] = []  # whether its layers look at whole frames
        for whole, run in groupby(range(len(kinds)), kinds.__getitem__):
            indices = list(run)
            last = indices[-1] == len(kinds) - 1
            layers = [_layer(visual.blocks[index]) for index in indices]
            norm = Norm(merger.ln_q.weight) if last else None
            self.stages.append((whole, Stack(shape, layers, rotary=rotary, final_norm=norm)))
        self.first, self.act, self.second = (
            PackedLinear(*_linear(merger.mlp[0])),
            merger.mlp[1],
            PackedLinear(*_linear(merger.mlp[2])),
        )
        visual.blocks = nn.ModuleList()

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the packed weights."""
        packed = sum(matrix.packed.nbytes for matrix in (self.patches, self.first, self.second))
        return packed + sum(stack.num_bytes for _, stack in self.stages)

    def __call__(self, patches: Tensor, down: int, across: int) -> Tensor:
        """Compute features: (frames, down * across, numbers) -> (frames, tokens, hidden of the language model).

        down, across: patches along the height and the width of a frame.
        """
        frames = len(patches)
        x = self.patches(patches)
        for whole, stack in self.stages:
            if whole:
                x = self._looked(stack, x, np.full(frames, down * across, np.int32), places(down, across, self.merge))
                continue
            members, back, sizes = windows(down, across, self.merge, self.window)
            inside = x.index_select(1, members.flatten()).view(frames * len(sizes), -1, self.shape.hidden)
            at = places(down, across, self.merge)[:, members.numpy()].reshape(2, -1, members.shape[1])
            seen = self._looked(stack, inside, np.tile(sizes, frames), np.tile(at, (1, frames, 1)))
            x = seen.view(frames, -1, self.shape.hidden).index_select(1, back)
        merged = x.reshape(frames, -1, self.merge**2 * self.shape.hidden)
        features: Tensor = self.second(self.act(self.first(merged)))
        return features

    def _looked(self, stack: Stack, x: Tensor, counts: np.ndarray, at: np.ndarray) -> Tensor:
        """Run layers over x (batch, rows, hidden), whose first counts (batch,) rows are real. at: rows and columns of
        the patches (2, batch, rows)."""
        batch, num = x.shape[:2]
        cache = scratch(self.shape, batch, num, x.dtype)
        at = np.ascontiguousarray(np.broadcast_to(at.reshape(2, -1, num), (2, batch, num)))
        rows = AttentionMetadata(cache, 0, num, np.zeros(batch, np.int32), counts, MaskKind.FULL)
        return stack.forward(x, at, rows)[0]


@lru_cache(maxsize=64)
def places(down: int, across: int, merge: int) -> np.ndarray:
    """Return row and column of every patch in storage order: (2, patches) int32."""
    grid = np.stack(np.meshgrid(np.arange(down), np.arange(across), indexing="ij"))
    blocks = grid.reshape(2, down // merge, merge, across // merge, merge).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(blocks.reshape(2, -1), np.int32)


@lru_cache(maxsize=64)
def windows(down: int, across: int, merge: int, side: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Find the patches of each window; windows are `side` tokens wide and high, fewer at the right and lower edges.

    Returns the members of each window (windows, most) int64, padded with zeros; the place of each patch among the
    flattened members (patches,) int64; and the sizes of the windows (windows,) int32.
    """
    rows, columns = places(down, across, merge) // (merge * side)
    numbers = rows * -(-across // (merge * side)) + columns
    sizes = np.bincount(numbers).astype(np.int32)
    order = np.argsort(numbers, kind="stable")
    starts = np.cumsum(sizes) - sizes
    at = numbers[order] * sizes.max() + np.arange(len(order)) - starts[numbers[order]]
    members = np.zeros(len(sizes) * sizes.max(), np.int64)
    members[at] = order
    back = np.empty(len(order), np.int64)
    back[order] = at
    return torch.from_numpy(members).view(len(sizes), -1), torch.from_numpy(back), sizes


def tower(visual: Any, longest: int) -> WindowTower | None:
    """Pack the tower for pictures of up to `longest` patches along a side, and release its own layers; None if the
    native stack does not support it."""
    settings, weight = visual.config, visual.patch_embed.proj.weight
    shape = Shape(
        hidden=settings.hidden_size,
        heads=settings.num_heads,
        kv_heads=settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        intermediate=settings.intermediate_size,
        eps=visual.merger.ln_q.variance_epsilon,
    )
    fits = (
        settings.hidden_act == "silu"
        and settings.in_channels == 3
        and shape.head_dim % 4 == 0
        and is_plain(visual)
        and shape.runs_natively(weight)
        and settings.patch_size <= library.constant("MAX_PATCH")
    )
    return WindowTower(visual, shape, longest) if fits else None


def _rotary(embedding: Any, head_dim: int, longest: int) -> Rotary:
    """Build the rotary table. In each half of a head the first places rotate by rows, the others by columns."""
    along = torch.arange(longest, device=embedding.inv_freq.device)
    cos, sin = embedding(along, torch.stack((along, along), -1))
    half = head_dim // 2
    axes = np.repeat(np.arange(2, dtype=np.int32), half // 2)
    return Rotary(cos[None, :, :half], sin[None, :, :half], axes, num_axes=2)


def _linear(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of a linear layer."""
    return layer.weight, layer.bias


def _layer(block: Any) -> LayerWeights:
    """Collect the weights of a tower block."""
    attention, mlp = block.attn, block.mlp
    up = joined(mlp.gate_proj.weight, mlp.up_proj.weight)
    assert up is not None
    return LayerWeights(
        norm1=Norm(block.norm1.weight),
        qkv=attention.qkv.weight,
        qkv_bias=attention.qkv.bias,
        out=attention.proj.weight,
        out_bias=attention.proj.bias,
        norm2=Norm(block.norm2.weight),
        up=up,
        up_bias=joined(mlp.gate_proj.bias, mlp.up_proj.bias),
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )
