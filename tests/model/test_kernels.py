"""Kernels for GPUs. Without one, where Triton is installed: `TRITON_INTERPRET=1 pytest tests/model/test_kernels.py`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import Plan, Rows, Sight, attend
from model.engine import Engine
from model.kernels import choice
from model.kernels.choice import TreeAttention
from model.kv_cache import KVCache
from model.native import library
from tests.model import tiny
from tests.model.oracle import with_oracle
from tests.model.test_attention import random_tree
from tests.model.test_equality import mixed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernel() -> TreeAttention:
    pytest.importorskip("triton")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton was not told before its first import to interpret: TRITON_INTERPRET=1")
    from model.kernels.tree_attention import tree_attention

    return tree_attention


def torchs(plan: Plan, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    assert plan.cache.data.dtype == torch.float64, "too precise for the kernel, so torch attends"
    return attend(plan, 0, queries, keys, values)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (6, 3, 24), (7, 1, 64)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("lengths", [(0, 17, 3), (63, 64, 255), (600, 0, 256)])
def test_it_attends_as_torch_does(
    kernel: TreeAttention, heads: int, kv_heads: int, dim: int, rows: int, lengths: tuple[int, ...]
) -> None:
    """Lengths around the ends of blocks and spans; what lies behind a slot's rows is poison, and must not be read."""
    torch.manual_seed(rows + heads)
    rng = np.random.default_rng(rows)
    kv = KVCache(
        num_layers=1, num_slots=3, num_heads=kv_heads, head_dim=dim, capacity=640, margin=16,
        dtype=torch.float64, device=DEVICE,
    )  # fmt: skip
    kv.data.copy_(torch.randn(kv.data.shape))
    starts = np.array(lengths, np.int32)
    parents = random_tree(rng, 3, rows).parents if rows > 3 else np.full((3, rows), -1)
    plan = Rows(kv, 0, rows, starts, np.full(3, rows, np.int32), Sight.TREE, parents).plan
    queries, keys, values = (torch.randn(3, n, rows, dim, device=DEVICE).double() for n in (heads, kv_heads, kv_heads))
    expected = torchs(plan, queries, keys, values)
    both = kv.data[0].float()
    for slot, length in enumerate(lengths):
        both[:, slot, :, length + rows :] = float("nan")
    found = kernel(queries.float(), both[0], both[1], plan.starts, plan.visible, None)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    rotated = queries.float().transpose(1, 2).contiguous().transpose(1, 2)  # as models hand them over
    assert torch.equal(kernel(rotated, both[0], both[1], plan.starts, plan.visible, None), found)
    spread = torch.stack((plan.starts, plan.starts + 1), 1)[:, 0]  # not one after the other, as in graphs
    assert torch.equal(kernel(rotated, both[0], both[1], spread, plan.visible, None), found)
    alone = kernel(queries[1:2].float(), both[0, 1:2], both[1, 1:2], plan.starts[1:2], plan.visible[1:2], None)
    assert torch.equal(alone, found[1:2]), "what a slot gets depends on the others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_trial_before_use_tells_right_from_wrong(kernel: TreeAttention, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    assert choice.disagreement(kernel, dtype, 64, DEVICE) <= choice.TOLERANCE[dtype]

    def forgetful(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, visible: Tensor, scale: float | None) -> Tensor:
        return kernel(q, k, v, starts, visible.clone().fill_(True), scale)

    assert choice.disagreement(forgetful, dtype, 64, DEVICE) > choice.TOLERANCE[dtype]


def test_an_engine_says_the_same_with_it(
    kernel: TreeAttention, tiny_gqa_checkpoint: Path, tiny_gqa_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the target's passes and the draft's, and in graphs, which then need no shapes for the number of keys."""
    monkeypatch.setattr(library, "load", lambda: None)
    settings = {"draft": str(tiny_gqa_draft), "max_num_seqs": 3, "device": DEVICE.type, "graphs": True}
    requests = [r for r in mixed() if r.params.max_tokens <= 16][:4]
    monkeypatch.setattr(choice, "tree_attention", lambda *_: None)
    plain = Engine(tiny.config(tiny_gqa_checkpoint, **settings))
    expected = tiny.answers(plain, requests)
    calls = []

    def listening(*given: Tensor | float | None) -> Tensor:
        calls.append(given)
        return kernel(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "tree_attention", lambda *_: listening)
    engine = Engine(tiny.config(tiny_gqa_checkpoint, **settings))
    ahead = tiny.replays(engine).shapes
    assert {shape.keys for shape in ahead} == {engine.cache.stride}
    assert tiny.answers(engine, requests) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, requests) == expected
    assert calls
    assert tiny.replays(engine).shapes == ahead, "something was recorded while somebody waited"


class Started:
    """In place of a kernel: the options that it is started with."""

    def __init__(self) -> None:
        self.options: dict[str, int] = {}

    def __getitem__(self, _grid: tuple[int, ...]) -> Self:
        return self

    def __call__(self, *_given: object, **options: int) -> None:
        self.options = options


@pytest.mark.parametrize(("dtype", "number"), [("bf16", "*bf16"), ("fp32", "*fp32")])
def test_it_compiles_for_an_h100_that_is_not_here(dtype: str, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the very machine code, as it is started, within the shared memory of a block: the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("what is interpreted is not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.kernels import tree_attention as own

    floats = dict.fromkeys(("parts", "tops", "totals"), "*fp32")
    types = {**dict.fromkeys(("q", "k", "v", "out"), number), **floats, "starts": "*i64", "visible": "*u8"}
    types["scale"] = "fp32"
    constants = {"KV_HEADS": 4, "SPAN": own.SPAN, "BLOCK_M": 64, "BLOCK_N": own.BLOCK_N, "BLOCK_D": 128}
    functions = {own._attend_to_span: Started(), own._join_spans: Started()}
    with monkeypatch.context() as patched:
        for function, started in functions.items():
            patched.setattr(own, function.__name__, started)
        some = torch.zeros(1, 4, 5, 128)
        own.tree_attention(some, some, some, torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, 5, dtype=torch.bool))
    for function, started in functions.items():
        names = function.arg_names
        known = {name: constants[name] for name in names if name in constants}
        signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
        made = triton.compile(
            ASTSource(function, signature, known),
            target=GPUTarget("cuda", 90, 32),
            options=started.options,
        )
        assert made.asm["cubin"]
        assert made.metadata.shared <= 160 << 10, "an A100 has 163 KiB"
        if function is own._attend_to_span and dtype == "bf16":
            assert "mma" in made.asm["ptx"], "products run on the tensor cores"


def test_without_a_gpu_torch_attends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choice.tree_attention(torch.float32, 64, torch.device("cpu")) is None
    assert not caplog.records
