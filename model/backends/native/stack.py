"""Stacks of transformer layers, as pass.h computes them: in one call, weights packed. Knows no model family."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import Blocks, KVCache, Storage, uniform
from model.backends.native import library, structures
from model.backends.native.library import PackedLinear, constant, functions, pointer, round_up

# Names of structures.h for what models call theirs.
NORMS = {"rms": "RMS", "rms_plus_one": "RMS_PLUS_ONE", "layer": "LAYER"}
ACTIVATIONS = {
    "silu": "SILU",
    "quick_gelu": "QUICK_GELU",
    "gelu": "GELU",
    "gelu_pytorch_tanh": "GELU_TANH",
}

NO_RING = (1 << 31) - 1  # more than any position


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One layer, as torch has it.

    qkv: (queries, keys and values, hidden); up: for a gated activation, gate and up one below the other; post1, post2:
    norms of what attention and the MLP add to a row, of all layers or of none; window: positions that a row sees, its
    own included, None for all; table: of the rotary tables.
    """

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
    post1: Norm | None = None
    post2: Norm | None = None
    window: int | None = None
    table: int = 0


@dataclass(frozen=True)
class Shape:
    """The shape of all layers of a stack. scale: of attention's scores; None for one over the root of head_dim."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    activation: Literal["silu", "quick_gelu", "gelu", "gelu_pytorch_tanh"] = "silu"
    gated: bool = True
    scale: float | None = None

    @property
    def weights(self) -> int:
        """Of a layer's matrices."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * (attention + (3 if self.gated else 2) * self.intermediate)

    def runs_natively(self, weight: Tensor) -> bool:
        """Whether the library runs such layers, with weights like this one."""
        return (
            library.supports(weight.dtype, weight.device)
            and bool(functions().flash_has_head_dim(self.head_dim))
            and self.hidden % constant("K_STEP") == 0
            and self.heads * self.head_dim % constant("K_STEP") == 0
            and self.heads % self.kv_heads == 0
        )


@dataclass(frozen=True)
class Rotary:
    """The angles by which places i and head_dim / 2 + i of a head are turned.

    cos, sin: (tables, positions, head_dim / 2); axes: (head_dim / 2,) int32, which of num_axes of the position ids
    turns each pair of places.
    """

    cos: Tensor
    sin: Tensor
    axes: np.ndarray
    num_axes: int = 1


class Stack:
    """Transformer layers in one call. Weights are packed; those of `layers` can be released.

    aux_layers: layers whose outputs `forward` also returns, ascending.
    """

    def __init__(
        self,
        shape: Shape,
        layers: Iterable[LayerWeights],
        *,
        rotary: Rotary | None = None,
        final_norm: Norm | None = None,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        self.shape, self.num_aux = shape, len(aux_layers)
        self.num_axes = rotary.num_axes if rotary else 1
        self._kept: list[object] = []  # whatever the library holds pointers to
        packed = []
        for layer in layers:  # one after the other: whoever makes them as they are asked for holds one at a time
            assert shape.runs_natively(layer.qkv)
            self.dtype = layer.qkv.dtype
            packed.append(self._packed(layer))
        self.num_layers = len(packed)
        described = (structures.Layer * len(packed))(*packed)
        self.struct = structures.Stack(
            num_layers=len(packed),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=round_up(shape.intermediate, constant("K_STEP")),
            norm=constant(NORMS[shape.norm]),
            activation=constant(ACTIVATIONS[shape.activation]),
            gated=shape.gated,
            num_aux=len(aux_layers),
            num_tables=len(rotary.cos) if rotary else 0,
            num_positions=rotary.cos.shape[1] if rotary else 0,
            eps=shape.eps,
            scale=shape.head_dim**-0.5 if shape.scale is None else shape.scale,
            layers=described,
            cos=self._keep(rotary.cos if rotary else None),
            sin=self._keep(rotary.sin if rotary else None),
            axes=self._keep(np.ascontiguousarray(rotary.axes, np.int32) if rotary else None),
            aux_layers=self._keep(np.array(aux_layers, np.int32)),
            final_norm=self._keep(final_norm.weight if final_norm else None),
            final_bias=self._keep(final_norm.bias if final_norm else None),
        )
        self._kept.append(described)

    @property
    def num_bytes(self) -> int:
        """Of all that it keeps: packed weights, norms, tables."""
        return sum(
            one.packed.nbytes if isinstance(one, PackedLinear) else one.nbytes
            for one in self._kept
            if isinstance(one, PackedLinear | Tensor | np.ndarray)
        )

    def _keep(self, tensor: Tensor | np.ndarray | None) -> int | None:
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().to(self.dtype).contiguous()
        self._kept.append(tensor)
        return pointer(tensor)

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> tuple[int | None, int | None]:
        matrix = PackedLinear(weight, bias)
        self._kept.append(matrix)
        return pointer(matrix.packed), pointer(matrix.bias)

    def _packed(self, layer: LayerWeights) -> structures.Layer:
        width = round_up(self.shape.intermediate, constant("K_STEP"))
        up, up_bias = (self._inner(part, width) for part in (layer.up, layer.up_bias))
        assert up is not None
        down = layer.down.new_zeros(layer.down.shape[0], width)
        down[:, : self.shape.intermediate] = layer.down.detach()
        qkv, qkv_bias = self._matrix(layer.qkv, layer.qkv_bias)
        out, out_bias = self._matrix(layer.out, layer.out_bias)
        up_at, up_bias_at = self._matrix(up, up_bias)
        down_at, down_bias = self._matrix(down, layer.down_bias)
        return structures.Layer(
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
            post1=self._keep(layer.post1.weight if layer.post1 else None),
            post2=self._keep(layer.post2.weight if layer.post2 else None),
            window=layer.window or 0,
            table=layer.table,
        )

    def _inner(self, part: Tensor | None, width: int) -> Tensor | None:
        """Fill a part up to `width`; gate and up take turns panel by panel, so that they are computed side by side."""
        if part is None:
            return None
        parts = part.detach().chunk(2) if self.shape.gated else (part.detach(),)
        filled = [torch.cat((p, p.new_zeros(width - p.shape[0], *p.shape[1:]))) for p in parts]
        return torch.stack([p.unflatten(0, (-1, constant("LANES"))) for p in filled], 1).flatten(0, 2)

    def described(self, rows: AttentionMetadata, positions: np.ndarray | None) -> structures.Rows:
        """Describe rows for the library; positions: (axes, batch, rows) int32, or None for those in their slots.

        Of more axes than the stack has, the last count; a single one serves for all.
        """
        assert rows.mask_kind is not MaskKind.TREE or rows.num <= 1 + constant("MAX_NODES")
        parts = [rows.starts, rows.counts]
        if positions is not None:
            assert positions.shape[1:] == (rows.batch, rows.num)
            assert len(positions) == 1 or len(positions) >= self.num_axes
            parts += [axis.ravel() for axis in positions[-self.num_axes :]]
            parts += parts[-1:] * (self.num_axes - len(positions))
        ends = [sum(part.size for part in parts)]
        for part in (rows.parents, rows.blocks):
            if part is not None:
                parts.append(part.ravel())
            ends.append(ends[-1] + (0 if part is None else part.size))
        together = np.concatenate(parts)  # one address instead of five: each takes longer than this
        at = pointer(together)
        assert at is not None
        size, batch, num = together.itemsize, rows.batch, rows.num
        described = structures.Rows(
            batch,
            num,
            rows.first_slot,
            constant(rows.mask_kind.name),
            at,
            at + size * batch,
            None if rows.parents is None else at + size * ends[0],
            None if positions is None else at + size * 2 * batch,
            described_cache(rows.cache),
            None if rows.blocks is None else at + size * ends[1],
            whole=rows.blocks is not None and _blocks_of(rows.cache) == "whole",
        )
        described.kept = together
        return described

    def forward(
        self, embeds: Tensor, positions: np.ndarray | None, rows: AttentionMetadata, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers over embeds (batch, rows, hidden), positions (axes, batch, rows) int32.

        added: (layers, batch, rows, hidden), to add to what the first layers return; auxiliary outputs lack it.

        Returns the final hidden states (batch, rows, hidden), and auxiliary layers' outputs side by side (batch, rows,
        num_aux * hidden). AttentionMetadata that are not real stay unset.
        """
        assert embeds.dtype is self.dtype is rows.cache.dtype
        assert embeds.shape == (rows.batch, rows.num, self.shape.hidden)
        embeds = embeds.contiguous()
        hidden = torch.empty_like(embeds)
        aux = embeds.new_empty(*embeds.shape[:2], self.num_aux * self.shape.hidden)
        described = self.described(rows, positions)
        if added is not None:
            assert added.dtype is self.dtype
            assert added.shape[1:] == embeds.shape
            assert len(added) <= self.num_layers
            added = added.contiguous()
            described.added, described.num_added = added.data_ptr(), len(added)
        functions().flash_forward(
            self.dtype is torch.bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(described),
            embeds.data_ptr(),
            hidden.data_ptr(),
            aux.data_ptr(),
        )
        return hidden, aux

    def write_kv(self, context: Tensor, positions: np.ndarray | None, rows: AttentionMetadata) -> None:
        """Only write every layer's keys and values of context (batch, rows, hidden)."""
        assert context.dtype is self.dtype is rows.cache.dtype
        assert context.shape == (rows.batch, rows.num, self.shape.hidden)
        context = context.contiguous()
        functions().flash_write_kv(
            self.dtype is torch.bfloat16,
            ctypes.byref(self.struct),
            ctypes.byref(self.described(rows, positions)),
            context.data_ptr(),
        )


def described_cache(cache: KVCache) -> structures.Cache:
    """Describe a cache for the library; a round also reads, and writes, how many positions each slot holds."""
    lengths = cache.lengths.buffer_info()[0]
    if len(cache.storages) == 1 and not cache.storages[0].wraps:
        return structures.Cache(cache.address, *cache.strides, None, cache.num_slots, cache.stride, lengths)
    if cache not in _LAYERS:
        _LAYERS[cache] = (structures.LayerCache * len(cache.layers))(
            *(_layer_cache(*cache.storage(layer)) for layer in range(len(cache.layers)))
        )
    return structures.Cache(
        layers=_LAYERS[cache], num_slots=cache.num_slots, num_positions=cache.positions, lengths=lengths
    )


_LAYERS: WeakKeyDictionary[KVCache, Any] = WeakKeyDictionary()  # the description of each layer of a cache


def _layer_cache(storage: Storage, layer: int) -> structures.LayerCache:
    """Describe where the keys and values of one layer lie."""
    data = storage.data[layer]
    ring, capacity = (storage.ring, storage.capacity) if storage.wraps else (NO_RING, NO_RING)
    return structures.LayerCache(data.data_ptr(), *data.stride()[:3], ring, capacity)


def _blocks_of(cache: KVCache) -> Blocks:
    """Return what the rows of a block see of each other, which must be the same in all layers of a stack."""
    (blocks,) = {shape.blocks for shape in cache.layers if shape is not None}
    assert blocks is not None
    return blocks


def scratch(shape: Shape, batch: int, positions: int, dtype: torch.dtype) -> KVCache:
    """A cache for a pass that leaves nothing behind: one layer's memory, used by all in turn."""
    return KVCache(
        layers=uniform(1, shape.kv_heads, shape.head_dim),
        num_slots=batch,
        capacity=positions,
        margin=0,
        dtype=dtype,
        device=torch.device("cpu"),
    )
