"""What transformer.cpp offers, as Python sees it: packed matrices and stacks of layers. Knows no model family.

The library is built when FlashServe is installed, once for each kind of processor, and only for x86-64 with AVX512;
without a compiler, or elsewhere, `load` returns None and models run through torch. Its threads and memory are one for
the whole process: not to be called by two threads at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from model.attention import Rows
from model.kv_cache import KVCache
from model.tree import Trees, roots

LANES, K_STEP = 16, 32  # as in product.h
HEAD_DIMS, MAX_PATCH = (16, 32, 64, 80, 96, 128, 256), 32  # as in transformer.cpp
DTYPES = (torch.float32, torch.bfloat16)
# Best first: module, what it needs of the processor, and what it computes in.
BUILDS: tuple[tuple[str, tuple[str, ...], tuple[torch.dtype, ...]], ...] = (
    ("amx", ("amx_tile", "amx_bf16", "avx512_bf16"), DTYPES),
    ("avx512bf16", ("avx512_bf16",), DTYPES),
    ("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl"), (torch.float32,)),
)


@dataclass(frozen=True)
class Library:
    name: str
    functions: ctypes.CDLL
    dtypes: tuple[torch.dtype, ...]


@cache
def load() -> Library | None:
    """The best build for this processor; None where there is none."""
    flags = _processor_flags()
    for name, needed, dtypes in BUILDS:
        spec = find_spec(f"model.native._{name}")
        if spec is None or spec.origin is None or not flags.issuperset(needed):
            continue
        functions = ctypes.CDLL(spec.origin)
        functions.flash_begin.restype = ctypes.c_bool
        functions.flash_tree_seconds.restype = ctypes.c_double
        if functions.flash_begin(1):
            return Library(name, functions, dtypes)
    return None


def _processor_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as info:
            line = next((line for line in info if line.startswith("flags")), "")
    except OSError:
        line = ""
    return frozenset(line.partition(":")[2].split())


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether stacks of this type can run natively here."""
    library = load()
    return library is not None and device.type == "cpu" and dtype in library.dtypes


def use_threads(number: int) -> None:
    """So many threads from now on, the caller's included."""
    library = load()
    if library is not None:
        library.functions.flash_begin(number)


def share_cores(yes: bool) -> None:
    """Whether the threads offer their cores to other processes between any two stages of a pass.

    It costs a few percent where nobody wants them. Where others do, and give way (see service/cores.py), it spares
    the pass from being interrupted in the middle of a task, for which all other threads would have to wait.
    """
    library = load()
    if library is not None:
        library.functions.flash_share_cores(yes)


@contextmanager
def alone() -> Iterator[None]:
    """Torch's own threads stay out of the way: after each operation they spin for a while, on cores that ours need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def functions() -> ctypes.CDLL:
    library = load()
    assert library is not None, "supports() was not asked"
    return library.functions


def pointer(array: Tensor | np.ndarray | None, dtype: type = np.int32) -> int | None:
    if array is None:
        return None
    if isinstance(array, Tensor):
        assert array.is_contiguous()
        return array.data_ptr()
    assert array.flags.c_contiguous
    assert array.dtype == dtype, f"the library would misread {array.dtype}"
    if array.size and array.flags.writeable:  # a third of the time that numpy's own way takes, many times a step
        return ctypes.addressof(ctypes.c_char.from_buffer(cast("Any", array)))
    return int(array.ctypes.data)


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def _filled_up(bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    filled = torch.zeros(_up(outputs, LANES), dtype=dtype)
    filled[:outputs] = bias.detach()
    return filled


class Matrix:
    """A linear layer, packed: (..., inputs) -> (..., outputs). A row's bits do not depend on the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().contiguous()
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        self.bias = _filled_up(bias, self.outputs, weight.dtype)
        self.packed = torch.empty(_up(self.outputs, LANES) * _up(self.inputs, K_STEP), dtype=weight.dtype)
        functions().flash_pack(
            ctypes.c_bool(self.dtype is torch.bfloat16),
            ctypes.c_void_p(weight.data_ptr()),
            self.inputs,
            self.outputs,
            ctypes.c_void_p(self.packed.data_ptr()),
        )

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype is self.dtype
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        functions().flash_linear(
            ctypes.c_bool(self.dtype is torch.bfloat16),
            ctypes.c_void_p(x.data_ptr()),
            x.numel() // self.inputs,
            self.inputs,
            self.outputs,
            ctypes.c_void_p(self.packed.data_ptr()),
            ctypes.c_void_p(pointer(self.bias)),
            ctypes.c_void_p(y.data_ptr()),
        )
        return y


def patches(pictures: np.ndarray, patch: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures (images, height, width, 3) uint8 cut into patches: (images, patches, 3 * patch * patch), the numbers of
    each by channel, y and x, as a convolution has its weights. table: (3, 256) float32, what a byte stands for."""
    images, height, width, _ = pictures.shape
    assert patch <= MAX_PATCH
    pictures, table = np.ascontiguousarray(pictures), table.contiguous()
    assert table.dtype is torch.float32
    cut = torch.empty(images, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)
    functions().flash_patches(
        ctypes.c_bool(dtype is torch.bfloat16),
        ctypes.c_void_p(pointer(pictures, np.uint8)),
        images,
        height,
        width,
        patch,
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_void_p(cut.data_ptr()),
    )
    return cut


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


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "norm1 norm1_bias qkv qkv_bias q_norm k_norm out out_bias norm2 norm2_bias up up_bias down down_bias"
        ).split()
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "num_layers hidden heads kv_heads head_dim intermediate".split()),
        *((n, ctypes.c_int32) for n in "norm activation num_taps".split()),
        *((n, ctypes.c_float) for n in "eps scale".split()),
        *((n, ctypes.c_void_p) for n in "layers cos sin axes taps final_norm final_bias".split()),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "batch rows first_slot sight".split()),
        *((n, ctypes.c_void_p) for n in "starts counts parents positions cache".split()),
        *((n, ctypes.c_int64) for n in "layer_stride values_stride slot_stride head_stride".split()),
    ]


class Stack:
    """Transformer layers in one call. Weights are packed; what was given can be let go."""

    def __init__(
        self,
        shape: Shape,
        layers: Seq[LayerWeights],
        *,
        rotary: Rotary | None = None,
        final_norm: Norm | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        assert shape.fits
        self.shape, self.num_layers, self.num_taps = shape, len(layers), len(taps)
        self.dtype = layers[0].qkv.dtype
        self._kept: list[object] = []  # whatever the library holds pointers to
        described = (_Layer * len(layers))(*(self._packed(layer) for layer in layers))
        self.struct = _Stack(
            num_layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=_up(shape.intermediate, K_STEP),
            norm=("rms", "layer").index(shape.norm),
            activation=("silu", "quick_gelu", "gelu", "gelu_pytorch_tanh").index(shape.activation),
            num_taps=len(taps),
            eps=shape.eps,
            scale=shape.head_dim**-0.5,
            layers=ctypes.cast(described, ctypes.c_void_p),
            cos=self._keep(rotary.cos if rotary else None),
            sin=self._keep(rotary.sin if rotary else None),
            axes=self._keep(np.ascontiguousarray(rotary.axes, np.int32) if rotary else None),
            taps=self._keep(np.array(taps, np.int32)),
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
        width = _up(self.shape.intermediate, K_STEP)
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

    def described(self, rows: Rows, positions: np.ndarray | None) -> _Rows:
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
            rows.sight,
            at,
            at + size * batch,
            None if rows.parents is None else at + size * (len(together) - rows.parents.size),
            None if positions is None else at + size * 2 * batch,
            cache.address,
            *cache.strides,
        )
        described.kept = together
        return described

    def forward(self, embeds: Tensor, positions: np.ndarray | None, rows: Rows) -> tuple[Tensor, Tensor]:
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

    def hold(self, context: Tensor, positions: np.ndarray | None, rows: Rows) -> None:
        """Only write every layer's keys and values of context (batch, rows, hidden)."""
        assert context.dtype is self.dtype is rows.cache.data.dtype
        context = context.contiguous()
        functions().flash_hold(
            ctypes.c_bool(self.dtype is torch.bfloat16),
            ctypes.byref(self.struct),
            ctypes.byref(self.described(rows, positions)),
            ctypes.c_void_p(context.data_ptr()),
        )


class _Draft(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "block vocab width rank".split()),
        *((n, ctypes.c_void_p) for n in "logits before after".split()),
    ]


class TreeArrays(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int32) for n in "batch rows".split()),
        *((n, ctypes.c_void_p) for n in "budgets tokens sizes parents depths scores".split()),
    ]

    @classmethod
    def of(cls, trees: Trees, budgets: np.ndarray) -> TreeArrays:
        """Trees of roots alone, to be grown to at most budgets (batch,) int64 nodes beside them."""
        return cls(
            batch=len(budgets),
            rows=trees.rows,
            budgets=pointer(budgets, np.int64),
            tokens=pointer(trees.tokens, np.int64),
            sizes=pointer(trees.sizes, np.int64),
            parents=pointer(trees.parents),
            depths=pointer(trees.depths),
            scores=pointer(trees.scores, np.float64),
        )


MAX_WIDTH = 16  # as in candidates.h


class Candidates:
    """`model.tree.best_first` in one call. The sequential head, or None: before (vocab, rank), after rank -> vocab."""

    STRUCT = _Draft

    def __init__(self, width: int, before: Tensor | None, after: Matrix | None) -> None:
        assert 1 <= width <= MAX_WIDTH
        self.width, self._before, self._after = width, before, after

    def struct(self, *, block: int, vocab: int, logits: Tensor | None = None) -> _Draft:
        return _Draft(
            block=block,
            vocab=vocab,
            width=min(self.width, vocab),
            rank=0 if self._before is None else self._before.shape[1],
            logits=pointer(logits),
            before=pointer(self._before),
            after=None if self._after is None else self._after.packed.data_ptr(),
        )

    def grow(self, logits: Tensor, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """logits: (batch, block, vocab); newest, budgets: (batch,) int64."""
        _, block, vocab = logits.shape
        logits = logits.contiguous()
        budgets = np.minimum(budgets, block * self.width)
        trees = roots(newest, 1 + int(budgets.max(initial=0)))
        draft, arrays = self.struct(block=block, vocab=vocab, logits=logits), TreeArrays.of(trees, budgets)
        bfloat16 = ctypes.c_bool(logits.dtype is torch.bfloat16)
        functions().flash_grow(bfloat16, ctypes.byref(draft), ctypes.byref(arrays))
        return trees


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
