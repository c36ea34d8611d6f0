"""Compile the attention kernels for an H100 (sm_90) as launches would, and print figures of the code.

python -m tests.model.compile_kernel bf16|fp16|fp32 [KIND...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.backends.kernels import tree_attention as kernels
from model.backends.kernels.window import Window

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.int64: "*i64", torch.uint8: "*u8"} | {dtype: f"*{name}" for name, dtype in DTYPES.items()}
ROWS = 64  # of queries: as many as a kernel ever takes at once


class Launch:
    """Compile a kernel for the arguments that it is launched with, instead of running it."""

    def __init__(self, function: Any, report: dict[str, Any]) -> None:
        self.function, self.report = function, report

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: object, **options: int) -> None:
        known, signature, attributes = {}, {}, {}
        for index, (parameter, argument) in enumerate(zip(self.function.params, arguments, strict=True)):
            if parameter.is_constexpr or argument is None or (type(argument) is int and argument == 1):
                known[(index,)], signature[parameter.name] = argument, "constexpr"
            elif isinstance(argument, Tensor):
                signature[parameter.name] = POINTERS[argument.dtype]
            else:
                signature[parameter.name] = "i32" if isinstance(argument, int) else "fp32"
            aligned = isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)
            if (index,) not in known and aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.function, signature, known, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.report[self.function.__name__] = {
            "code_bytes": len(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
            "tensor_cores": "mma" in compiled.asm["ptx"],
            "spilled": getattr(compiled, "n_spills", None),
        }


def attend(kind: str, dtype: torch.dtype) -> None:
    """Launch the kernels for one kind of layer."""
    width = {"plain": 128, "gemma 3": 256, "gemma 4": 512, "narrow values": 192}.get(kind, 64)
    values = 128 if kind == "narrow values" else width
    starts, depths = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.int64)
    windows = {
        "gemma 2": Window(4096, depths),
        "gemma 3": Window(1024, depths, 2112, 32768),
        "gpt-oss": Window(128, depths, 768, 32768),
    }
    queries, keys, seen = torch.zeros(4, 8, 16, width), torch.zeros(4, 2, 2240, width), torch.ones(4, 16, 16)
    kernels.tree_attention(
        queries.to(dtype),
        keys.to(dtype),
        keys.to(dtype)[..., :values],
        starts,
        seen.bool(),
        window=windows.get(kind),
        softcap=50.0 if kind == "gemma 2" else None,
        sinks=torch.zeros(8, dtype=dtype) if kind == "gpt-oss" else None,
    )


KINDS = ("plain", "gemma 2", "gemma 3", "gemma 4", "gpt-oss", "narrow values")


def main(dtype: str, *kinds: str) -> None:
    """Compile both kernels for every kind, and print code size, shared memory and use of tensor cores as JSON."""
    report: dict[str, dict[str, Any]] = {}
    for kind in kinds or KINDS:
        report[kind] = {}
        with ExitStack() as patches:
            for function in (kernels._attend_to_span, kernels._join_spans):
                launch = Launch(function, report[kind])
                patches.enter_context(mock.patch.object(kernels, function.__name__, launch))
            attend(kind, DTYPES[dtype])
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
