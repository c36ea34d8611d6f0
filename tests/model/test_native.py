"""Test that the native stack computes what torch computes, with bits that do not depend on a row's batch.

So speculation cannot change an answer: verifying a branch of a tree, in any batch, equals decoding its rows one by one.
With another blocking or order of keys, answers would start to differ at near ties. It is one file, since all of these
tests share the layers, caches and builds that are set up here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.backends.attention import AttentionMetadata, MaskKind, attend
from model.backends.kv_cache import KVCache, uniform
from model.backends.native import library
from model.backends.native.builds import BUILDS
from model.backends.native.candidates import Candidates, Sequential
from model.backends.native.library import PackedLinear
from model.backends.native.stack import LayerWeights, Norm, Rotary, Shape, Stack
from model.backends.native.step import Verifier
from model.decoding import tree, verify
from model.decoding.tree import IDLE
from model.drafters.flash.network import DraftConfig, SequentialHead
from model.engine.engine import Engine
from model.engine.native_round import NativeRound
from model.engine.speculation import SpeculationController
from model.engine.stats import Counters
from tests.model import tiny
from tests.model.libraries import every_library

HIDDEN, HEADS, INNER = 128, 4, 112
RUNS = [(build.name, dtype) for build in BUILDS for dtype in library.DTYPES]


@pytest.fixture(params=RUNS, ids=[f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in RUNS])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    name, dtype = request.param
    found = every_library().get(name)
    if found is None:
        pytest.skip(f"no {name} build for this processor")
    monkeypatch.setattr(library, "load", lambda: found)
    library.use_threads(2)
    return dtype


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer(seed: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, clip: bool) -> LayerWeights:
    """Draw weights of about unit gain, so that errors neither vanish nor explode."""
    wide, qkv = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    up = INNER if clip else 2 * INNER
    shapes = {"qkv": (qkv, HIDDEN), "out": (HIDDEN, wide), "up": (up, HIDDEN), "down": (HIDDEN, INNER)}
    weights = {
        name: normal(*size, seed=seed + i, scale=size[1] ** -0.5) for i, (name, size) in enumerate(shapes.items())
    }
    biases = {f"{name}_bias": normal(size[0], seed=seed + 9, scale=0.1) for name, size in shapes.items() if bias}
    shift = normal(HIDDEN, seed=seed + 5, scale=0.1) if clip else None
    norms = {f"norm{i}": Norm(1 + normal(HIDDEN, seed=seed + 6 + i, scale=0.1), shift) for i in (1, 2)}
    return LayerWeights(**weights, **biases, **norms)  # type: ignore[arg-type]


def cast(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    def one(value: object) -> object:
        if isinstance(value, Norm):
            return Norm(value.weight.to(dtype), None if value.bias is None else value.bias.to(dtype))
        return value.to(dtype) if isinstance(value, Tensor) else value

    return LayerWeights(**{name: one(value) for name, value in vars(weights).items()})  # type: ignore[arg-type]


def rotary(head_dim: int, positions: int) -> Rotary:
    half = head_dim // 2
    angle = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return Rotary(cos[None], sin[None], np.zeros(half, np.int32))


def in_torch(
    shape: Shape, layers: list[LayerWeights], turn: Rotary | None, x: Tensor, places: Tensor, rows: AttentionMetadata
):
    """Compute the same layers in plain torch, float64, over a float64 cache."""

    def norm(x: Tensor, n: Norm) -> Tensor:
        if shape.norm == "layer":
            assert n.bias is not None
            return F.layer_norm(x, (shape.hidden,), n.weight.double(), n.bias.double(), shape.eps)
        return F.rms_norm(x, (shape.hidden,), n.weight.double(), shape.eps)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.double(), None if bias is None else bias.double())

    def turned(x: Tensor) -> Tensor:
        if turn is None:
            return x
        cos, sin = (table[0].double()[places][:, None] for table in (turn.cos, turn.sin))
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    sizes = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    for i, weights in enumerate(layers):
        parts = linear(norm(x, weights.norm1), weights.qkv, weights.qkv_bias).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for part in parts)
        mixed = attend(rows.plan, i, turned(q), turned(k), v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, weights.out, weights.out_bias)
        inner = linear(norm(x, weights.norm2), weights.up, weights.up_bias)
        if shape.activation == "silu":
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = inner * torch.sigmoid(1.702 * inner)
        x = x + linear(inner, weights.down, weights.down_bias)
    return x


def cache(shape: Shape, num_slots: int, dtype: torch.dtype, seed: int = 0) -> KVCache:
    made = KVCache(
        layers=uniform(2, shape.kv_heads, shape.head_dim), num_slots=num_slots, capacity=200, margin=56,
        dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    made.data.copy_(normal(*made.data.shape, seed=seed).to(torch.bfloat16))
    return made


def some_tree(rows: int, batch: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([[-1, *(rng.integers(0, row) for row in range(1, rows))] for _ in range(batch)], np.int32)


@pytest.mark.parametrize("mask_kind", list(MaskKind))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "clip"),
    [(4, 4, 32, False), (4, 2, 64, False), (8, 1, 16, False), (2, 2, 80, True), (40, 1, 16, False)],
    ids=["mha", "gqa", "mqa", "clip", "more heads than a block"],
)
def test_it_computes_what_torch_computes(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, clip: bool, mask_kind: MaskKind
) -> None:
    """Compare every kind of layer, mask and length with float64; idle slots are not changed."""
    settings = {"norm": "layer", "activation": "quick_gelu", "gated": False} if clip else {}
    shape = Shape(HIDDEN, heads, kv_heads, head_dim, INNER, 1e-5, **settings)  # type: ignore[arg-type]
    weights = [
        cast(layer(10 * i, heads, kv_heads, head_dim, bias=clip or kv_heads == 2, clip=clip), dtype) for i in (1, 2)
    ]
    turn = None if clip else rotary(head_dim, 300)
    stack = Stack(shape, weights, rotary=turn, aux_layers=(0,))
    starts, rows = np.array([0, 31, 64, 150], np.int32), 21
    counts = np.array([21, 0, 7, 21], np.int32)
    parents = some_tree(rows, 4, seed=3)
    kept = cache(shape, 5, dtype)
    fine = cache(shape, 5, torch.float64)
    x = normal(4, rows, HIDDEN, seed=5).to(dtype)
    if mask_kind is MaskKind.TREE:
        depth = np.zeros_like(parents)
        for row in range(1, rows):
            depth[:, row] = depth[np.arange(4), parents[:, row]] + 1
    else:
        depth = np.tile(np.arange(rows, dtype=np.int32), (4, 1))
    places = (starts[:, None] + depth)[None]
    before = kept.data.clone()
    hidden, aux_hidden_states = stack.forward(
        x, places, AttentionMetadata(kept, 1, rows, starts, counts, mask_kind, parents)
    )
    assert aux_hidden_states.shape == (4, rows, HIDDEN)
    assert torch.equal(kept.data[:, :, 2], before[:, :, 2]), "an idle slot was written to"
    assert torch.equal(kept.data[:, :, 0], before[:, :, 0]), "a slot outside the batch was written to"
    atol, rtol = (2e-5, 1e-5) if dtype is torch.float32 else (0.12, 0.05)
    for b in np.flatnonzero(counts):
        n = int(counts[b])
        one = AttentionMetadata(
            fine, 1 + int(b), n, starts[b : b + 1], counts[b : b + 1], mask_kind, parents[b : b + 1, :n].copy()
        )
        expected = in_torch(
            shape, weights, turn, x[b : b + 1, :n].double(), torch.from_numpy(places[0, b : b + 1, :n]), one
        )
        torch.testing.assert_close(hidden[b, :n].double(), expected[0], atol=atol, rtol=rtol)


def decoded(
    stack: Stack, kept: KVCache, starts: np.ndarray, x: Tensor, depths: np.ndarray, mask_kind: MaskKind, **more
) -> Tensor:
    batch, rows = x.shape[:2]
    counts = np.full(batch, rows, np.int32)
    places = (starts[:, None] + depths)[None].astype(np.int32)
    return stack.forward(x, places, AttentionMetadata(kept, 0, rows, starts, counts, mask_kind, **more))[0]


@pytest.mark.parametrize("held", [0, 17, 30, 31, 32, 95, 130])
def test_a_rows_bits_depend_on_nothing_but_what_it_sees(dtype: torch.dtype, held: int) -> None:
    """A row has the same bits alone, in a batch, in chunks of a prompt, and on a branch of a tree."""
    shape = Shape(HIDDEN, 4, 2, 32, INNER, 1e-5)
    stack = Stack(
        shape, [cast(layer(i, 4, 2, 32, bias=False, clip=False), dtype) for i in (1, 20)], rotary=rotary(32, 300)
    )
    x = normal(1, 40, HIDDEN, seed=2).to(dtype)
    start = np.array([held], np.int32)
    whole = decoded(stack, cache(shape, 1, dtype), start, x, np.arange(40)[None], MaskKind.CAUSAL)

    kept = cache(shape, 1, dtype)
    for row in range(12):  # one by one
        one = decoded(stack, kept, start + row, x[:, row : row + 1], np.zeros((1, 1)), MaskKind.CAUSAL)
        assert torch.equal(one[:, 0], whole[:, row]), f"row {row} alone"

    kept = cache(shape, 1, dtype)
    for first, end in ((0, 1), (1, 18), (18, 37), (37, 40)):  # in chunks
        places = np.arange(end - first)[None]
        part = decoded(stack, kept, start + first, x[:, first:end], places, MaskKind.CAUSAL)
        assert torch.equal(part, whole[:, first:end]), f"rows {first} to {end}"

    kept = cache(shape, 16, dtype, seed=1)  # beside fifteen slots of other lengths
    kept.data[:, :, 3] = cache(shape, 1, dtype).data[:, :, 0]
    starts = np.arange(16, dtype=np.int32) * 9
    starts[3] = held
    crowd = normal(16, 9, HIDDEN, seed=3).to(dtype)  # 144 rows, more than a task of one head takes
    crowd[3] = x[0, :9]
    places = np.tile(np.arange(9), (16, 1))
    assert torch.equal(decoded(stack, kept, starts, crowd, places, MaskKind.CAUSAL)[3], whole[0, :9]), "in a batch"

    # The branch 0-1-4-5-9 of a tree: rows off the branch must not affect it.
    parents = np.array([[-1, 0, 0, 0, 1, 4, 2, 6, 1, 5, 9]], np.int32)
    depths = np.array([[0, 1, 1, 1, 2, 3, 2, 3, 2, 4, 5]])
    branch = [0, 1, 4, 5, 9, 10]
    rows = normal(1, 11, HIDDEN, seed=4).to(dtype)
    rows[0, branch] = x[0, :6]
    grown = decoded(stack, cache(shape, 1, dtype), start, rows, depths, MaskKind.TREE, parents=parents)
    assert torch.equal(grown[0, branch], whole[0, :6]), "on a branch of a tree"


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("payload", [1, 0x80, 0x123, 0x1FF])
def test_no_arithmetic_makes_a_number_of_what_is_none(dtype: torch.dtype, payload: int, rows: int) -> None:
    """Every NaN must stay NaN, or a broken model's answers would look like answers."""
    shape = Shape(HIDDEN, HEADS, HEADS, 32, INNER, 1e-5)
    stack = Stack(shape, [cast(layer(1, HEADS, HEADS, 32, bias=False, clip=False), dtype)])
    starts = np.array([40], np.int32)
    kept = cache(shape, 1, dtype)
    wide = dtype is torch.float32
    bits = kept.data.view(torch.int32 if wide else torch.int16)
    bits[:, 0, :, :, 5] = 0x7FC00000 + payload if wide else 0x7FC0 + payload % 0x40
    hidden = decoded(stack, kept, starts, normal(1, rows, HIDDEN, seed=3).to(dtype), np.arange(rows), MaskKind.CAUSAL)
    assert hidden.isnan().all()


@contextmanager
def two_cores_shared_with_four() -> Iterator[None]:
    """Pin this process's threads to two cores, on which four busy processes compete with them."""
    threads = {int(name): os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task")}
    cores = sorted(os.sched_getaffinity(0))[:2]
    for thread in threads:
        os.sched_setaffinity(thread, cores)
    # With the ordinary policy, whatever this process has: under a real-time one they would never give a core back.
    busy = "import os; os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))\nwhile True: pass"
    greedy = [subprocess.Popen([sys.executable, "-SEc", busy]) for _ in range(4)]
    try:
        yield
    finally:
        for process in greedy:
            process.kill()
            process.wait()
        for thread, allowed in threads.items():
            os.sched_setaffinity(thread, allowed)


@pytest.mark.alone
def test_threads_that_lose_their_cores_change_nothing(dtype: torch.dtype) -> None:
    """Preempted helpers miss the rest of their job and join later ones, of other stages and tasks."""
    shape = Shape(HIDDEN, 4, 2, 32, INNER, 1e-5)
    stack = Stack(
        shape, [cast(layer(i, 4, 2, 32, bias=False, clip=False), dtype) for i in (1, 20)], rotary=rotary(32, 300)
    )
    x, start = normal(1, 40, HIDDEN, seed=2).to(dtype), np.array([9], np.int32)
    matrix = PackedLinear(normal(1000, HIDDEN, seed=1).to(dtype), None)

    def jobs() -> list[Tensor]:
        kept = cache(shape, 1, dtype)
        few, many = (
            decoded(stack, kept, start, x[:, :n], np.arange(n)[None], MaskKind.CAUSAL).clone() for n in (3, 40)
        )
        return [few, matrix(x[0]), many, matrix(x[0, :1])]

    alone = jobs()
    library.share_cores(True)
    try:
        with two_cores_shared_with_four():
            for _ in range(20):
                assert all(torch.equal(one, other) for one, other in zip(jobs(), alone, strict=True))
    finally:
        library.share_cores(False)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (100, 37), (32, 16), (256, 1000)])
def test_a_packed_matrix_is_a_linear_layer(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """Sizes fill no block and have one row or many; again no row's bits depend on the others."""
    weight, bias = normal(outputs, inputs, seed=1).to(dtype), normal(outputs, seed=2).to(dtype)
    x = normal(150, inputs, seed=3).to(dtype)
    matrix = PackedLinear(weight, bias)
    y = matrix(x)
    atol, rtol = (1e-4, 1e-5) if dtype is torch.float32 else (0.1, 0.02)
    torch.testing.assert_close(y.double(), F.linear(x.double(), weight.double(), bias.double()), atol=atol, rtol=rtol)
    for rows in (1, 5, 6, 16, 17, 33):
        assert torch.equal(matrix(x[:rows]), y[:rows])


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("rank", [0, 8, 64])
@pytest.mark.parametrize("ends", [False, True], ids=["no ends", "ends"])
@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some"])
def test_candidates_are_those_of_best_first(dtype: torch.dtype, width: int, rank: int, ends: bool, some: bool) -> None:
    offered = torch.arange(0, 202, 2) if some else None
    logits = normal(3, 5, 101, seed=width, scale=3.0).to(dtype)
    hidden = normal(3, 5, 32, seed=3).to(dtype)
    newest, budgets = np.array([3, 100, 0]), np.array([7, 0, 40])
    exact, head = sequential(rank, vocab=202 if some else 101, dtype=dtype, some=some) if rank else (None, None)
    whole = Candidates(width, (), 202, head, draft_vocab=offered).grow(hidden, logits, newest, budgets)
    # Two end tokens, the root and the likeliest token of the first level: only the latter ends a path.
    ending = {3, int(whole.tokens[2, 1])} if ends else set()
    expected = tree.best_first(
        newest,
        logits.double(),
        exact.along(exact.context(hidden.double())) if exact else None,
        torch.tensor(sorted(ending), dtype=torch.int64),
        width=width,
        budgets=budgets,
        offered=offered,
    )
    grown = Candidates(width, ending, 202, head, draft_vocab=offered).grow(hidden, logits, newest, budgets)
    assert not any(token in ending for path in paths(grown, 2) for token in path[1:-1])
    assert any(token in ending for path in paths(whole, 2) for token in path[1:-1]) == ends
    assert grown.sizes.tolist() == expected.sizes.tolist()
    for b in range(3):
        mine, theirs = paths(grown, b), paths(expected, b)
        assert mine.keys() == theirs.keys()  # in any order: in bfloat16 some are equally likely
        assert list(mine.values()) == pytest.approx([theirs[path] for path in mine], abs=1e-3 if rank == 0 else 0.02)
        for row in range(1, int(grown.sizes[b])):
            assert grown.parents[b, row] < row
            assert grown.depths[b, row] == grown.depths[b, grown.parents[b, row]] + 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fixed", [False, True], ids=["best-first", "fixed"])
def test_where_a_draft_says_no_number_a_tree_ends(dtype: torch.dtype, wrong: float, fixed: bool) -> None:
    """Tokens and scores are used as indices: a NaN or an unwritten entry would end the process."""
    shape = tree.FixedTree.of({(): 2, (0,): 2, (0, 0): 2}, 3)
    candidates = Candidates(2, (), 101, fixed=shape if fixed else None)
    newest, budgets = np.array([3, 4, 5]), np.array([6, 6, 6])
    logits = normal(3, 3, 101, seed=1).to(dtype)
    hidden = normal(3, 3, 32, seed=3).to(dtype)
    whole = candidates.grow(hidden, logits, newest, budgets)
    logits[0], logits[1, 1] = wrong, wrong
    logits[2, 2, 40:] = wrong
    cut = candidates.grow(hidden, logits, newest, budgets)
    if fixed or wrong != torch.inf:
        assert cut.sizes[0] == 1
        assert set(cut.depths[1, 1 : cut.sizes[1]]) == {1}, "what was said before stands"
    for b in range(3):
        real = slice(0, int(cut.sizes[b]))
        assert np.isfinite(cut.scores[b, real]).all()
        assert ((cut.tokens[b, real] >= 0) & (cut.tokens[b, real] < 101)).all()
    assert whole.sizes.tolist() == [7, 7, 7]


@pytest.mark.parametrize("other", ["layers", "matrix", "trees", "packing", "patches"])
def test_threads_that_call_it_at_once_get_what_each_gets_alone(dtype: torch.dtype, other: str) -> None:
    """All calls share the library's threads and memory: without a lock each would overwrite the other's."""
    shape = Shape(HIDDEN, 4, 2, 32, INNER, 1e-5)
    stack = Stack(shape, [cast(layer(1, 4, 2, 32, bias=False, clip=False), dtype)], rotary=rotary(32, 300))
    x, start = normal(1, 40, HIDDEN, seed=2).to(dtype), np.array([9], np.int32)
    wide = normal(300, HIDDEN, seed=1).to(dtype)
    matrix, rows = PackedLinear(wide), normal(50, HIDDEN, seed=4).to(dtype)
    logits, budgets = normal(3, 5, 101, seed=1, scale=3.0).to(dtype), np.array([7, 9, 11])
    pictures, table = np.random.default_rng(1).integers(0, 256, (2, 28, 42, 3), np.uint8), normal(3, 256, seed=1)
    candidates = Candidates(4, (), 101)
    jobs: dict[str, Callable[[], Tensor]] = {
        "layers": lambda: decoded(stack, cache(shape, 1, dtype), start, x, np.arange(40)[None], MaskKind.CAUSAL),
        "matrix": lambda: matrix(rows),
        "trees": lambda: torch.from_numpy(candidates.grow(rows, logits, np.array([3, 4, 5]), budgets).scores),
        "packing": lambda: PackedLinear(wide).packed.clone(),
        "patches": lambda: library.patches(pictures, 14, table, dtype),
    }
    alone = {name: jobs[name]() for name in ("layers", other)}

    def repeat(name: str) -> bool:
        return all(torch.equal(jobs[name](), alone[name]) for _ in range(15))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(repeat, ["layers", other, other]))


class Rounding(SequentialHead):
    """Compute in double, but round states and contexts to `dtype`."""

    dtype = torch.float32

    def forward(self, tokens: Tensor, context: Tensor, states: Tensor | None) -> Tensor:
        return super().forward(tokens, context.to(self.dtype).double(), states).to(self.dtype).double()


def sequential(rank: int, *, vocab: int, dtype: torch.dtype, some: bool = False) -> tuple[SequentialHead, Sequential]:
    """Create a sequential head over hidden states of width 32, exact and packed; `some` halves its vocabulary."""
    shape = DraftConfig(32, 32, vocab, aux_layers=(1,), sequential_rank=rank, vocabulary=vocab // 2 if some else 0)
    exact = Rounding(shape).requires_grad_(False)
    for seed, weight in enumerate(exact.parameters()):
        weight.copy_(normal(*weight.shape, seed=seed, scale=4 / rank**0.5))
    exact.to(dtype).dtype = dtype
    packed = [PackedLinear(linear.weight) for linear in (exact.context, exact.state, exact.after)]
    return exact.double(), Sequential(exact.before.weight.to(dtype), *packed)


def paths(trees: tree.Trees, b: int) -> dict[tuple[int, ...], float]:
    """Map every node, as its path of tokens, to its score."""
    found: dict[tuple[int, ...], float] = {}
    for row in range(int(trees.sizes[b])):
        path: list[int] = []
        at = row
        while at >= 0:
            path.insert(0, int(trees.tokens[b, at]))
            at = int(trees.parents[b, at])
        found[tuple(path)] = float(trees.scores[b, row])
    return found


class Given:
    """Propose the trees that a test passes in."""

    def __init__(self, trees: tree.Trees) -> None:
        self.trees, self.observed = trees, list[list[int]]()

    def propose(self, _newest: np.ndarray, budgets: np.ndarray) -> tree.Trees:
        assert budgets.tolist() == [6, 0, 4], "a slot that idles drafts nothing"
        return self.trees

    def observe(self, _trees: tree.Trees, paths: list[list[int]], _taps: Tensor) -> None:
        self.observed = paths


@pytest.mark.parametrize("vocab", [48, 77])
def test_a_round_in_two_calls_is_a_round_in_its_parts(dtype: torch.dtype, vocab: int) -> None:
    """Logits, aux_hidden_states, choices, the accepted path and the rows it moves, in every layer and head and in no
    other slot."""
    shape = Shape(hidden=HIDDEN, heads=HEADS, kv_heads=2, head_dim=32, intermediate=INNER, eps=1e-6)
    layers = [cast(layer(seed, HEADS, 2, 32, bias=False, clip=False), dtype) for seed in (10, 20)]
    final = Norm((1 + normal(HIDDEN, seed=3, scale=0.1)).to(dtype))
    stack = Stack(shape, layers, rotary=rotary(32, 256), final_norm=final, aux_layers=(0, 1))
    embeddings = normal(vocab, HIDDEN, seed=4).to(dtype)
    weight = normal(vocab, HIDDEN, seed=5, scale=HIDDEN**-0.5).to(dtype)
    weight[vocab // 2 : 2 * (vocab // 2)] = weight[: vocab // 2]  # (nearly) every logit twice
    head = PackedLinear(weight)
    sizes, roots = np.array([7, 1, 5]), np.array([40, 0, 9], np.int32)
    trees = tree.roots(np.zeros(3, np.int64), 7)
    trees.tokens[:] = np.random.default_rng(6).integers(0, vocab, (3, 7))
    trees.parents[:], trees.sizes[:] = some_tree(7, 3, seed=7), sizes
    for row in range(1, 7):
        trees.depths[:, row] = 1 + trees.depths[np.arange(3), trees.parents[:, row]]

    held, expected_cache = cache(shape, 4, dtype), cache(shape, 4, dtype)
    for each in (held, expected_cache):
        each.lengths[:] = array("i", [40, 3, 9, 20])
    starts, counts = np.array([40, 3, 9], np.int32), np.array([7, 0, 5], np.int32)
    rows = AttentionMetadata(expected_cache, 0, 7, starts, counts, MaskKind.TREE, trees.parents)
    places = (roots[:, None] + trees.depths)[None]
    hidden, aux_hidden_states = stack.forward(embeddings[torch.from_numpy(trees.tokens)], places, rows)
    expected = head(hidden)

    drafter = Given(trees)
    now = NativeRound(Verifier(stack, embeddings, head), held, Counters(), SpeculationController(4, 11))
    now.use(drafter)  # type: ignore[arg-type]
    now.newest[:3], now.budgets[:3], now.roots[:3] = trees.tokens[:, 0], [6, IDLE, 4], roots
    seen, chosen, logits = now.draft_and_verify(3, 6)
    assert np.array_equal(seen.parents, trees.parents)
    for b, count in enumerate(counts):
        assert torch.equal(logits[b, :count], expected[b, :count])
        assert chosen[b, :count].tolist() == expected[b, :count].argmax(-1).tolist()
    assert set(chosen[:1].flat) <= {*range(vocab // 2), vocab - 1}, "of equals the first, as torch"

    told = chosen.copy()  # let the target choose the longest branch
    row = int(trees.depths[0].argmax())
    while row:
        told[0, trees.parents[0, row]] = trees.tokens[0, row]
        row = int(trees.parents[0, row])
    verdicts = [verify.walk(trees, b, told[b]) if counts[b] else verify.IDLE for b in range(3)]
    assert verdicts[0].path != list(range(len(verdicts[0].path))), "nothing would have to move"
    assert now.commit(told) == [verdict.tokens for verdict in verdicts]
    assert drafter.observed == [verdict.path for verdict in verdicts]
    assert torch.equal(now._now.aux_hidden_states[0, : counts[0]], aux_hidden_states[0, : counts[0]])
    expected_cache.keep(range(3), drafter.observed)
    assert held.lengths == expected_cache.lengths
    for slot, length in enumerate(held.lengths):
        assert torch.equal(held.data[:, :, slot, :, :length], expected_cache.data[:, :, slot, :, :length])


@pytest.mark.parametrize("patch", [14, 16])
def test_patches_are_what_a_convolution_sees(dtype: torch.dtype, patch: int) -> None:
    """Compare each number: channel, line and column within a patch, then patches in reading order."""
    pictures = np.random.default_rng(patch).integers(0, 256, (2, 2 * patch, 3 * patch, 3), np.uint8)
    table = normal(3, 256, seed=1)
    seen = torch.stack([table[c][torch.from_numpy(pictures[..., c]).long()] for c in range(3)], 1).to(dtype)
    expected = F.unfold(seen.float(), patch, stride=patch).transpose(1, 2)
    assert torch.equal(library.patches(pictures, patch, table, dtype).float(), expected)


def test_what_does_not_fit_runs_through_transformers_own_layers(
    tiny_checkpoint: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, or on another processor or layout, it is slower, and answers stay the same."""
    requests = [tiny.ask(str(i), tiny.image(i), "What is it?", max_tokens=12) for i in range(3)]
    config = tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=4)
    with_it = Engine(config)
    natively = tiny.answers(with_it, requests)
    build = library.load()
    assert with_it.info.backend == (build.name if build else "torch")
    monkeypatch.setattr(library, "load", lambda: None)
    without = Engine(replace(config, dtype="auto"))
    assert without.info.dtype == "float32"
    assert without.info.backend == "torch"
    assert tiny.answers(without, requests) == natively
