"""The native library: which build runs here, its threads, and the smallest things it computes. Knows no model family.

Its builds, one for each kind of processor, are compiled when FlashServe is installed (builds.py); without a compiler,
or elsewhere than on x86-64, `load` returns None and models run through torch. Its threads and memory are one for the
whole process: of two threads that call it, one waits until the other's call is over.

The environment variable FLASH_NATIVE chooses a build, for tests and comparison: `auto` (the default: the best one that
is there and that this processor runs), `off` (torch), or the name of one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model.backends import memory
from model.backends.native.builds import BUILDS, NAMES, Build
from model.backends.native.builds import CHOICE as COMPILED
from model.backends.native.structures import Structure, check_layout, declare
from model.errors import ConfigError

CHOICE = "FLASH_NATIVE"
DTYPES = (torch.float32, torch.bfloat16)  # that every build computes in


@dataclass(frozen=True)
class Library:
    name: str
    functions: ctypes.CDLL
    constants: Mapping[str, int]  # of structures.h, by name


@cache
def load() -> Library | None:
    """Load the build that FLASH_NATIVE chooses, by default the best one that runs here; None where there is none.

    Raises ConfigError where FLASH_NATIVE names no build or one that does not run here, and where a library that would
    run was compiled from other sources than those beside it."""
    choice = _choice()
    if choice not in ("auto", "off", *NAMES):
        raise ConfigError(f"{CHOICE}={choice} is none of auto, off, {', '.join(NAMES)}")
    for build in BUILDS:
        if choice not in ("auto", build.name):
            continue
        if (obstacle := obstacle_to(build)) is None:
            if (found := opened(build, build.path)) is not None:
                return found
            obstacle = "the system does not let this process use what it takes of the processor"
        if choice == build.name:
            raise ConfigError(f"{CHOICE}={choice} does not run: {obstacle}")
    return None


def obstacle_to(build: Build) -> str | None:
    """Say why this build cannot be used here, if so. Raises ConfigError where it was compiled from other sources."""
    if lacking := lacking_features(build):
        return f"this processor lacks {', '.join(lacking)}"
    if not build.path.exists():
        return f"it is not compiled; '{COMPILED}={build.name} make setup' does that"
    if not build.is_current():
        raise ConfigError(
            f"{build.path} was compiled from other sources, or with other flags, than are there now; run 'make setup'"
        )
    return None


def lacking_features(build: Build) -> list[str]:
    """What the build takes of the processor that it does not have."""
    present = torch.cpu.get_capabilities()
    return [name for name in build.features if not present.get(name)]


def opened(build: Build, path: Path) -> Library | None:
    """Load a library that was compiled to `path`; None where the system does not let this process use it."""
    functions = ctypes.CDLL(str(path))
    declare(functions)
    constants = check_layout(functions, Structure.__subclasses__())
    if not functions.flash_begin(1):
        return None
    return Library(build.name, functions, constants)


def name() -> str:
    """The build that is loaded."""
    return _loaded().name


def is_off() -> bool:
    """Whether FLASH_NATIVE asks for torch."""
    return _choice() == "off"


def is_chosen() -> bool:
    """Whether FLASH_NATIVE names a build."""
    return _choice() in NAMES


def _choice() -> str:
    return os.environ.get(CHOICE) or "auto"


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether stacks of this type can run natively here."""
    return device.type == "cpu" and dtype in DTYPES and load() is not None


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
def single_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way: after each operation they spin for a while, on cores that ours need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loaded() -> Library:
    library = load()
    assert library is not None, "there is no native library here: ask supports() first"
    return library


def functions() -> ctypes.CDLL:
    """The library's functions, with their types declared (structures.py)."""
    return _loaded().functions


def constant(name: str) -> int:
    """A constant of structures.h, as the library has it."""
    return _loaded().constants[name]


def pointer(array: Tensor | np.ndarray | None, dtype: type = np.int32) -> int | None:
    """The address of a tensor's numbers, or of an array's of that dtype; None of None."""
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
    filled = torch.zeros(round_up(outputs, constant("LANES")), dtype=dtype)
    filled[:outputs] = bias.detach()
    return filled


class PackedLinear:
    """A linear layer, packed: (..., inputs) -> (..., outputs). A row's bits do not depend on the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().contiguous()
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        self.bias = _filled_up(bias, self.outputs, weight.dtype)
        size = round_up(self.outputs, constant("LANES")) * round_up(self.inputs, constant("K_STEP"))
        self.packed = memory.zeros(size, weight.dtype)
        bfloat16 = self.dtype is torch.bfloat16
        functions().flash_pack(bfloat16, weight.data_ptr(), self.inputs, self.outputs, self.packed.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype is self.dtype
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        functions().flash_linear(
            self.dtype is torch.bfloat16,
            x.data_ptr(),
            x.numel() // self.inputs,
            self.inputs,
            self.outputs,
            self.packed.data_ptr(),
            pointer(self.bias),
            y.data_ptr(),
        )
        return y


def patches(pictures: np.ndarray, patch: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Cut pictures (images, height, width, 3) uint8 into patches: (images, patches, 3 * patch * patch), the numbers of
    each by channel, y and x, as a convolution has its weights. table: (3, 256) float32, what a byte stands for."""
    images, height, width, _ = pictures.shape
    assert patch <= constant("MAX_PATCH")
    pictures, table = np.ascontiguousarray(pictures), table.contiguous()
    assert table.dtype is torch.float32
    cut = torch.empty(images, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)
    functions().flash_patches(
        dtype is torch.bfloat16,
        pointer(pictures, np.uint8),
        images,
        height,
        width,
        patch,
        table.data_ptr(),
        cut.data_ptr(),
    )
    return cut
