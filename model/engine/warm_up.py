"""Times rounds over an empty KV cache when an engine starts, so that the speculation controller (speculation.py) knows
their cost before the first request."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Seq
from itertools import product

import numpy as np
from torch import Tensor

from model.backends.kv_cache import KVCache
from model.decoding import tree
from model.decoding.tree import Trees
from model.engine.round import Round
from model.engine.speculation import SpeculationController

SECONDS = 0.4  # limit on the whole warm-up; combinations not timed by then are interpolated
CONTEXT = 256  # tokens of context that each sequence pretends to have
ATTEMPTS = 3  # rounds per combination, of which the quickest counts


class Chains:
    """Stands in for a drafter that can propose nothing for sequences it does not know."""

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Propose a chain of budgets[b] arbitrary tokens behind each root."""
        return tree.chains(newest, [[0] * int(budget) for budget in budgets])

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:  # noqa: ARG002
        """Raise AssertionError: warm-up rounds commit nothing."""
        raise AssertionError("nothing is accepted in a rehearsal")


def warm_up(now: Round, load: SpeculationController, caches: list[KVCache]) -> None:
    """Time rounds of several batch sizes and numbers of nodes, and teach the results to the controller.

    caches: the KV caches that rounds read. All their slots must be free, and are free afterwards. Takes about SECONDS;
    combinations that are not timed by then are interpolated.
    """
    until, length = time.perf_counter() + SECONDS, min(CONTEXT, caches[0].capacity // 2)

    def timed(batch: int, nodes: int) -> float:
        """Return the seconds of the quickest of ATTEMPTS rounds."""
        for cache in caches:
            cache.lengths[:batch] = array("i", [length] * batch)
        now.newest[:batch], now.budgets[:batch], now.roots[:batch] = 0, nodes, length
        seconds = []
        for _ in range(ATTEMPTS):
            begun = time.perf_counter()
            _, likeliest, logits = now.draft_and_verify(batch, nodes)
            if likeliest is None:
                logits[0, 0].argmax().item()  # waits until a GPU has finished
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    batches, places = np.array(load.batches), np.array(load.places)
    plain, drafting = np.full(len(batches), np.nan), np.full((len(batches), len(places)), np.nan)
    corners = list(product((0, len(batches) - 1), (0, len(places) - 1)))
    timed(1, load.nodes)  # the very first one is slow
    for i, j in (*corners, *product(range(len(batches)), (0, len(places) - 1)), *np.ndindex(drafting.shape)):
        if (i, j) not in corners and time.perf_counter() > until:
            break
        if np.isnan(plain[i]):
            plain[i] = timed(int(batches[i]), 0)
        if np.isnan(drafting[i, j]):
            drafting[i, j] = timed(int(batches[i]), max(1, int(places[j])))
    for cache in caches:
        cache.lengths[:] = array("i", [0] * cache.num_slots)
    # Fewest and most nodes first, so that every row has both ends to interpolate between.
    lines = [(plain, batches), *((drafting[:, end], batches) for end in (0, -1)), *((row, places) for row in drafting)]
    for line, at in lines:
        there = ~np.isnan(line)
        line[:] = np.interp(at, at[there], line[there])
    load.learn(plain, drafting)
