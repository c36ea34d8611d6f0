"""Test the GPU kernels. Without a GPU they run in Triton's interpreter, which tests/conftest.py enables."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind, attend
from model.backends.kernels import choice
from model.backends.kernels.choice import TreeAttention
from model.backends.kv_cache import KVCache, uniform
from model.backends.native import library
from model.engine.engine import Engine
from tests.model import tiny
from tests.model.oracle import with_oracle
from tests.model.test_attention import random_tree
from tests.model.test_equality import mixed

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernel() -> TreeAttention:
    pytest.importorskip("triton")
    from model.backends.kernels.tree_attention import tree_attention

    return tree_attention


def torchs(plan: AttentionTensors, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    assert plan.cache.data.dtype == torch.float64, "too precise for the kernel, so torch attends"
    return attend(plan, 0, queries, keys, values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rows", "lengths"),
    [
        (2, 2, 16, 1, (0, 17, 3)),
        (2, 2, 16, 11, (63, 64, 255)),
        (4, 2, 24, 1, (300, 0, 256)),
        (4, 2, 24, 11, (0, 17, 255)),
        (7, 1, 64, 5, (300, 0, 256)),
    ],
)
def test_it_attends_as_torch_does(
    kernel: TreeAttention, heads: int, kv_heads: int, dim: int, rows: int, lengths: tuple[int, ...]
) -> None:
    """Lengths are near the ends of blocks and spans; rows beyond a slot's length are NaN and must not be read."""
    torch.manual_seed(rows + heads)
    rng = np.random.default_rng(rows)
    kv = KVCache(
        layers=uniform(1, kv_heads, dim), num_slots=3, capacity=320, margin=16,
        dtype=torch.float64, device=DEVICE,
    )  # fmt: skip
    kv.data.copy_(torch.randn(kv.data.shape))
    starts = np.array(lengths, np.int32)
    parents = random_tree(rng, 3, rows).parents if rows > 3 else np.full((3, rows), -1)
    plan = AttentionMetadata(kv, 0, rows, starts, np.full(3, rows, np.int32), MaskKind.TREE, parents).plan
    queries, keys, values = (torch.randn(3, n, rows, dim, device=DEVICE).double() for n in (heads, kv_heads, kv_heads))
    expected = torchs(plan, queries, keys, values)
    both = kv.data[0].float()
    for slot, length in enumerate(lengths):
        both[:, slot, :, length + rows :] = float("nan")
    found = kernel(queries.float(), both[0], both[1], plan.starts, plan.visible, None)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    rotated = queries.float().transpose(1, 2).contiguous().transpose(1, 2)  # the strides that models pass
    assert torch.equal(kernel(rotated, both[0], both[1], plan.starts, plan.visible, None), found)
    spread = torch.stack((plan.starts, plan.starts + 1), 1)[:, 0]  # not contiguous, as in graphs
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


@pytest.mark.slow
def test_an_engine_says_the_same_with_it(
    kernel: TreeAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs in passes of target and draft, and in graphs, which then need no shape for each number of keys.

    The model has few layers, because an interpreted kernel takes a thousand times as long.
    """
    checkpoint = tiny.save_checkpoint(tmp_path / "target", kv_heads=1, layers=2)
    draft = tiny.save_draft(tmp_path / "draft", checkpoint, num_layers=1)
    monkeypatch.setattr(library, "load", lambda: None)
    settings = {"draft": str(draft), "max_num_seqs": 2, "device": DEVICE.type, "graphs": True, "max_nodes": 3}
    requests = [r for r in mixed() if r.params.max_tokens <= 8][:3]
    monkeypatch.setattr(choice, "tree_attention", lambda *_: None)
    plain = Engine(tiny.config(checkpoint, **settings))
    expected = tiny.answers(plain, requests)
    calls = []

    def listening(*given: Tensor | float | None) -> Tensor:
        calls.append(given)
        return kernel(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "tree_attention", lambda *_: listening)
    engine = Engine(tiny.config(checkpoint, **settings))
    ahead = tiny.replays(engine).shapes
    assert {shape.keys for shape in ahead} == {engine.cache.stride}
    assert tiny.answers(engine, requests) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, requests) == expected
    assert calls
    assert tiny.replays(engine).shapes == ahead, "something was recorded while somebody waited"


def test_it_compiles_for_an_h100_that_is_not_here() -> None:
    """The compiler needs no GPU: it produces machine code within the shared memory of a block."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.model.compile_kernel", "bf16"]
    # A process of its own, because Triton compiles nothing in interpreter mode.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert set(kernels) == {"_attend_to_span", "_join_spans"}
    for kernel in kernels.values():
        assert kernel["code_bytes"]
        assert kernel["shared_bytes"] <= 160 << 10, "an A100 has 163 KiB"
    assert kernels["_attend_to_span"]["tensor_cores"]


def test_without_a_gpu_torch_attends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choice.tree_attention(torch.float32, 64, torch.device("cpu")) is None
    assert not caplog.records
