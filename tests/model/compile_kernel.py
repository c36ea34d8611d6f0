"""Compile the attention kernels for an H100 (sm_90) with the options of a launch, and print figures of the code.

python -m tests.model.compile_kernel bf16|fp32
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Self
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.backends.kernels import tree_attention as kernels


class Launch:
    """Replace a kernel and record the options that it is launched with."""

    def __init__(self) -> None:
        self.options: dict[str, int] = {}

    def __getitem__(self, _grid: tuple[int, ...]) -> Self:
        return self

    def __call__(self, *_arguments: object, **options: int) -> None:
        self.options = options


def main(dtype: str) -> None:
    """Compile both kernels for `dtype`, and print code size, shared memory and use of tensor cores as JSON."""
    number = f"*{dtype}"
    floats = dict.fromkeys(("parts", "tops", "totals"), "*fp32")
    types = {**dict.fromkeys(("q", "k", "v", "out"), number), **floats, "starts": "*i64", "visible": "*u8"}
    types["scale"] = "fp32"
    constants = {"KV_HEADS": 4, "SPAN": kernels.SPAN, "BLOCK_M": 64, "BLOCK_N": kernels.BLOCK_N, "BLOCK_D": 128}
    launches = {kernels._attend_to_span: Launch(), kernels._join_spans: Launch()}
    with ExitStack() as patches:
        for function, launch in launches.items():
            patches.enter_context(mock.patch.object(kernels, function.__name__, launch))
        some = torch.zeros(1, 4, 5, 128)
        kernels.tree_attention(
            some, some, some, torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, 5, dtype=torch.bool)
        )
    report = {}
    for function, launch in launches.items():
        names = function.arg_names
        known = {name: constants[name] for name in names if name in constants}
        signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
        source = ASTSource(function, signature, known)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        report[function.__name__] = {
            "code_bytes": len(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
            "tensor_cores": "mma" in compiled.asm["ptx"],
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
