"""Choose the target's token at every row of a pass, as each request's sampling parameters ask. Knows no cache."""

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
    """Choose the target's token behind every node of the trees: (batch, rows) int64.

    by_slot: the sequence of each tree, None where a slot idles; likeliest: (batch, rows) the most likely tokens, where
    they are known already; logits: (batch, rows, vocab).
    """
    params = [sequence.request.params if sequence else sampling.GREEDY for sequence in by_slot]

    def positions(b: int) -> list[int]:
        """Positions in the answer of the tokens chosen behind tree b's nodes."""
        sequence, depths = by_slot[b], trees.depths[b, : trees.sizes[b]]
        return [] if sequence is None else [len(sequence.tokens) + int(depth) for depth in depths]

    return sampling.choose(logits, params, positions, likeliest, processing(by_slot, trees.paths, eos_ids))


def processing(
    by_slot: Seq[Sequence | None], paths: Callable[[int], list[list[int]]], eos_ids: frozenset[int]
) -> Callable[[int, Tensor], Tensor]:
    """Build the function that applies a request's logits processors to its rows of logits (rows, vocab).

    paths: for each row of a slot, the draft tokens that lead to it.
    """

    def process(b: int, logits: Tensor) -> Tensor:
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
    """Log-probabilities of tokens and of the likeliest beside each; None where the request wants none.

    logits: (rows, vocab), row i being that from which tokens[i] was chosen.
    """
    num = sequence.request.params.logprobs
    if num is None:
        return None

    def one(token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token, vocabulary.bytes_of(token), logprob)

    return [
        TokenLogprobs(one(token, own), tuple(one(*other) for other in best))
        for token, (own, best) in zip(tokens, sampling.likeliest_of(logits, tokens, num), strict=True)
    ]
