"""Fits draft trees to grammars: drops what a grammar refuses, writes what it forces, and drafts on behind that.

Trees are proposals only. Whether a node is accepted is decided by the target and the guide's masks (choice.py), so
nothing here can change an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from model.decoding.grammar import Guide
from model.decoding.tree import Trees, roots

MOST_SECONDS = 0.01  # that fitting one tree may take: an ambiguous grammar takes long for every node
SURE = 1e-6  # how much less likely than its parent a forced token counts, so that parents stay before children
ALTERNATIVES = 2  # tokens that are tried where the grammar has cut a draft


class Proposing(Protocol):
    """A drafter; see model/drafters/base.py."""

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Draft a tree for each slot."""
        ...


@runtime_checkable
class Continuing(Protocol):
    """A drafter that can go on behind any path of its latest draft."""

    def best(self, slot: int, path: Seq[int], allowed: bytes, num: int) -> list[tuple[int, float]]:
        """Return the `num` likeliest of the allowed tokens behind a path of the latest draft, each with its natural
        log-probability among those; none if the draft does not reach so far.

        allowed: a bit for each token, the lowest of a byte first.
        """
        ...


@dataclass(frozen=True)
class Worth:
    """What it is worth to verify a node. seconds: a sequence's share of a round, by its nodes; chance: the probability
    that a node is accepted, by its score."""

    seconds: Seq[float]
    chance: Callable[[float], float]

    def admitted(self, scores: Seq[float]) -> int:
        """Return how many nodes give the most tokens per second, the likeliest first. scores: in descending order."""
        expected, rate, most = 1.0, 1.0 / self.seconds[0], 0
        for num, score in enumerate(scores, 1):
            expected += self.chance(score)
            if expected > rate * self.seconds[num]:
                rate, most = expected / self.seconds[num], num
        return most


@dataclass(frozen=True)
class Guided:
    """A sequence whose answer follows a grammar. nodes: how many draft nodes its tree may have."""

    guide: Guide
    nodes: int

    @property
    def needs_draft(self) -> bool:
        """Return whether there is room for more than the text that must come."""
        return len(self.guide.forced()) < self.nodes


def drafted(
    drafter: Proposing | None,
    admitted: Callable[[Trees, np.ndarray], Trees],
    newest: np.ndarray,
    budgets: np.ndarray,
    guided: Mapping[int, Guided],
    worth: Worth,
) -> Trees:
    """Draft a tree for every slot; fit those of `guided`, by slot, to their grammars.

    admitted(trees, budgets): prunes trees to what is worth verifying; newest, budgets: as for `Round`.
    """
    wanted = budgets.clip(0)
    for slot, each in guided.items():
        if not each.needs_draft:
            wanted[slot] = 0
    if drafter is None or not wanted.any():
        trees, continuing = roots(newest), None
    else:
        trees = admitted(drafter.propose(newest, wanted), budgets)
        continuing = drafter if isinstance(drafter, Continuing) else None
    if not guided:
        return trees
    wide = roots(newest, max(trees.rows, *(1 + each.nodes for each in guided.values())))
    for name in ("tokens", "parents", "depths", "scores"):
        getattr(wide, name)[:, : trees.rows] = getattr(trees, name)
    wide.sizes[:] = trees.sizes
    fit(wide, guided, continuing, worth)
    return wide


def fit(trees: Trees, guided: Mapping[int, Guided], drafter: Continuing | None, worth: Worth) -> None:
    """Fit the trees of `guided`, by slot, to their grammars. They must have rows enough.

    drafter: the one that has drafted these trees, if it can go on.
    """
    for slot, each in guided.items():
        _Fitting(trees, slot, each, drafter, worth).run()


@dataclass(slots=True)
class _Node:
    """A node of the fitted tree. parent: None for a child of the root."""

    token: int
    parent: _Node | None
    depth: int
    score: float
    row: int = 0

    @classmethod
    def behind(cls, parent: _Node | None, token: int, logprob: float) -> _Node:
        """Make a node with its log-probability behind its parent. It is never likelier than that one."""
        logprob = min(logprob, -SURE)
        if parent is None:
            return cls(token, None, 1, logprob)
        return cls(token, parent, parent.depth + 1, parent.score + logprob)


class _Fitting:
    """One tree while it is fitted."""

    def __init__(self, trees: Trees, slot: int, guided: Guided, drafter: Continuing | None, worth: Worth) -> None:
        self._trees, self._slot, self._drafter, self._worth = trees, slot, drafter, worth
        self._guide, self._most = guided.guide, guided.nodes
        self._late = time.perf_counter() + MOST_SECONDS
        self._main, self._sides = list[_Node](), list[_Node]()  # the likeliest path; nodes beside it
        # The drafted tree.
        size = int(trees.sizes[slot])
        self._tokens, self._scores = trees.tokens[slot, :size].tolist(), trees.scores[slot, :size].tolist()
        self._children: dict[int, list[int]] = {}
        for row, parent in enumerate(trees.parents[slot, :size].tolist()):
            self._children.setdefault(parent, []).append(row)

    def run(self) -> None:
        """Grow the tree, and write what is worth verifying."""
        self._grow()
        nodes = (*self._main, *self._sides)
        scores = sorted((node.score for node in nodes), reverse=True)[: self._most]
        num = self._worth.admitted(scores)
        bar = scores[num - 1] if num else 1.0
        self._write([node for node in nodes if node.score >= bar][: self._most])

    def _grow(self) -> None:
        """Go down the draft as far as the grammar allows that. Write what the grammar forces, and where it has cut the
        draft, the likeliest tokens that it allows."""
        place, row = self._guide.copy(), 0  # row: of the drafted tree; -1: beside it
        while len(self._main) < self._most and not place.ended and time.perf_counter() < self._late:
            if forced := place.forced():
                for token in forced[: self._most - len(self._main)]:
                    row = self._step(place, row, token, 0.0)
                continue
            children = self._children.get(row, [])
            if children and place.fitting([self._tokens[children[0]]]):
                before = self._scores[row]
                found = [(self._tokens[child], self._scores[child] - before) for child in children]
                found[1:] = [each for each in found[1:] if place.fitting([each[0]])]
            else:
                found = self._best(place)
            if not found:
                break
            for token, logprob in found[1:]:
                self._branch(place, row, token, logprob)
            row = self._step(place, row, *found[0])
        self._guide.foresee(place)

    def _best(self, place: Guide) -> list[tuple[int, float]]:
        """Return the draft's likeliest tokens behind the likeliest path, of those that the grammar allows."""
        if self._drafter is None or (allowed := place.bits()) is None:
            return []
        path = [node.token for node in self._main]
        return self._drafter.best(self._slot, path, allowed, ALTERNATIVES)

    def _step(self, place: Guide, row: int, token: int, logprob: float) -> int:
        """Add a node to the likeliest path. Returns its row of the drafted tree."""
        parent = self._main[-1] if self._main else None
        self._main.append(_Node.behind(parent, token, logprob))
        place.advance(token)
        return self._child(row, token)

    def _child(self, row: int, token: int) -> int:
        return next((child for child in self._children.get(row, []) if self._tokens[child] == token), -1)

    def _branch(self, place: Guide, row: int, token: int, logprob: float) -> None:
        """Add a node beside the likeliest path, and those that are drafted behind it."""
        parent = self._main[-1] if self._main else None
        branches = [([token], self._child(row, token), _Node.behind(parent, token, logprob))]
        for path, at, node in branches:  # it grows meanwhile
            self._sides.append(node)
            for child in self._children.get(at, []):
                longer = [*path, self._tokens[child]]
                if place.fitting(longer) == len(longer):
                    logprob = self._scores[child] - self._scores[at]
                    branches.append((longer, child, _Node.behind(node, longer[-1], logprob)))

    def _write(self, nodes: Seq[_Node]) -> None:
        """Write nodes into the tree, in this order: the likeliest path comes first, so that it needs not be moved once
        it is accepted."""
        trees, slot, size = self._trees, self._slot, 1 + len(nodes)
        for row, node in enumerate(nodes, 1):
            node.row = row
        trees.tokens[slot, 1:size] = [node.token for node in nodes]
        trees.parents[slot, 1:size] = [node.parent.row if node.parent else 0 for node in nodes]
        trees.depths[slot, 1:size] = [node.depth for node in nodes]
        trees.scores[slot, 1:size] = [node.score for node in nodes]
        trees.sizes[slot] = size
        trees.tokens[slot, size:] = trees.depths[slot, size:] = 0
        trees.parents[slot, size:] = -1
