"""Builds draft trees: chooses which drafted continuations to verify. Knows logits and probabilities; nothing of targets
or caches.

The root of a tree, row 0, is the newest token. Best-first: the `budget` candidates with the highest cumulative
log-probability are verified. Since a child is never likelier than its parent, they always form a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.transfer import upload

# Budgets of slots that verify no draft nodes, like 0: the slot does not decode; its sequence is not drafted for.
IDLE, PLAIN = -1, -2


@dataclass(slots=True)  # not frozen: a frozen one takes several times as long to create, once per step
class Trees:
    """One draft tree per sequence of a batch, each padded to the same number of rows; row 0 is the root.

    tokens: (batch, rows) int64, the root's is the newest token; parents: (batch, rows) int32, -1 for the root and for
    padding; depths: (batch, rows) int32, 0 for the root; sizes: (batch,), rows in use; scores: (batch, rows) cumulative
    log-probability. A parent always comes before its children.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray

    @property
    def rows(self) -> int:
        """Return the number of rows per tree, padding included."""
        return int(self.tokens.shape[1])

    def paths(self, b: int) -> list[list[int]]:
        """Return the tokens on the path to every row of tree b: without the root's token, with the row's own."""
        size = int(self.sizes[b])
        tokens, parents = self.tokens[b, :size].tolist(), self.parents[b, :size].tolist()
        paths: list[list[int]] = [[]]
        for row in range(1, size):  # a parent comes before its children
            paths.append([*paths[parents[row]], tokens[row]])
        return paths

    def fill(self, other: Trees) -> None:
        """Copy the contents of other trees of the same shape into these arrays."""
        for name in ("tokens", "parents", "depths", "sizes", "scores"):
            getattr(self, name)[...] = getattr(other, name)


def roots(tokens: np.ndarray, rows: int = 1) -> Trees:
    """Build trees that have only a root, for plain decoding. tokens: (batch,), the roots' tokens."""
    batch = len(tokens)
    padded = np.zeros((batch, rows), np.int64)
    padded[:, 0] = tokens
    return Trees(
        padded,
        np.full((batch, rows), -1, np.int32),
        np.zeros((batch, rows), np.int32),
        np.ones(batch, np.int64),
        np.zeros((batch, rows)),
    )


def chains(newest: np.ndarray, coming: Seq[list[int]]) -> Trees:
    """Build trees that are chains: the tokens coming[b] behind root b. newest: (batch,), the roots' tokens."""
    rows = 1 + max(map(len, coming), default=0)
    trees = roots(newest, rows)
    for b, tokens in enumerate(coming):
        size = 1 + len(tokens)
        trees.tokens[b, 1:size] = tokens
        trees.scores[b, 1:size] = -0.05 * np.arange(1, size)  # no probabilities are known: decreases with depth
        trees.parents[b, 1:size] = np.arange(size - 1)
        trees.depths[b, 1:size] = np.arange(1, size)
        trees.sizes[b] = size
    return trees


@dataclass(frozen=True)
class FixedTree:
    """A tree whose shape does not depend on the draft's scores. The best nodes come first, so that any first few are a
    tree too.

    Nodes are counted from 1, the root is 0. Node i + 1 has parent parents[i], and the token of rank ranks[i] at its
    depth.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, children: Mapping[tuple[int, ...], int], depth: int) -> FixedTree:
        """Build the tree, down to `depth`, in which the node at a path of ranks has children[path] children.

        Nodes are sorted by the sum of the ranks on their path, and then by depth.
        """
        every = ((*path, rank) for path, number in children.items() for rank in range(number) if len(path) < depth)
        paths = [(), *sorted(every, key=lambda path: (sum(path), len(path), path))]
        return cls(tuple(paths.index(path[:-1]) for path in paths[1:]), tuple(path[-1] for path in paths[1:]))

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the depth of every node; the root's children have 1."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths[1:])

    @property
    def width(self) -> int:
        """Return how many of the likeliest tokens per depth the tree uses."""
        return 1 + max(self.ranks)


def fill(shape: FixedTree, logits: Tensor, offered: Tensor | None = None) -> Tensor:
    """Fill a fixed tree with tokens: (batch, 3, nodes) int32, as `levels` returns nodes.

    logits: (batch, block, vocab) of one draft pass; offered: see `named`.
    """
    best = logits.float().log_softmax(-1).topk(shape.width, -1)
    places = [(depth - 1) * shape.width + rank for depth, rank in zip(shape.depths, shape.ranks, strict=True)]
    where = upload(np.array(places), logits.device)
    tokens, scores = named(best.indices.flatten(1)[:, where], offered), best.values.flatten(1)[:, where]
    on_path = np.zeros((len(places), len(places)), np.float32)
    for node, parent in enumerate(shape.parents):
        on_path[node] = on_path[parent - 1] if parent else 0.0
        on_path[node, node] = 1.0
    reached = scores @ upload(on_path.T.copy(), logits.device)
    parents = upload(np.array(shape.parents, np.int32), logits.device).expand_as(tokens)
    return torch.stack((tokens.int(), parents, reached.view(torch.int32)), 1)


def planted(newest: np.ndarray, found: np.ndarray, shape: FixedTree, budgets: np.ndarray) -> Trees:
    """Build trees of the first budgets[b] nodes of `fill`, up to the first whose score is not finite.

    newest: (batch,); found: (batch, 3, nodes) int32; budgets: (batch,).
    """
    most = min(int(budgets.max(initial=0)), len(shape.ranks))
    trees = roots(newest, 1 + most)
    trees.tokens[:, 1:], trees.parents[:, 1:] = found[:, 0, :most], found[:, 1, :most]
    trees.depths[:, 1:] = shape.depths[:most]
    trees.scores[:, 1:] = np.ascontiguousarray(found[:, 2, :most]).view(np.float32)
    trees.sizes[:] = 1 + np.minimum(budgets, np.isfinite(trees.scores[:, 1:]).cumprod(1).sum(1))
    beyond = np.arange(1 + most) >= trees.sizes[:, None]
    trees.parents[beyond] = -1
    trees.depths[beyond] = 0
    trees.scores[beyond] = 0.0
    return trees


# A sequential head along the paths of a tree: (depth, tokens (batch, nodes), states (batch, nodes, ..) of their
# parents, None for the roots) -> (their own states, the bias of the logits of the next depth (batch, nodes, vocab)).
Along = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def best_first(
    newest: np.ndarray,
    logits: Tensor,
    head: Along | None,
    ends: Tensor,
    *,
    width: int,
    budgets: np.ndarray,
    offered: Tensor | None = None,
) -> Trees:
    """Build trees of the `budgets[b]` likeliest drafted nodes of each sequence.

    newest: (batch,) int64; the other arguments as for `candidates`. Exactly best-first as long as the budget does not
    reach beyond the `width` best nodes of any depth.
    """
    found = candidates(upload(newest, logits.device), logits, head, ends, width=width, offered=offered)
    return pruned(newest, found.cpu().numpy(), width=width, budgets=budgets)


def candidates(
    newest: Tensor, logits: Tensor, head: Along | None, ends: Tensor, *, width: int, offered: Tensor | None = None
) -> Tensor:
    """Return candidate tree nodes from one draft pass, whose logits (batch, block, vocab) cover all depths.

    `levels` chooses `width` of them at each depth. head: adds a sequential head's bias, None for independent positions;
    ends: (num,) tokens that have no children; offered: (vocab,) target tokens that the logits are for, None for all.
    """
    states: Tensor | None = None

    def scores(depth: int, tokens: Tensor, parents: Tensor) -> Tensor:
        """Return the logits behind the nodes of one depth."""
        nonlocal states
        drafted = logits[:, depth, None, :]
        if head is None:
            return drafted
        if states is not None:
            first = 1 + (depth - 2) * width if depth > 1 else 0  # number of the first node of the parents' level
            states = states.gather(1, (parents - first)[:, :, None].expand(-1, -1, states.shape[2]))
        states, bias = head(depth, tokens, states)
        return drafted + bias

    return levels(newest, scores, ends, depths=logits.shape[1], width=width, offered=offered)


def named(places: Tensor, offered: Tensor | None) -> Tensor:
    """Map places in the draft vocabulary `offered` (num,) to token ids; None: places are ids."""
    return places if offered is None else offered[places]


def levels(
    newest: Tensor,
    scores: Callable[[int, Tensor, Tensor], Tensor],
    ends: Tensor,
    *,
    depths: int,
    width: int,
    offered: Tensor | None = None,
) -> Tensor:
    """Find the `width` likeliest drafted nodes at every depth, among the children of those one depth before.

    newest: (batch,) int64; scores(depth, tokens, parents): returns the logits (batch, nodes or 1, vocab) of the tokens
    that follow the nodes of the depth before, whose tokens and parents are (batch, nodes) each; ends: (num,)
    end-of-sequence tokens. Their children get score -inf, since levels have a fixed size. offered: see `named`.

    Returns (batch, 3, nodes) int32: tokens, parents and the bits of the float32 cumulative log-probabilities, so that
    one transfer brings them to the host. Nodes are numbered level by level after the root, which is 0.
    """
    frontier, place = newest[:, None], torch.full_like(newest[:, None], -1)  # (batch, candidates), and their parents
    reach = torch.zeros(len(newest), 1, device=newest.device)  # their cumulative log-probability
    levels_token, levels_parent, levels_score = [], [], []
    first = 0  # number of the frontier's first node
    for depth in range(depths):
        logs = scores(depth, frontier, place).float().log_softmax(-1)
        best, token = logs.expand(-1, frontier.shape[1], -1).topk(width, -1)
        if depth:
            best = best.masked_fill((frontier[:, :, None] == ends).any(-1, keepdim=True), -torch.inf)
        total = (reach[:, :, None] + best - 1e-6).flatten(1)  # strictly less than the parent's, even for probability 1
        reach, place = total.topk(min(width, total.shape[1]), -1)
        frontier = named(token.flatten(1).gather(1, place), offered)
        place = first + torch.div(place, width, rounding_mode="floor")
        levels_parent.append(place)
        levels_token.append(frontier)
        levels_score.append(reach)
        first = 1 + depth * width
    tokens, parents, reached = (torch.cat(each, 1) for each in (levels_token, levels_parent, levels_score))
    return torch.stack((tokens.int(), parents.int(), reached.view(torch.int32)), 1)


def pruned(newest: np.ndarray, found: np.ndarray, *, width: int, budgets: np.ndarray) -> Trees:
    """Build trees of the best of `candidates`. newest: (batch,); found: (batch, 3, nodes) int32; budgets: (batch,)."""
    tokens, parents, scores = found[:, 0], found[:, 1], np.ascontiguousarray(found[:, 2]).view(np.float32)
    return _pruned(newest, tokens, parents, scores, width, np.minimum(budgets, np.isfinite(scores).sum(1)))


def _pruned(
    newest: np.ndarray, tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray, width: int, budgets: np.ndarray
) -> Trees:
    """Keep each sequence's best nodes and renumber them. In `parents` 0 is the root, and nodes count from 1, `width` a
    level."""
    batch, count = tokens.shape
    rows = 1 + int(budgets.max(initial=0))
    trees = roots(newest, rows)
    order = np.argsort(-scores, axis=1, kind="stable")
    number = np.zeros((batch, count + 1), np.int64)  # old number -> row
    for b in range(batch):
        kept = _likeliest_path_first(np.sort(order[b, : budgets[b]]), parents[b], scores[b])
        size = 1 + len(kept)
        number[b, kept + 1] = np.arange(1, size)
        trees.tokens[b, 1:size] = tokens[b, kept]
        trees.parents[b, 1:size] = number[b, parents[b, kept]]
        trees.depths[b, 1:size] = 1 + kept // width
        trees.scores[b, 1:size] = scores[b, kept]
        trees.sizes[b] = size
    return trees


def _likeliest_path_first(kept: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Reorder nodes so that the likeliest path comes first. If it is accepted, its keys and values need not be
    moved."""
    path: list[int] = []
    parent = 0
    while len(children := kept[parents[kept] == parent]):
        path.append(int(children[np.argmax(scores[children])]))
        parent = path[-1] + 1
    return np.concatenate((np.array(path, np.int64), kept[~np.isin(kept, path)]))


def admitted(trees: Trees, active: int, seconds: np.ndarray, chances: Callable[[np.ndarray], np.ndarray]) -> Trees:
    """Prune trees to the likeliest nodes of all, as many as maximise the expected tokens per second.

    active: sequences that decode in the round, each of which emits one token anyway; seconds[n]: duration of a round
    that verifies n nodes; chances: maps scores to acceptance probabilities.
    """
    real = np.arange(trees.rows) < trees.sizes[:, None]
    real[:, 0] = False
    scores = -np.sort(-trees.scores[real])
    expected = active + np.concatenate(([0.0], np.cumsum(chances(scores))))
    best = int(np.argmax(expected / seconds[: len(expected)]))
    if best == len(scores):
        return trees
    keep = real & (trees.scores >= scores[best - 1]) if best else np.zeros_like(real)
    keep[:, 0] = True
    number = np.cumsum(keep, 1) - 1  # new row numbers; a node is kept only if its parent is
    few = roots(trees.tokens[:, 0], 1 + int(keep[:, 1:].sum(1).max(initial=0)))
    for b in range(len(trees.tokens)):
        kept = np.flatnonzero(keep[b])
        for name in ("tokens", "depths", "scores"):
            getattr(few, name)[b, : len(kept)] = getattr(trees, name)[b, kept]
        few.parents[b, 1 : len(kept)] = number[b, trees.parents[b, kept[1:]]]
        few.sizes[b] = len(kept)
    return few
