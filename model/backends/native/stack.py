"""Stacks of transformer layers, as pass.h computes them: in one call, weights packed. Knows no model family."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata
from model.backends.kv_cache import KVCache
from model.backends.native.library import K_STEP, LANES, Matrix, Mirror, functions, pointer, round_up

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # as in pass.h


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One layer, as torch has it. qkv: (queries, keys and values, hidden); up: for a gated activation, gate and up one
    below the other."""

    norm1: Norm
    qkv: Tensor
    out: Tensor
    norm2: Norm
    up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "quick_gelu", "gelu", "gelu_pytorch_tanh"] = "silu"

    @property
    def weights(self) -> int:
        """Of a layer's matrices."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * (attention + (3 if self.activation == "silu" else 2) * self.intermediate)

    @property
    def fits(self) -> bool:
        return (
            self.head_dim in HEAD_DIMS
            and self.hidden % K_STEP == 0
            and self.heads * self.head_dim % K_STEP == 0
            and self.heads % self.kv_heads == 0
        )


@dataclass(frozen=True)
class Rotary:
    """cos, sin: (positions, head_dim), sin's first half negated; axes: (head_dim,) int32, which axis of the position
    ids turns each place."""

    cos: Tensor
    sin: Tensor
    axes: np.ndarray


class _Layer(Mirror):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "norm1 norm1_bias qkv qkv_bias q_norm k_norm out out_bias norm2 norm2_bias up up_bias down down_bias"
        ).split()
    ]


class _Stack(Mirror):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "num_layers hidden heads kv_heads head_dim intermediate".split()),
        *((n, ctypes.c_int32) for n in "norm activation num_taps".split()),
        *((n, ctypes.c_float) for n in "eps scale".split()),
        *((n, ctypes.c_void_p) for n in "layers cos sin axes taps final_norm final_bias".split()),
    ]


class _Rows(Mirror):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "batch rows first_slot mask_kind".split()),
        *((n, ctypes.c_void_p) for n in "starts counts parents positions cache".split()),
        *((n, ctypes.c_int64) for n in "layer_stride values_stride slot_stride head_stride".split()),
    ]


class Stack:
    """Transformer layers in one call. Weights are packed; what was given can be let go."""

    def __init__(
        self,
        shape: Shape,
        layers: Iterable[LayerWeights],
        *,
        rotary: Rotary | None = None,
        final_norm: Norm | None = None,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        assert shape.fits
        self.shape, self.num_taps = shape, len(aux_layers)
        self._kept: list[object] = []  # whatever the library holds pointers to
        packed = []
        for layer in layers:  # one after the other: whoever makes them as they are asked for holds one at a time
            self.dtype = layer.qkv.dtype
            packed.append(self._packed(layer))
        self.num_layers = len(packed)
        described = (_Layer * len(packed))(*packed)
        self.struct = _Stack(
            num_layers=len(packed),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=round_up(shape.intermediate, K_STEP),
            norm=("rms", "layer").index(shape.norm),
            activation=("silu", "quick_gelu", "gelu", "gelu_pytorch_tanh").index(shape.activation),
            num_taps=len(aux_layers),
            eps=shape.eps,
            scale=shape.head_dim**-0.5,
            layers=ctypes.cast(described, ctypes.c_void_p),
            cos=self._keep(rotary.cos if rotary else None),
            sin=self._keep(rotary.sin if rotary else None),
            axes=self._keep(np.ascontiguousarray(rotary.axes, np.int32) if rotary else None),
            taps=self._keep(np.array(aux_layers, np.int32)),
            final_norm=self._keep(final_norm.weight if final_norm else None),
            final_bias=self._keep(final_norm.bias if final_norm else None),
        )
        self._kept.append(described)

    @property
    def num_bytes(self) -> int:
        """Of all that it keeps: packed weights, norms, tables."""
        return sum(
            one.packed.nbytes if isinstance(one, Matrix) else one.nbytes
            for one in self._kept
            if isinstance(one, Matrix | Tensor | np.ndarray)
        )

    def _keep(self, tensor: Tensor | np.ndarray | None) -> int | None:
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().to(self.dtype).contiguous()
        self._kept.append(tensor)
        return pointer(tensor)

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> tuple[int | None, int | None]:
        matrix = Matrix(weight, bias)
        self._kept.append(matrix)
        return pointer(matrix.packed), pointer(matrix.bias)

    def _packed(self, layer: LayerWeights) -> _Layer:
        width = round_up(self.shape.intermediate, K_STEP)
        up, up_bias = (self._inner(part, width) for part in (layer.up, layer.up_bias))
        assert up is not None
        down = layer.down.new_zeros(layer.down.shape[0], width)
        down[:, : self.shape.intermediate] = layer.down.detach()
        qkv, qkv_bias = self._matrix(layer.qkv, layer.qkv_bias)
        out, out_bias = self._matrix(layer.out, layer.out_bias)
        up_at, up_bias_at = self._matrix(up, up_bias)
        down_at, down_bias = self._matrix(down, layer.down_bias)
        return _Layer(
            norm1=self._keep(layer.norm1.weight),
            norm1_bias=self._keep(layer.norm1.bias),
            qkv=qkv,
            qkv_bias=qkv_bias,
            q_norm=self._keep(layer.q_norm),
            k_norm=self._keep(layer.k_norm),
            out=out,
            out_bias=out_bias,
            norm2=self._keep(layer.norm2.weight),
            norm2_bias=self._keep(layer.norm2.bias),
            up=up_at,
            up_bias=up_bias_at,
            down=down_at,
            down_bias=down_bias,
        )

    def _inner(self, part: Tensor | None, width: int) -> Tensor | None:
        """Filled up to `width`; gate and up in turns of a panel, so that they are computed side by side."""
        if part is None:
            return None
        parts = part.detach().chunk(2) if self.shape.activation == "silu" else (part.detach(),)
        filled = [torch.cat((p, p.new_zeros(width - p.shape[0], *p.shape[1:]))) for p in parts]
        return torch.stack([p.unflatten(0, (-1, LANES)) for p in filled], 1).flatten(0, 2)

    def described(self, rows: AttentionMetadata, positions: np.ndarray | None) -> _Rows:
        """Rows as the library reads them; positions: (axes, batch, rows) int32, or None for those in their slots."""
        parts = [rows.starts, rows.counts]
        if positions is not None:
            parts.append(positions.ravel())
        if rows.parents is not None:
            parts.append(rows.parents.ravel())
        together = np.concatenate(parts)  # one address instead of four: each takes longer than this
        at = pointer(together)
        assert at is not None
        size, batch, num = together.itemsize, rows.batch, rows.num
        cache = rows.cache
        described = _Rows(
            batch,
            num,
            rows.first_slot,
            rows.mask_kind,
            at,
            at + size * batch,
            None if rows.parents is None else at + size * (len(together) - rows.parents.size),
            None if positions is None else at + size * 2 * batch,
            cache.address,
            *cache.strides,
        )
        described.kept = together
        return described

    def forward(self, embeds: Tensor, positions: np.ndarray | None, rows: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """embeds (batch, rows, hidden), positions (axes, batch, rows) int32: final hidden states (batch, rows, hidden),
        and tapped layers' outputs side by side (batch, rows, num_taps * hidden). Rows that are not real stay unset."""
        assert embeds.dtype is self.dtype is rows.cache.data.dtype
        embeds = embeds.contiguous()
        hidden = torch.empty_like(embeds)
        taps = embeds.new_empty(*embeds.shape[:2], self.num_taps * self.shape.hidden)
        functions().flash_forward(
            ctypes.c_bool(self.dtype is torch.bfloat16),
            ctypes.byref(self.struct),
            ctypes.byref(self.described(rows, positions)),
            ctypes.c_void_p(embeds.data_ptr()),
            ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_void_p(taps.data_ptr()),
        )
        return hidden, taps

    def hold(self, context: Tensor, positions: np.ndarray | None, rows: AttentionMetadata) -> None:
        """Only write every layer's keys and values of context (batch, rows, hidden)."""
        assert context.dtype is self.dtype is rows.cache.data.dtype
        context = context.contiguous()
        functions().flash_hold(
            ctypes.c_bool(self.dtype is torch.bfloat16),
            ctypes.byref(self.struct),
            ctypes.byref(self.described(rows, positions)),
            ctypes.c_void_p(context.data_ptr()),
        )


def scratch(shape: Shape, batch: int, positions: int, dtype: torch.dtype) -> KVCache:
    """A cache for a pass that leaves nothing behind: one layer's memory, used by all in turn."""
    return KVCache(
        num_layers=1,
        num_slots=batch,
        num_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        capacity=positions,
        margin=0,
        dtype=dtype,
        device=torch.device("cpu"),
    )
