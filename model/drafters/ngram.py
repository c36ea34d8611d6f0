"""Proposes tokens by prompt lookup: those that followed the same words earlier in the text. No training, no model.

Source: "prompt lookup decoding" (A. Saxena, 2023), as in transformers and vLLM. It finds the longest suffix of the text
that occurred before, and proposes the tokens that followed its latest occurrence, as a chain.

The text is the prompt's tokens, without the placeholders of media, and the answer's. The index grows by a few entries
with every kept token, so that nothing is searched and nothing has to be rolled back.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import pairwise

import numpy as np
from torch import Tensor

from model.decoding.tree import Trees, chains
from model.drafters.slots import exchange_items
from model.targets.prompt import TokenizedPrompt

LONGEST = 4  # maximum tokens of a suffix


class Text:
    """Tokens, and an index of the token that last followed each run of up to LONGEST tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}

    def add(self, token: int) -> None:
        """Append a token and index the runs that it follows."""
        at = len(self.tokens)
        for length in range(1, min(LONGEST, at) + 1):
            self._followed[tuple(self.tokens[at - length :])] = at
        self.tokens.append(token)

    def after(self, newest: int, num: int) -> list[int]:
        """Return at most `num` tokens that followed the latest occurrence of the longest suffix that ends in
        `newest`."""
        suffix = (*self.tokens[-(LONGEST - 1) :], newest)
        for first in range(len(suffix)):
            run = suffix[first:]
            # The index lacks `newest`. If `newest` repeats the token before it, it may follow this very run.
            repeats = tuple(self.tokens[-len(run) :]) == run
            if (at := len(self.tokens) if repeats else self._followed.get(run)) is not None:
                return [*self.tokens[at : at + num], newest][:num]
        return []


class NgramDrafter:
    """Implements `model.drafters.base.Drafter`."""

    name = "ngram"
    native = True  # there is nothing for torch to do
    num_bytes = cache_bytes = 0

    def __init__(self) -> None:
        self._texts: dict[int, Text] = {}  # by slot
        self._prompts: dict[int, TokenizedPrompt] = {}

    def start(self, slot: int, prompt: TokenizedPrompt) -> None:
        self._texts[slot], self._prompts[slot] = Text(), prompt

    def share(self, source: int, slot: int, length: int) -> bool:  # noqa: ARG002
        self._read(slot, 0, length)
        return True

    def prefill(self, slot: int, start: int, aux_hidden_states: Tensor, embeds: Tensor) -> None:  # noqa: ARG002
        self._read(slot, start, start + len(embeds))

    def _read(self, slot: int, start: int, end: int) -> None:
        """Append positions start..end of the prompt to the slot's text, without media."""
        text, prompt = self._texts[slot], self._prompts[slot]
        edges = (0, *(edge for span in prompt.spans for edge in span), len(prompt.ids))
        for first, last in list(pairwise(edges))[::2]:  # the ranges between media
            for token in prompt.ids[max(first, start) : min(last, end)]:
                text.add(token)

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        """Look up a chain for every slot."""
        found = [
            self._texts[slot].after(token, budget) if budget else []
            for slot, (token, budget) in enumerate(zip(newest.tolist(), budgets.tolist(), strict=True))
        ]
        return chains(newest, found)

    def observe(self, trees: Trees, paths: Seq[list[int]], aux_hidden_states: Tensor) -> None:  # noqa: ARG002
        """Append the kept tokens to the texts."""
        for slot, path in enumerate(paths):
            for row in path:
                self._texts[slot].add(int(trees.tokens[slot, row]))

    def free(self, slot: int) -> None:
        del self._texts[slot], self._prompts[slot]

    def exchange(self, one: int, other: int) -> None:
        exchange_items(self._texts, one, other)
        exchange_items(self._prompts, one, other)

    def check_integrity(self, by_slot: Mapping[int, int]) -> None:
        assert self._texts.keys() == self._prompts.keys() == by_slot.keys(), "texts of other sequences than there are"
        for slot, computed in by_slot.items():
            spans = self._prompts[slot].spans
            visual = sum(max(0, min(last, computed) - first) for first, last in spans)
            assert len(self._texts[slot].tokens) == computed - visual, "a text is not what the target has kept"
