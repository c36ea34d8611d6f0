"""Test the GPU kernels. Without a GPU they run in Triton's interpreter, which tests/conftest.py enables."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind, attend
from model.backends.kernels import choice
from model.backends.kernels.choice import Options, TreeAttention
from model.backends.kernels.window import Window
from model.backends.kv_cache import KVCache, LayerShape, uniform
from model.backends.native import library
from model.engine.engine import Engine
from tests.model import tiny
from tests.model.oracle import with_oracle
from tests.model.test_attention import random_tree
from tests.model.test_equality import mixed
from tests.model.written_out import Layer, Sequences

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


# -- windows, rings, soft caps, sinks, values narrower than keys


@pytest.fixture
def everywhere(kernel: TreeAttention, monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Let the kernel attend in short spans, and rings be short. Returns the options that it was chosen for."""
    chosen = []

    def choose(*given: Any) -> TreeAttention:
        chosen.append(given[-1])
        return kernel

    monkeypatch.setattr(choice, "tree_attention", choose)
    monkeypatch.setattr("model.backends.kernels.tree_attention.SPAN", 64)
    monkeypatch.setattr("model.backends.kv_cache.REACH", 16)
    return chosen


def test_layers_of_several_kinds_attend_through_it_as_written_out(everywhere: list[Options]) -> None:
    """Prompts go around rings by torch, in long chunks; short ones and trees go through the kernel, also across seams
    and into the margin behind the capacity."""
    layers = [
        Layer(LayerShape(1, 8), heads=2),
        Layer(LayerShape(1, 8, window=20), heads=2, sinks=True),
        None,
        Layer(LayerShape(1, 12, window=5, blocks="whole"), heads=2, values=8, softcap=0.8),
    ]
    sequences = Sequences(layers, num_slots=2, capacity=200, rows=72, dtype=torch.float32, tolerance=1e-5)
    assert sequences.cache.storage(1)[0].ring == 192
    for length in (190, 6):
        sequences.fill(sequences.begin(), length, at_once=72)
    assert set(everywhere) == {Options(), Options(None, True, True, False, True), Options(8, True, True, True, False)}
    sequences.step(5)
    sequences.chunk(1, 5, [-1, 0, 0, 0, -1])
    sequences.fill(0, 198, at_once=5)
    sequences.step(4)
    sequences.step(2, idle=[1])


def test_what_a_window_leaves_behind_is_not_read(kernel: TreeAttention) -> None:
    """It would cost time, and there it is as much as the context. In a ring only what rows see is read, too."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 2000, 16), torch.randn(1, 1, 2000, 16)
    starts, seen, depths = torch.tensor([1500]), torch.eye(3)[None].bool(), torch.tensor([[0, 1, 1]])
    window = Window(70, depths)
    found = kernel(q, k, v, starts, seen, window=window)
    first = (1500 - 69) // 64 * 64
    lost = [x.clone() for x in (k, v)]
    for x in lost:
        x[:, :, :first] = x[:, :, 1503:] = float("nan")
    assert torch.equal(kernel(q, lost[0], lost[1], starts, seen, window=window), found)
    ring = 192
    places = torch.arange(first, 1503) % ring
    around = [torch.full((1, 1, ring + 64, 16), float("nan")) for _ in lost]
    for x, whole in zip(around, (k, v), strict=True):
        x[:, :, places] = whole[:, :, first:1503]
    assert torch.equal(kernel(q, around[0], around[1], starts, seen, window=Window(70, depths, ring, 1990)), found)


@pytest.mark.parametrize("rows", [1, 3])
def test_options_that_change_nothing_change_no_bit(kernel: TreeAttention, rows: int) -> None:
    """So plain layers get what they got before there were others, and a window counts for nothing until it is full."""
    torch.manual_seed(rows)
    q, k, v = torch.randn(2, 2, rows, 16), torch.randn(2, 1, 384, 16), torch.randn(2, 1, 384, 16)
    starts, seen = torch.tensor([300, 3]), torch.ones(rows, rows).tril()[None].bool()
    depths = torch.arange(rows)[None]
    plain = kernel(q, k, v, starts, seen)
    assert torch.equal(kernel(q, k, v, starts, seen, window=Window(305, depths)), plain)
    assert torch.equal(kernel(q, k, v, starts, seen, window=Window(305, depths, 320, 2000)), plain)
    assert torch.equal(kernel(q, k, v, starts, seen, sinks=torch.full((2,), float("-inf"))), plain)
    assert torch.equal(kernel(q, k, v[..., :8], starts, seen), plain[..., :8])
    assert not torch.equal(kernel(q, k, v, starts, seen, window=Window(300, depths)), plain)


ALL = Options(12, True, True, True, True)


@pytest.mark.parametrize("wrong", ["none", "size", "depths", "ring", "softcap", "sinks"])
def test_the_trial_before_use_tries_every_option(kernel: TreeAttention, wrong: str) -> None:
    """A kernel that is right for plain layers may be compiled wrongly for others."""

    def mistaken(*given: Any, **also: Any) -> Tensor:
        window: Window = also["window"]
        if wrong == "size":
            also["window"] = window._replace(size=window.size + 1)
        elif wrong == "depths":
            also["window"] = window._replace(depths=torch.zeros_like(window.depths))
        elif wrong == "ring":
            also["window"] = window._replace(capacity=10000)
        elif wrong in also:
            also[wrong] = None
        return kernel(*given, **also)

    off = choice.disagreement(mistaken, torch.float32, 16, DEVICE, 3, ALL)
    assert (off <= choice.TOLERANCE[torch.float32]) == (wrong == "none")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_on_a_gpu_it_is_believed_for_layers_of_every_kind(dtype: torch.dtype, width: int) -> None:
    for options in (Options(), Options(window=True), Options(window=True, ring=True), Options(softcap=True),
                    Options(sinks=True), ALL):  # fmt: skip
        assert choice.tree_attention(dtype, width, DEVICE, options) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_trial_before_use_tells_right_from_wrong(kernel: TreeAttention, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    assert choice.disagreement(kernel, dtype, 64, DEVICE) <= choice.TOLERANCE[dtype]

    def forgetful(*given: Any, **also: Any) -> Tensor:
        q, k, v, starts, visible, *rest = given
        return kernel(q, k, v, starts, torch.ones_like(visible), *rest, **also)

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

    def listening(*given: Any, **also: Any) -> Tensor:
        calls.append(given)
        return kernel(*given, **also)

    monkeypatch.setattr(choice, "tree_attention", lambda *_: listening)
    engine = Engine(tiny.config(checkpoint, **settings))
    ahead = tiny.replays(engine).shapes
    assert {shape.keys for shape in ahead} == {engine.cache.stride}
    assert tiny.answers(engine, requests) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, requests) == expected
    assert calls
    assert tiny.replays(engine).shapes == ahead, "something was recorded while somebody waited"


@pytest.mark.parametrize("kinds", [["plain", "gemma 3"], pytest.param([], marks=pytest.mark.slow, id="all")], ids=str)
def test_it_compiles_for_an_h100_that_is_not_here(kinds: list[str]) -> None:
    """The compiler needs no GPU: it produces machine code within the shared memory of a block."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.model.compile_kernel", "bf16", *kinds]
    # A process of its own, because Triton compiles nothing in interpreter mode.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(kinds) <= set(found)
    for kind, kernels in found.items():
        assert set(kernels) == {"_attend_to_span", "_join_spans"}
        for kernel in kernels.values():
            assert kernel["code_bytes"]
            assert kernel["shared_bytes"] <= 160 << 10, f"an A100 has 163 KiB: {kind}"
        assert kernels["_attend_to_span"]["tensor_cores"]


def test_without_a_gpu_torch_attends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choice.tree_attention(torch.float32, 64, torch.device("cpu")) is None
    assert not caplog.records
