"""Fits draft trees to grammars: drops what a grammar refuses, writes what it forces, and drafts on behind that.

Trees are proposals only. Whether a node is accepted is decided by the target and the guide's masks (choice.py), so
nothing here can change an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from model.decoding.grammar import Guide, Path
from model.decoding.tree import Trees, roots

MOST_SECONDS = 0.01  # that fitting one tree may take: an ambiguous grammar takes long for every node
SURE = 1e-6  # how much less likely than its parent a forced token counts, so that parents stay before children


class Proposing(Protocol):
    """A drafter; see model/drafters/base.py."""

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Draft a tree for each slot."""
        ...


@runtime_checkable
class Continuing(Protocol):
    """A drafter that can go on behind any path of its latest draft."""

    def best(self, slot: int, path: Path, allowed: np.ndarray, num: int) -> list[tuple[int, float]]:
        """Return the `num` likeliest of the allowed tokens behind a path of the latest draft, each with its natural
        log-probability among those; none if the draft does not reach so far.

        allowed: (vocab,) bool.
        """
        ...


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
) -> Trees:
    """Draft a tree for every slot; fit those of `guided`, by slot, to their grammars.

    admitted(trees, budgets): prunes trees to what is worth verifying; newest, budgets: as for `Round`.
    """
    wanted = budgets.clip(0)
    for slot, each in guided.items():
        if not each.needs_draft:
            wanted[slot] = 0
    if drafter is None or not wanted.any():
        return fit(roots(newest), guided, None)
    return fit(admitted(drafter.propose(newest, wanted), budgets), guided, drafter)


def fit(trees: Trees, guided: Mapping[int, Guided], drafter: object) -> Trees:
    """Return the trees with those of `guided`, by slot, fitted to their grammars.

    drafter: the one that has drafted these trees, None if none has.
    """
    if not guided:
        return trees
    continuing = drafter if isinstance(drafter, Continuing) else None
    fitted = {slot: _Growth(trees, slot, each, continuing) for slot, each in guided.items()}
    for growth in fitted.values():
        growth.take_drafted()
        growth.extend()
    rows = max(int(trees.sizes.max()), *(1 + len(growth.paths) for growth in fitted.values()))
    wide = roots(trees.tokens[:, 0], rows)
    common = min(rows, trees.rows)
    for name in ("tokens", "parents", "depths", "scores"):
        getattr(wide, name)[:, :common] = getattr(trees, name)[:, :common]
    wide.sizes[:] = trees.sizes
    for growth in fitted.values():
        growth.write(wide)
    return wide


class _Growth:
    """One tree while it is fitted. Nodes are known by their paths, and kept in an order that has parents first."""

    def __init__(self, trees: Trees, slot: int, guided: Guided, drafter: Continuing | None) -> None:
        self._trees, self._slot, self._drafter = trees, slot, drafter
        self._guide, self._most = guided.guide, guided.nodes
        self._until = time.perf_counter() + MOST_SECONDS
        self.paths: dict[tuple[int, ...], float] = {}  # of the nodes but the root, with their scores

    def take_drafted(self) -> None:
        """Keep the drafted nodes that the grammar accepts behind their parents."""
        drafted = self._trees.paths(self._slot)
        for row, path in enumerate(map(tuple, drafted)):
            if not row or len(self.paths) == self._most or self._is_late:
                continue
            parent = path[:-1]
            if (not parent or parent in self.paths) and self._guide.accepts(parent, path[-1]):
                self.paths[path] = float(self._trees.scores[self._slot, row])

    def extend(self) -> None:
        """Go on behind the likeliest path: with the text that must come, else with the likeliest allowed tokens."""
        path = self._likeliest()
        while len(self.paths) < self._most and not self._is_late:
            if forced := self._guide.forced(path):
                for token in forced[: self._most - len(self.paths)]:
                    path = self._add(path, token, -SURE)
                continue
            best = self._candidates(path)
            if not best:
                break
            for token, logprob in reversed(best[: self._most - len(self.paths)]):
                longer = self._add(path, token, min(logprob, 0.0) - SURE)
            path = longer

    def write(self, trees: Trees) -> None:
        """Write the nodes into these trees, the likeliest path first: accepted, it needs not be moved."""
        slot, path = self._slot, self._likeliest()
        main = [path[:end] for end in range(1, len(path) + 1)]
        others = [each for each in self.paths if each != path[: len(each)]]
        row_of: dict[tuple[int, ...], int] = {(): 0}
        for row, each in enumerate((*main, *others), 1):
            row_of[each] = row
            trees.tokens[slot, row], trees.parents[slot, row] = each[-1], row_of[each[:-1]]
            trees.depths[slot, row], trees.scores[slot, row] = len(each), self.paths[each]
        size = len(row_of)
        trees.sizes[slot] = size
        trees.tokens[slot, size:] = trees.depths[slot, size:] = trees.scores[slot, size:] = 0
        trees.parents[slot, size:] = -1

    @property
    def _is_late(self) -> bool:
        return time.perf_counter() > self._until

    def _add(self, path: tuple[int, ...], token: int, logprob: float) -> tuple[int, ...]:
        """Add a node behind a path, unless it is there. Returns its path."""
        longer = (*path, token)
        self.paths.setdefault(longer, (self.paths[path] if path else 0.0) + logprob)
        return longer

    def _likeliest(self) -> tuple[int, ...]:
        """Return the path that descends to the likeliest child each time."""
        best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for path, score in self.paths.items():
            if path[:-1] not in best or score > best[path[:-1]][0]:
                best[path[:-1]] = score, path
        path = ()
        while path in best:
            path = best[path][1]
        return path

    def _candidates(self, path: tuple[int, ...]) -> list[tuple[int, float]]:
        """Return the draft's two likeliest tokens behind a path, of those that the grammar allows."""
        if self._drafter is None or (allowed := self._guide.mask(path)) is None:
            return []
        return self._drafter.best(self._slot, path, allowed, 2)
