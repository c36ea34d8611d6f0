"""Chooses the target's token at every row of a pass, by each request's sampling parameters. Knows no cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from model.decoding import processors, sampling
from model.decoding.detokenize import Vocabulary
from model.decoding.grammar import Guide
from model.decoding.tree import Trees
from model.engine.sequence import Sequence
from model.request import TokenLogprob, TokenLogprobs
from model.transfer import upload


def choose_at_nodes(
    by_slot: Seq[Sequence | None], trees: Trees, likeliest: np.ndarray | None, logits: Tensor, eos_ids: frozenset[int]
) -> np.ndarray:
    """Choose the target's token behind every draft tree node: (batch, rows) int64.

    by_slot: the sequence of each tree, None where a slot idles; likeliest: (batch, rows), the greedy tokens if they are
    already known; logits: (batch, rows, vocab); eos_ids: end-of-sequence tokens.
    """
    params = [
        sampling.GREEDY if sequence is None or sequence.takes_likeliest else sequence.request.params
        for sequence in by_slot
    ]

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
        sequence, to_rows = by_slot[b], paths(b)
        assert sequence is not None
        params = sequence.request.params
        return processors.process(
            logits,
            params,
            prompt=sequence.prompt.ids,
            answer=sequence.tokens,
            paths=to_rows,
            ends=eos_ids,
            allowed=None if sequence.guide is None else _allowed(sequence.guide, to_rows, logits),
        )

    return process


def _allowed(guide: Guide, paths: list[list[int]], logits: Tensor) -> Tensor:
    """Return which tokens a grammar allows behind every path: (rows, vocab) bool."""
    allowed = np.ones(logits.shape, bool)
    places: dict[tuple[int, ...], Guide] = {(): guide}
    for row, path in enumerate(paths):  # a parent comes before its children
        if path:
            places[tuple(path)] = places[tuple(path[:-1])].copy()
            places[tuple(path)].advance(path[-1])
        if (mask := places[tuple(path)].mask()) is not None:
            allowed[row] = mask
    return upload(allowed, logits.device)


def follow(guide: Guide, trees: Trees, b: int, chosen: np.ndarray, likeliest: Callable[[int, int, bytes], int]) -> None:
    """Replace the greedy tokens of tree b by the likeliest tokens that a grammar allows, and move its guide on.

    Only at the nodes that are visited: down from the root, to the child that carries the token chosen at its parent.
    chosen: (batch, rows); likeliest: see `Round`.
    """
    size, row = int(trees.sizes[b]), 0
    tokens, parents = (trees.tokens[b, :size].tolist(), trees.parents[b, :size].tolist()) if size > 1 else ([], [])
    while row >= 0:
        token = int(chosen[b, row])
        if not guide.allows(token):
            if forced := guide.forced():
                token = forced[0]
            elif (allowed := guide.bits()) is not None:
                token = likeliest(b, row, allowed)
            chosen[b, row] = token
        guide.advance(token)
        row = next((r for r in range(row + 1, size) if parents[r] == row and tokens[r] == token), -1)


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
