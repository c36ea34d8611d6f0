"""Run a real drafter on an oracle's trees, so that paths of every length enter its context.

The trees that it would have proposed are recorded by request and number of answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from model.decoding.tree import Trees
from model.drafters.base import Drafter
from model.engine.engine import Engine
from model.targets.prompt import TokenizedPrompt
from tests.model.oracle import OracleDrafter


class Guided:
    """Wrap `drafter`: record the trees that it proposes, and let the target verify an oracle's trees instead.

    trees[request, answer tokens known]: the path of tokens from the root to every node of the proposed tree.
    """

    def __init__(self, engine: Engine, drafter: Drafter, known: Mapping[str, list[int]], seed: int = 0) -> None:
        self.engine, self.drafter = engine, drafter
        self.oracle = OracleDrafter(engine, known, seed, truth=0.4)
        self.trees: dict[tuple[str, int], set[tuple[int, ...]]] = {}
        self.name, self.num_bytes, self.cache_bytes = drafter.name, drafter.num_bytes, drafter.cache_bytes
        self.native = False

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        """Start the slot in both drafters."""
        self.drafter.start(slot, prompt)
        self.oracle.start(slot, prompt)

    def share(self, source: int, slot: int, length: int) -> bool:
        """Copy a prefix in both drafters; false if one of them cannot."""
        return self.drafter.share(source, slot, length) and self.oracle.share(source, slot, length)

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        """Pass a chunk of the prompt to both drafters."""
        self.drafter.prefill(slot, start, aux_hidden_states, embeds)
        self.oracle.prefill(slot, start, aux_hidden_states, embeds)

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Check and record the drafter's trees, and return the oracle's."""
        trees = self.drafter.propose(newest, budgets)
        for sequence in self.engine.scheduler.running:
            slot = sequence.slot
            if slot is None or sequence.prefilling or not budgets[slot]:
                continue
            assert 1 <= trees.sizes[slot] <= 1 + budgets[slot]
            assert trees.tokens[slot, 0] == newest[slot]
            paths: list[tuple[int, ...]] = []
            for row in range(int(trees.sizes[slot])):
                parent = int(trees.parents[slot, row])
                paths.append((*(paths[parent] if parent >= 0 else ()), int(trees.tokens[slot, row])))
                assert len(paths[-1]) == 1 + trees.depths[slot, row]
            assert len(set(paths)) == len(paths), "twins"
            self.trees[sequence.request.request_id, len(sequence.tokens)] = set(paths)
        return self.oracle.propose(newest, budgets)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:
        """Pass the accepted paths to both drafters."""
        self.drafter.observe(trees, paths, aux_hidden_states)
        self.oracle.observe(trees, paths, aux_hidden_states)

    def free(self, slot: int) -> None:
        """Free the slot in both drafters."""
        self.drafter.free(slot)
        self.oracle.free(slot)

    def exchange(self, one: int, other: int) -> None:
        """Exchange two slots in both drafters."""
        self.drafter.exchange(one, other)
        self.oracle.exchange(one, other)

    def check_integrity(self, held: Mapping[int, int]) -> None:
        """Check both drafters."""
        self.drafter.check_integrity(held)
        self.oracle.check_integrity(held)


def guided(engine: Engine, known: Mapping[str, list[int]], seed: int = 0) -> Guided:
    """Wrap the drafter of an idle engine so that it observes an oracle's trees."""
    assert not engine.has_work
    assert engine.drafter is not None
    wrapped = Guided(engine, engine.drafter, known, seed)
    engine.use(wrapped)
    return wrapped
