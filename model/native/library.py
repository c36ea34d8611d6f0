"""The native library: which build runs here, its threads, and the smallest things it computes. Knows no model family.

The library is built when FlashServe is installed, once for each kind of processor, and only for x86-64 with AVX512;
without a compiler, or elsewhere, `load` returns None and models run through torch. Its threads and memory are one for
the whole process: not to be called by two threads at once.

The environment variable FLASH_NATIVE chooses a build, for tests and comparison: `auto` (the default: the best one that
this processor runs), `off` (torch), or the name of one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model import memory
from model.config import ConfigError

CHOICE = "FLASH_NATIVE"
LANES, K_STEP = 16, 32  # as in product.h
MAX_PATCH = 32  # as in pass.h
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
    """Load the build that FLASH_NATIVE chooses, by default the best one for this processor; None where there is none.

    Raises ConfigError where FLASH_NATIVE names no build, or one that does not run here."""
    choice = _choice()
    names = [name for name, _, _ in BUILDS]
    if choice not in ("auto", "off", *names):
        raise ConfigError(f"{CHOICE}={choice} is none of auto, off, {', '.join(names)}")
    flags = processor_flags()
    for name, needed, dtypes in BUILDS:
        if choice not in ("auto", name):
            continue
        spec = find_spec(f"model.native._{name}")
        if spec is None or spec.origin is None or not flags.issuperset(needed):
            continue
        functions = ctypes.CDLL(spec.origin)
        functions.flash_begin.restype = ctypes.c_bool
        if functions.flash_begin(1):
            return Library(name, functions, dtypes)
    if choice in names:
        raise ConfigError(f"{CHOICE}={choice}: this build was not compiled, or this processor does not run it")
    return None


def is_off() -> bool:
    """Whether FLASH_NATIVE asks for torch."""
    return _choice() == "off"


def _choice() -> str:
    return os.environ.get(CHOICE) or "auto"


def processor_flags() -> frozenset[str]:
    """What Linux says that it can; nothing elsewhere."""
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
    """At least so many threads from now on, the caller's included: those that are there stay."""
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


def round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def _filled_up(bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    filled = torch.zeros(round_up(outputs, LANES), dtype=dtype)
    filled[:outputs] = bias.detach()
    return filled


class Matrix:
    """A linear layer, packed: (..., inputs) -> (..., outputs). A row's bits do not depend on the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().contiguous()
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        self.bias = _filled_up(bias, self.outputs, weight.dtype)
        self.packed = memory.empty(round_up(self.outputs, LANES) * round_up(self.inputs, K_STEP), weight.dtype)
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
