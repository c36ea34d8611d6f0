"""A simulation, for measuring: replays the target's known answers with a per-token accuracy chosen beforehand.

It tells what a draft of a given accuracy that costs nothing would gain on this target and machine, in this engine: the
ceiling for drafters of that accuracy. It serves nobody, since it must be told every answer before; so no configuration
names it, only whoever builds an engine in process, and it is marked as a simulation wherever its name shows.

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
    """Of its tokens and media."""
    digest = hashlib.sha256(np.array(prompt.ids, np.int64).tobytes())
    for medium in prompt.media:
        digest.update(medium.digest)
    return digest.digest()


class Telling:
    """One sequence: answers that begin as it does so far. To the same prompt there may be several, of several seeds."""

    def __init__(self, key: bytes, answers: Seq[tuple[int, ...]]) -> None:
        self._salt = int.from_bytes(key[:8], "little")
        self._answers = answers
        self._said = 0  # tokens of the answer that were kept; the newest is not among them

    def add(self, token: int) -> None:
        self._answers = [a for a in self._answers if len(a) > self._said and a[self._said] == token]
        self._said += 1

    def coming(self, newest: int, num: int) -> list[tuple[int, float]]:
        """The next tokens after `newest`, each with the number in [0, 1) that is its place's alone."""
        first = self._said + 1
        for answer in self._answers:
            if len(answer) >= first and answer[first - 1] == newest:
                told = enumerate(answer[first : first + num], first)
                return [(token, uniform(self._salt, place)) for place, token in told]
        return []


class ReplayDrafter:
    """See `model.drafters.base.Drafter`. A chain of the known continuation, each token right with probability
    `accuracy`; nothing where none is known."""

    native = True  # there is nothing for torch to do
    num_bytes = cache_bytes = 0

    def __init__(self, accuracy: float, vocab_size: int, seed: int = 0) -> None:
        """Which tokens are right follows from `seed`, the prompt and the token's place in the answer."""
        assert 0.0 <= accuracy <= 1.0
        self.name = f"replay:{accuracy:g} (simulation)"
        self._accuracy, self._vocab_size, self._seed = accuracy, vocab_size, seed
        self._known: dict[bytes, list[tuple[int, ...]]] = {}  # by prompt
        self._tellings: dict[int, Telling] = {}  # by slot

    def learn(self, prompt: TokenizedPrompt, answer: Seq[int]) -> None:
        """What the target says to this prompt, as a run without a draft has shown."""
        known = self._known.setdefault(prompt_key(prompt), [])
        if tuple(answer) not in known:
            known.append(tuple(answer))

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        key = prompt_key(prompt)
        salted = hashlib.sha256(key + self._seed.to_bytes(8, "little")).digest()
        self._tellings[slot] = Telling(salted, self._known.get(key, []))

    def share(self, source: int, slot: int, length: int) -> bool:  # noqa: ARG002
        return True

    def prefill(self, slot: int, start: int, taps: Tensor, embeds: Tensor) -> None:
        pass

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        proposed: list[list[int]] = []
        for slot, (token, budget) in enumerate(zip(newest.tolist(), budgets.tolist(), strict=True)):
            coming = self._tellings[slot].coming(token, budget) if budget else []
            proposed.append([t if u < self._accuracy else (t + 1) % self._vocab_size for t, u in coming])
        return chains(newest, proposed)

    def observe(self, trees: Trees, paths: Seq[list[int]], taps: Tensor) -> None:  # noqa: ARG002
        for slot, path in enumerate(paths):
            for row in path:
                self._tellings[slot].add(int(trees.tokens[slot, row]))

    def free(self, slot: int) -> None:
        del self._tellings[slot]

    def exchange(self, one: int, other: int) -> None:
        exchange_items(self._tellings, one, other)

    def check_integrity(self, held: Mapping[int, int]) -> None:
        assert self._tellings.keys() == held.keys(), "answers of other sequences than there are"
