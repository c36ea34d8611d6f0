"""Chooses the target's token at every row of a pass, by each request's sampling parameters. Knows no cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from model.decoding import processors, sampling
from model.decoding.detokenize import Vocabulary
from model.decoding.tree import Trees
from model.engine.sequence import Sequence
from model.request import TokenLogprob, TokenLogprobs


def choose_at_nodes(
    by_slot: Seq[Sequence | None], trees: Trees, likeliest: np.ndarray | None, logits: Tensor, eos_ids: frozenset[int]
) -> np.ndarray:
    """Choose the target's token behind every draft tree node: (batch, rows) int64.

    by_slot: the sequence of each tree, None where a slot idles; likeliest: (batch, rows), the greedy tokens if they are
    already known; logits: (batch, rows, vocab); eos_ids: end-of-sequence tokens.
    """
    params = [sequence.request.params if sequence else sampling.GREEDY for sequence in by_slot]

    def positions(b: int) -> list[int]:
        """Return the answer positions of the tokens chosen behind tree b's nodes."""
        sequence, depths = by_slot[b], trees.depths[b, : trees.sizes[b]]
        return [] if sequence is None else [len(sequence.tokens) + int(depth) for depth in depths]

    return sampling.choose(logits, params, positions, likeliest, processing(by_slot, trees.paths, eos_ids))


def processing(
    by_slot: Seq[Sequence | None], paths: Callable[[int], list[list[int]]], eos_ids: frozenset[int]
) -> Callable[[int, Tensor], Tensor]:
    """Build the function that applies a request's logits processors to its rows of logits (rows, vocab).

    paths(b): for each row of slot b, the draft tokens on the path to it; eos_ids: end-of-sequence tokens.
    """

    def process(b: int, logits: Tensor) -> Tensor:
        """Apply the logits processors of request b: (rows, vocab) -> (rows, vocab) float64."""
        sequence = by_slot[b]
        assert sequence is not None
        return processors.process(
            logits,
            sequence.request.params,
            prompt=sequence.prompt.ids,
            answer=sequence.tokens,
            paths=paths(b),
            ends=eos_ids,
        )

    return process


def token_logprobs(
    vocabulary: Vocabulary, sequence: Sequence, logits: Tensor, tokens: list[int]
) -> list[TokenLogprobs] | None:
    """Compute the log-probabilities of `tokens` and of the likeliest tokens beside each.

    Returns None if the request does not ask for log-probabilities. logits: (rows, vocab); tokens[i] was chosen from row
    i.
    """
    num = sequence.request.params.logprobs
    if num is None:
        return None

    def one(token: int, logprob: float) -> TokenLogprob:
        """Build the log-probability entry of one token."""
        return TokenLogprob(token, vocabulary.bytes_of(token), logprob)

    return [
        TokenLogprobs(one(token, own), tuple(one(*other) for other in best))
        for token, (own, best) in zip(tokens, sampling.likeliest_of(logits, tokens, num), strict=True)
    ]
