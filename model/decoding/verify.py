"""Compares draft trees with the target's tokens (sample and match). Knows tokens only.

At each visited node the target's own token is already known (sampling.choose). If a child of the node carries it, that
child is accepted and visited next. Otherwise the token is emitted as the bonus token and the step ends. No draft
probability is used, so the draft cannot bias the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.decoding.tree import Trees


@dataclass(slots=True)
class Verdict:
    """The result for one tree. path: accepted rows, the root's 0 first; tokens: the emitted tokens, the bonus token
    last (len(path) tokens)."""

    path: list[int]
    tokens: list[int]


IDLE = Verdict([], [])  # for a slot that does not decode


def walk(trees: Trees, b: int, chosen: np.ndarray) -> Verdict:
    """Find the accepted path of tree b. chosen: (rows,), the target's token at every row."""
    size = int(trees.sizes[b])
    tokens, parents, answers = trees.tokens[b, :size].tolist(), trees.parents[b, :size].tolist(), chosen[:size].tolist()
    path, emitted = [0], [answers[0]]
    for row in range(1, size):  # one pass is enough, since a parent comes before its children
        if parents[row] == path[-1] and tokens[row] == emitted[-1]:
            path.append(row)
            emitted.append(answers[row])
    return Verdict(path, emitted)
