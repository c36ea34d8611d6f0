"""Test candidate trees and the walk down them against slow, simple versions."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import KVCache, uniform
from model.config import PAPER_NODES
from model.decoding import verify
from model.decoding.tree import Along, FixedTree, Trees, best_first, fill, planted, roots
from model.drafters.flash.drafter import PAPER_TREE
from model.engine.speculation import SpeculationController

VOCAB = 12
NO_ENDS = torch.tensor((), dtype=torch.int64)


def sequential(seed: int) -> Along:
    """Create a head whose output depends on all tokens of a path and on their order."""
    table = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2

    def step(depth: int, tokens: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        before = torch.zeros_like(tokens) if states is None else states[:, :, 0]
        states = (before * 31 + tokens * 7 + depth) % 97
        return states[:, :, None], table[states]

    return step


def paths_of(trees: Trees, b: int) -> dict[tuple[int, ...], float]:
    """Map every node of tree b, as its path of tokens from the root, to its score."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for row in range(1, int(trees.sizes[b])):
        paths[row] = (*paths[int(trees.parents[b, row])], int(trees.tokens[b, row]))
    return {path: float(trees.scores[b, row]) for row, path in paths.items() if row}


def slow_best_first(
    newest: int, logits: Tensor, head: Along | None, ends: list[int], budget: int
) -> dict[tuple[int, ...], float]:
    """Find the `budget` likeliest paths of at most `block` tokens with a heap over all of them."""
    block = len(logits)

    def children(path: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        if len(path) == block or (path and path[-1] in ends):
            return []
        row = logits[len(path)]
        if head is not None:
            states = None
            for depth, token in enumerate((newest, *path)):
                states, bias = head(depth, torch.tensor([[token]]), states)
            row = row + bias[0, 0]
        return [(-(score + p - 1e-6), (*path, t)) for t, p in enumerate(row.double().log_softmax(-1).tolist())]

    heap, taken = children((), 0.0), dict[tuple[int, ...], float]()
    heapq.heapify(heap)
    while len(taken) < budget and heap:
        score, path = heapq.heappop(heap)
        taken[path] = -score
        for child in children(path, -score):
            heapq.heappush(heap, child)
    return taken


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("ends", [[], [3, 5, 6]], ids=["no ends", "ends"])
def test_the_likeliest_nodes_are_taken(seed: int, with_head: bool, ends: list[int]) -> None:
    """Width 12 is the whole vocabulary, so no candidate is cut off early and the tree must be exact.

    EOS has no children, unless it is the newest token, after which the answer continues.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, VOCAB, generator=generator) * 2.5
    newest = np.array([3, 0, 11])
    head = sequential(seed) if with_head else None
    budgets = np.array([10, 1, 7])
    trees = best_first(newest, logits, head, torch.tensor(ends, dtype=torch.int64), width=VOCAB, budgets=budgets)
    for b in range(3):
        expected = slow_best_first(int(newest[b]), logits[b], head, ends, int(budgets[b]))
        found = paths_of(trees, b)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-4)


def test_width_narrows_the_tree_and_changes_nothing_else() -> None:
    """Width 2 keeps the best chain, and limits each level to two candidates."""
    logits = torch.randn(1, 5, VOCAB, generator=torch.Generator().manual_seed(1))
    trees = best_first(np.array([2]), logits, sequential(1), NO_ENDS, width=2, budgets=np.array([50]))
    assert trees.sizes.tolist() == [11], "a budget beyond what the width holds takes all of it"
    assert np.bincount(trees.depths[0]).tolist() == [1, 2, 2, 2, 2, 2]
    wide = best_first(np.array([2]), logits, sequential(1), NO_ENDS, width=VOCAB, budgets=np.array([1]))
    assert paths_of(wide, 0).keys() <= paths_of(trees, 0).keys()


def test_where_all_that_is_likely_ends_the_tree_is_smaller_than_its_budget() -> None:
    logits = torch.full((1, 4, VOCAB), -50.0)
    logits[0, 0, 7], logits[0, :, 5], logits[0, :, 6] = 1.0, 2.0, 3.0
    trees = best_first(np.array([2]), logits, None, torch.tensor([5, 6]), width=2, budgets=np.array([9]))
    assert paths_of(trees, 0).keys() == {(5,), (6,)}


@pytest.mark.parametrize("seed", range(4))
def test_every_tree_is_a_tree_within_its_budget(seed: int) -> None:
    """Parents precede children, ancestors are complete, siblings differ, padding has no parent; budget 0 is a root."""
    rng = np.random.default_rng(seed)
    logits = torch.randn(6, 5, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    if seed == 3:
        logits[:, :, 0] = 60.0  # certain at every position: child and parent score the same in float32
    budgets = np.array([0, 1, 5, 15, 3, 0])
    newest = rng.integers(0, VOCAB, 6)
    trees = best_first(newest, logits, sequential(seed), NO_ENDS, width=3, budgets=budgets)
    assert trees.sizes.tolist() == (1 + budgets).tolist()
    assert trees.rows == 16
    assert trees.tokens[:, 0].tolist() == newest.tolist()
    for b in range(6):
        size = int(trees.sizes[b])
        assert trees.parents[b, 0] == -1
        for row in range(1, size):
            parent = int(trees.parents[b, row])
            assert 0 <= parent < row
            assert trees.depths[b, row] == trees.depths[b, parent] + 1
            assert trees.scores[b, row] <= trees.scores[b, parent]
        pairs = list(zip(trees.parents[b, 1:size].tolist(), trees.tokens[b, 1:size].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert (trees.parents[b, size:] == -1).all()
        assert (trees.depths[b, size:] == 0).all()


def test_a_row_sees_itself_and_its_ancestors() -> None:
    """It must not attend to siblings or descendants; a padding row attends to itself alone."""
    parents = np.array([[-1, 0, 0, 1, 3, -1]])
    cache = KVCache(
        layers=uniform(1, 1, 1), num_slots=1, capacity=8, margin=0,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    rows = AttentionMetadata(cache, 0, 6, np.zeros(1, np.int32), np.array([5], np.int32), MaskKind.TREE, parents)
    seen = {row: set(np.flatnonzero(rows.visible()[0, row]).tolist()) for row in range(6)}
    assert seen == {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 1, 3}, 4: {0, 1, 3, 4}, 5: {5}}


def test_all_budgets_zero_make_roots() -> None:
    trees = best_first(np.array([4, 5]), torch.randn(2, 3, VOCAB), None, NO_ENDS, width=2, budgets=np.array([0, 0]))
    plain = roots(np.array([4, 5]))
    assert trees.rows == plain.rows == 1
    assert trees.tokens.tolist() == plain.tokens.tolist() == [[4], [5]]


# -- the walk
#
#   row    0      1      2      3      4      5      6
#   token  7      10     20     11     30     12     99 (padding)
#          root - 10 --- 11 --- 12
#               \ 20 --- 30
TREE = Trees(
    np.array([[7, 10, 20, 11, 30, 12, 99]]),
    np.array([[-1, 0, 0, 1, 2, 3, -1]]),
    np.array([[0, 1, 1, 2, 2, 3, 0]]),
    np.array([6]),
    np.zeros((1, 7)),
)


@pytest.mark.parametrize(
    ("chosen", "path", "tokens"),
    [
        ([55, 0, 0, 0, 0, 0, 0], [0], [55]),  # nothing fits: the bonus alone
        ([10, 55, 0, 0, 0, 0, 0], [0, 1], [10, 55]),
        ([10, 11, 0, 12, 0, 55, 0], [0, 1, 3, 5], [10, 11, 12, 55]),  # the whole longest path, and the bonus after it
        ([20, 11, 30, 12, 55, 0, 0], [0, 2, 4], [20, 30, 55]),  # the other branch
        ([11, 11, 11, 11, 11, 11, 0], [0], [11]),  # 11 is drafted, but not there: not accepted
        ([10, 12, 0, 12, 0, 55, 0], [0, 1], [10, 12]),  # first miss: 12 fits one place later and does not count
        ([99, 0, 0, 0, 0, 0, 5], [0], [99]),  # padding is not a child of the root
        ([7, 7, 7, 7, 7, 7, 7], [0], [7]),  # nor is the root its own child
    ],
)
def test_the_walk_descends_while_a_child_carries_the_targets_token(
    chosen: list[int], path: list[int], tokens: list[int]
) -> None:
    """Sample and match: what is emitted is always what the target chose at the node before."""
    verdict = verify.walk(TREE, 0, np.array(chosen))
    assert (verdict.path, verdict.tokens) == (path, tokens)


def test_of_two_children_alike_one_is_followed() -> None:
    """A drafter should not propose equal siblings; if it does, nothing is emitted twice."""
    trees = Trees(
        np.array([[7, 10, 10, 11]]),
        np.array([[-1, 0, 0, 2]]),
        np.array([[0, 1, 1, 2]]),
        np.array([4]),
        np.zeros((1, 4)),
    )
    verdict = verify.walk(trees, 0, np.array([10, 11, 11, 5]))
    assert verdict.tokens[0] == 10
    assert verdict.path in ([0, 1], [0, 2, 3])
    assert len(verdict.tokens) == len(verdict.path)


# -- a fixed tree


def test_a_fixed_trees_first_nodes_are_a_tree_and_its_likeliest_path_comes_first() -> None:
    """Budgets cut it anywhere; if the likeliest path is accepted, no rows need to move."""
    shape = FixedTree.of(PAPER_TREE, 5)
    assert len(shape.ranks) == PAPER_NODES == sum(PAPER_TREE.values())
    assert all(parent <= node for node, parent in enumerate(shape.parents))
    assert shape.ranks[:5] == (0,) * 5
    assert shape.depths[:5] == (1, 2, 3, 4, 5)
    assert [shape.depths.count(depth) for depth in range(1, 6)] == [4, 8, 8, 3, 2]
    siblings = list(zip(shape.parents, shape.ranks, strict=True))
    assert len(set(siblings)) == len(siblings)
    assert set(FixedTree.of(PAPER_TREE, 3).depths) == {1, 2, 3}


def test_a_fixed_tree_is_filled_by_rank_whatever_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 30)
    shape = FixedTree.of(PAPER_TREE, 5)
    newest, budgets = np.array([7, 9]), np.array([25, 6])
    trees = planted(newest, fill(shape, logits).numpy(), shape, budgets)
    assert trees.sizes.tolist() == [26, 7]
    ranked = logits.topk(4, -1).indices
    logs = logits.log_softmax(-1)
    for b in range(2):
        for row in range(1, int(trees.sizes[b])):
            depth, parent = int(trees.depths[b, row]), int(trees.parents[b, row])
            token = int(trees.tokens[b, row])
            assert token == ranked[b, depth - 1, shape.ranks[row - 1]]
            assert trees.depths[b, parent] == depth - 1
            wanted = trees.scores[b, parent] + logs[b, depth - 1, token].item()
            assert trees.scores[b, row] == pytest.approx(wanted, abs=1e-4)
    assert (trees.parents[1, 7:] == -1).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_of_a_fixed_tree_nothing_is_kept_where_the_draft_says_no_number(wrong: float) -> None:
    """NaN scores fit no bin of the acceptance statistics, and would crash the engine."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 30)
    logits[1] = wrong
    shape = FixedTree.of(PAPER_TREE, 5)
    trees = planted(np.array([7, 9]), fill(shape, logits).numpy(), shape, np.array([25, 25]))
    assert trees.sizes.tolist() == [26, 1]
    assert np.isfinite(trees.scores).all()
    SpeculationController(2, 25).saw(trees, [[0, 1], [0]])
