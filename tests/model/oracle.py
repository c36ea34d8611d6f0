"""Draft from the known answer and corrupt it on purpose, so that paths of every length and branching are accepted.

This drafter shares no code with the others, so tests with it are about the engine. It also checks the calls that it
gets: the tokens that enter its context must be those that the target kept, or the two would diverge unnoticed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.backends.kv_cache import KVCache, uniform
from model.decoding.tree import Trees, roots
from model.engine.engine import Engine
from model.targets.prompt import TokenizedPrompt


class OracleDrafter:
    """Propose trees that contain the next tokens of known answers.

    known: request id -> the answer that decoding without a draft gives. truth: chance that a node is a right one.
    shapes: the pairs (nodes proposed, nodes accepted) that occurred.
    """

    name, native, num_bytes, cache_bytes = "oracle", False, 0, 0

    def __init__(self, engine: Engine, known: Mapping[str, list[int]], seed: int = 0, truth: float = 0.75) -> None:
        self.engine, self.known, self.truth = engine, known, truth
        self.rng = random.Random(seed)
        self.cache = KVCache(
            layers=uniform(1, 1, 1),
            num_slots=engine.cache.num_slots,
            capacity=engine.cache.capacity,
            margin=engine.config.nodes + 1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.shapes: set[tuple[int, int]] = set()  # (nodes proposed, accepted)
        self._sizes: list[int] = []  # nodes of this step's trees, by slot; empty without trees

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        """Reserve the slot."""
        self.cache.take(slot)

    def share(self, source: int, slot: int, length: int) -> bool:
        """Copy a prefix; this always succeeds."""
        self.cache.share(source, slot, length)
        return True

    def free(self, slot: int) -> None:
        self.cache.free(slot)

    def exchange(self, one: int, other: int) -> None:
        self.cache.exchange(one, other)

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        """Count a chunk of the prompt, and check that chunks arrive in order."""
        assert aux_hidden_states.ndim == embeds.ndim == 2
        assert len(aux_hidden_states) == len(embeds)
        assert start == self.cache.lengths[slot], "a prompt's chunks come out of order"
        self.cache.lengths[slot] += len(aux_hidden_states)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:
        """Count the accepted rows of each slot, and record how many nodes were proposed and accepted."""
        assert len(trees.tokens) == aux_hidden_states.shape[0] == len(paths)
        for slot, path in enumerate(paths):
            assert path == sorted(set(path))
            self.cache.lengths[slot] += len(path)
            if path and self._sizes and self._sizes[slot]:
                self.shapes.add((self._sizes[slot], len(path) - 1))
        self._sizes = []

    def check_integrity(self, held: Mapping[int, int]) -> None:
        """Check that draft and target use the same slots, with the same number of tokens."""
        self.cache.check_integrity()
        assert self.cache.num_free == self.cache.num_slots - len(held), "draft and target hold different slots"
        assert all(self.cache.lengths[slot] == computed for slot, computed in held.items())

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Build trees with some of the tokens to come, and wrong tokens at every depth."""
        batch, rows = len(newest), 1 + int(budgets.max())
        by_slot = {s.slot: s for s in self.engine.scheduler.running}
        trees = roots(newest, rows)
        for slot in range(batch):
            if not budgets[slot]:
                continue
            sequence = by_slot[slot]
            assert sequence.tokens[-1] == newest[slot]
            assert self.cache.lengths[slot] == sequence.computed, "the draft's context is not what the target kept"
            coming = self.known[sequence.request.request_id][len(sequence.tokens) :]
            self._grow(trees, slot, coming, self.rng.randint(0, int(budgets[slot])))
        self._sizes = (trees.sizes - 1).tolist()
        return trees

    def _grow(self, trees: Trees, b: int, coming: list[int], nodes: int) -> None:
        """Add up to `nodes` nodes: mostly the next right token on the deepest right path, else a random one."""
        vocab = self.engine.target.vocab_size
        right = {0: 0}  # row -> depth, for rows on the right path
        children: dict[int, set[int]] = {}
        for row in range(1, nodes + 1):
            tip = max(right, key=lambda r: right[r])
            if self.rng.random() < self.truth and right[tip] < len(coming):
                parent, token = tip, coming[right[tip]]
            else:
                parent, token = self.rng.randrange(row), self.rng.randrange(vocab)
            depth = int(trees.depths[b, parent])
            if token in children.setdefault(parent, set()):
                continue  # siblings must differ, as a drafter's do
            size = int(trees.sizes[b])
            if parent >= size:
                continue
            children[parent].add(token)
            trees.tokens[b, size], trees.parents[b, size], trees.depths[b, size] = token, parent, depth + 1
            if parent in right and depth < len(coming) and token == coming[depth]:
                right[size] = depth + 1
            trees.sizes[b] = size + 1


def with_oracle(engine: Engine, known: Mapping[str, list[int]], seed: int = 0, truth: float = 0.75) -> OracleDrafter:
    """Replace the drafter of an idle engine by an oracle, and return it."""
    assert not engine.has_work
    oracle = OracleDrafter(engine, known, seed, truth)
    engine.use(oracle)
    return oracle
