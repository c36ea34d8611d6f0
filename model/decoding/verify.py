"""Sample and match: how far the target agrees with a tree. Knows tokens only.

At each visited node the target's own token is already known (sampling.choose). If a child of the node carries it, that
child is accepted and visited next; otherwise the token is emitted as the bonus and the step ends. No draft probability
is used, so nothing about the draft can bias what is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.decoding.tree import Trees


@dataclass(slots=True)
class Verdict:
    """path: accepted rows, the root's 0 first; tokens: what is emitted, the bonus token last (len(path) tokens)."""

    path: list[int]
    tokens: list[int]


IDLE = Verdict([], [])  # of a slot that does not decode


def walk(trees: Trees, b: int, chosen: np.ndarray) -> Verdict:
    """Descend tree b. chosen: (rows,) the target's token at every row of it."""
    size = int(trees.sizes[b])
    tokens, parents, answers = trees.tokens[b, :size].tolist(), trees.parents[b, :size].tolist(), chosen[:size].tolist()
    path, emitted = [0], [answers[0]]
    for row in range(1, size):  # a parent comes before its children, so that once through is enough
        if parents[row] == path[-1] and tokens[row] == emitted[-1]:
            path.append(row)
            emitted.append(answers[row])
    return Verdict(path, emitted)
