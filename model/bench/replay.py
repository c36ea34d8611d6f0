"""Simulates a draft of a chosen accuracy: proposes the target's known answer, each token right with that probability.

It measures what a draft of that accuracy, at no cost, would gain on this target and machine. It must know every answer
beforehand, so no configuration can choose it, and its name says "(simulation)" wherever it is shown.

With accuracy a, a chain of n tokens is accepted up to its first wrong one: a + a^2 + ... + a^n tokens on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from model.decoding.sampling import uniform
from model.decoding.tree import Trees, chains
from model.drafters.slots import exchange_items
from model.targets.prompt import TokenizedPrompt


def prompt_key(prompt: TokenizedPrompt) -> bytes:
    """Hash a prompt's tokens and media."""
    digest = hashlib.sha256(np.array(prompt.ids, np.int64).tobytes())
    for medium in prompt.media:
        digest.update(medium.digest)
    return digest.digest()


class KnownAnswers:
    """The known answers to one sequence's prompt that begin as it does. There may be several, of several seeds."""

    def __init__(self, key: bytes, answers: Seq[tuple[int, ...]]) -> None:
        self._salt = int.from_bytes(key[:8], "little")
        self._answers = answers
        self._length = 0  # accepted tokens of the answer, without the newest

    def add(self, token: int) -> None:
        """Keep the answers that have this token next."""
        self._answers = [a for a in self._answers if len(a) > self._length and a[self._length] == token]
        self._length += 1

    def continuation(self, newest: int, num: int) -> list[tuple[int, float]]:
        """The next `num` tokens after `newest`, each with a number in [0, 1) that depends on its position alone."""
        first = self._length + 1
        for answer in self._answers:
            if len(answer) >= first and answer[first - 1] == newest:
                tokens = enumerate(answer[first : first + num], first)
                return [(token, uniform(self._salt, position)) for position, token in tokens]
        return []


class ReplayDrafter:
    """See `model.drafters.base.Drafter`. Proposes a chain of the known continuation, each token right with probability
    `accuracy`; nothing where no answer is known."""

    native = True  # there is nothing for torch to do
    num_bytes = cache_bytes = 0

    def __init__(self, accuracy: float, vocab_size: int, seed: int = 0) -> None:
        """Which tokens are right depends on `seed`, the prompt and the token's position in the answer."""
        assert 0.0 <= accuracy <= 1.0
        self.name = f"replay:{accuracy:g} (simulation)"
        self._accuracy, self._vocab_size, self._seed = accuracy, vocab_size, seed
        self._known: dict[bytes, list[tuple[int, ...]]] = {}  # by prompt
        self._sequences: dict[int, KnownAnswers] = {}  # by slot

    def learn(self, prompt: TokenizedPrompt, answer: Seq[int]) -> None:
        """Store the target's answer to this prompt, from a run without a draft."""
        known = self._known.setdefault(prompt_key(prompt), [])
        if tuple(answer) not in known:
            known.append(tuple(answer))

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        key = prompt_key(prompt)
        salted = hashlib.sha256(key + self._seed.to_bytes(8, "little")).digest()
        self._sequences[slot] = KnownAnswers(salted, self._known.get(key, []))

    def share(self, source: int, slot: int, length: int) -> bool:  # noqa: ARG002
        return True

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:
        pass

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        proposed: list[list[int]] = []
        for slot, (token, budget) in enumerate(zip(newest.tolist(), budgets.tolist(), strict=True)):
            tokens = self._sequences[slot].continuation(token, budget) if budget else []
            proposed.append([t if u < self._accuracy else (t + 1) % self._vocab_size for t, u in tokens])
        return chains(newest, proposed)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:  # noqa: ARG002
        for slot, path in enumerate(paths):
            for row in path:
                self._sequences[slot].add(int(trees.tokens[slot, row]))

    def free(self, slot: int) -> None:
        del self._sequences[slot]

    def exchange(self, one: int, other: int) -> None:
        exchange_items(self._sequences, one, other)

    def check_integrity(self, lengths: Mapping[int, int]) -> None:
        assert self._sequences.keys() == lengths.keys(), "answers of other sequences than there are"
