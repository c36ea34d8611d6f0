"""Decides how much to draft at the present load, from the measured cost of rounds and the number of accepted draft
nodes.

A round over B sequences that verifies n draft nodes takes T(B, n) seconds and emits B + (accepted nodes) tokens. So

  - nodes are admitted in descending probability of acceptance, as many as maximise (B + sum of probabilities) / T(B, n)
    (`admitted` in `model/decoding/tree.py`, or its twin in the native library);
  - a sequence drafts only while its gain, 1 + accepted nodes a round, exceeds the relative cost of such a round.
    Otherwise it pauses and tries again later; each pause is longer than the one before;
  - a sequence never starts to draft if its answer is not expected to save as much time as the draft would need to read
    its prompt.

T is measured for a few B and n when the engine starts, and corrected after every round. Between those points it is
interpolated. Probabilities are the draft's own, corrected by how often nodes of that score were accepted. Knows no
tensors, and nothing of how trees are drafted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as Seq

import numpy as np

from model.decoding import tree
from model.decoding.guided_trees import Worth
from model.decoding.tree import IDLE, Trees
from model.engine.sequence import Sequence

# Nodes are counted by the square root of their negative log-probability, so that bins are finer for likelier nodes.
# candidates.h has the same numbers.
BINS, FINENESS = 24, 12.0
TRUST = 16.0  # nodes of a bin after which the counts weigh as much as the draft's own probability
FADE = 8192.0  # nodes of a bin at which all counts are halved
PLACES = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63)  # nodes per sequence for which T is kept
LEARN = 0.1  # weight of the newest round or answer in a running mean
EACH = 4  # only one of so many drafting rounds is learnt from
LEARN_PLAIN = 0.3  # weight of the newest plain round
COMMON = 0.5  # share of a round's unexpected slowdown that is put down to machine load, and so applies to all rounds
MOVED = 0.5  # run a plain round once its estimated cost has drifted by this share without a measurement
FIRST_PLAIN, PLAIN_EVERY = 4, 256  # force a plain round after 4, 8, ... 256 drafting rounds
STEADY = 0.02  # weight of the newest round in the mean of accepted nodes over all sequences
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # rounds that a sequence pauses before it tries to draft again
TRIES = 4  # drafting rounds before drafting is judged; also the weight of the overall mean for a new sequence
ANSWERS = 16  # finished answers before `begins` may refuse a prompt
PROBE = 16  # one of so many refused sequences is drafted for all the same
SLACK = 0.97  # drafting goes on until its gain is this share of its cost, since switching costs too
ROOM = 1.5  # nodes drafted per node recently verified
KNEE = 1.5  # assumed highest worthwhile cost relative to a round without nodes, until nodes were verified
RENEW = 16  # rounds after which estimates are recomputed from the counts


class SpeculationController:
    """Controls drafting for an engine of `slots` slots, each of which verifies at most `nodes` draft nodes a round.

    Until `learn` is called it knows no costs, and every sequence drafts as much as there is room for.
    """

    def __init__(self, slots: int, nodes: int) -> None:
        """Start without costs. slots: most sequences of a batch; nodes: most draft nodes of a sequence."""
        self.nodes = nodes
        self.batches = [b for b in (1 << i for i in range(slots.bit_length())) if b < slots] + [slots]
        self.places = [n for n in PLACES if n < nodes] + [nodes]
        # Seconds of rounds by batch size, to be multiplied by `scale`: all sequences draft (by `places`); none does.
        self.drafting = [[0.0] * len(self.places) for _ in self.batches]
        self.plain = [0.0] * len(self.batches)
        self.scale = [1.0] * len(self.batches)
        self.tried, self.hits = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)  # nodes by score; those accepted
        self._confidence = np.exp(-(((np.arange(BINS) + 0.5) / FINENESS) ** 2))
        self.chance = self._confidence.copy()  # acceptance probability, by score
        self.curve_at: int | None = None  # address of `_curve`'s memory, once costs are known
        self._rounds = 0
        # For the present batch size: the two nearest rows of the tables above and their weights; seconds of a plain
        # round, and of one in which all draft, by total nodes; usual nodes per sequence; cost of those, relative to a
        # plain round.
        self._batch, self._near = 0, ((0, 1.0), (0, 0.0))
        self._plain, self._curve = 0.0, np.zeros(slots * nodes + 1)
        self._typical, self._price = float(nodes), 0.0
        self._tries, self._brought = 0, 0.0  # drafting rounds so far; accepted nodes of one, running mean
        self._answers, self._length = 0, 0.0  # finished answers; tokens of one, running mean
        self._readings, self._reading = 0, 0.0  # prompt readings; seconds per prompt token, running mean
        # Rounds with a grammar, without drafting and with it: seconds relative to a plain round, running mean.
        self._guided = [1.0, 1.0]
        self._brought_guided = float(nodes)  # accepted nodes of a drafting round with a grammar, running mean
        self._worth: Worth | None = None  # for the present batch size
        self._verified: dict[int, float] = {}  # batch size -> nodes per sequence, running mean
        self._passed_over = 0  # refused sequences since the last accepted one
        self._plain_runs: dict[int, tuple[int, int]] = {}  # batch size -> its last `_since`, `_patience`
        self._since, self._patience = 0, FIRST_PLAIN  # rounds since a plain one; rounds until the next
        self._moved = 0.0  # drift of the estimated cost of plain rounds since one ran

    @property
    def known(self) -> bool:
        """Return whether the cost of rounds is known."""
        return self.curve_at is not None

    def learn(self, plain: np.ndarray, drafting: np.ndarray) -> None:
        """Set the seconds of rounds: plain (batches,), drafting (batches, places)."""
        self.plain, self.drafting = plain.tolist(), drafting.tolist()
        self.curve_at = self._curve.ctypes.data

    def forget_draft(self) -> None:
        """Forget how often nodes were accepted, since another draft is used from now on. The cost of rounds is kept."""
        self.tried[:], self.hits[:] = 0, 0  # in place: the native library has their addresses
        self.chance[:] = self._confidence
        self._tries, self._brought, self._passed_over = 0, 0.0, 0
        self._readings, self._reading, self._answers = 0, 0.0, 0
        self._verified.clear()
        self._batch = 0  # so that the estimates for the present batch size are recomputed

    # --- cost of a round

    def _turn_to(self, batch: int) -> None:
        """Interpolate the cost of rounds for this batch size. Does nothing if the size is unchanged, except every RENEW
        rounds."""
        self._rounds += 1
        if not self.known or (batch == self._batch and self._rounds % RENEW):
            return
        upper = min(bisect_right(self.batches, batch), len(self.batches) - 1)
        lower = max(0, upper - 1)
        self._worth = None
        low, high = self.batches[lower], self.batches[upper]
        share = 0.0 if high == low else min(1.0, (batch - low) / (high - low))
        if batch != self._batch:
            self._plain_runs[self._batch] = self._since, self._patience
            self._since, self._patience = self._plain_runs.get(batch, (0, FIRST_PLAIN))
        self._batch, self._near = batch, ((lower, 1.0 - share), (upper, share))
        plain = sum(near * self.scale[row] * self.plain[row] for row, near in self._near)
        (low_row, low_near), (high_row, high_near) = self._near
        drafting = low_near * self.scale[low_row] * np.array(self.drafting[low_row])
        drafting += high_near * self.scale[high_row] * np.array(self.drafting[high_row])
        count = batch * self.nodes + 1
        self._curve[:count] = np.interp(np.arange(count) / batch, self.places, drafting)
        self._plain = plain
        # If the cost of a whole tree were assumed, drafting would never start where rows are expensive, and the number
        # of nodes that it really verifies would never be measured.
        most_at_first = np.interp(KNEE * drafting[0], np.maximum.accumulate(drafting), self.places)
        self._typical = self._verified.get(batch, max(1.0, float(most_at_first)))
        self._price = float(np.interp(self._typical, self.places, drafting)) / self._plain
        if not self._rounds % RENEW:
            self._weigh()

    def took(self, batch: int, drafting: int, nodes: int, seconds: float) -> None:
        """Correct the expected cost of rounds by one that has taken `seconds`.

        batch: its sequences; drafting: how many of them drafted; nodes: draft nodes verified in all. Rounds in which
        only some sequences drafted are ignored.
        """
        drafted = drafting > 0
        if (drafted and self._rounds % EACH) or 0 < drafting < batch or batch != self._batch or not self.known:
            return
        each = nodes / batch
        at = min(bisect_right(self.places, each), len(self.places) - 1)
        low, high = self.places[at - 1], self.places[at]
        above = min(1.0, (each - low) / (high - low))
        for row, near in self._near:
            if not near:
                continue
            line, scale = self.drafting[row], self.scale[row]
            expected = scale * ((1.0 - above) * line[at - 1] + above * line[at] if drafted else self.plain[row])
            change = near * (LEARN if drafted else LEARN_PLAIN) * (min(2.0, max(0.5, seconds / expected)) - 1.0)
            if drafted:
                self.scale[row] = scale * (1.0 + COMMON * change)
                line[at - 1] *= 1.0 + (1.0 - above) * (1.0 - COMMON) * change
                line[at] *= 1.0 + above * (1.0 - COMMON) * change
                self._moved += abs(COMMON * change)
            else:
                self.plain[row] *= 1.0 + change
                self._moved = 0.0
        if not drafted:
            self._since, self._patience = 0, min(2 * self._patience, PLAIN_EVERY)
        else:
            before = self._verified.get(batch, each)
            self._verified[batch] = before + LEARN * (each - before)

    def took_guided(self, drafting: bool, seconds: float) -> None:
        """Learn from the seconds of a round in which a sequence follows a grammar: its trees are fitted in Python."""
        if self.known and self._plain:
            self._guided[drafting] += LEARN * (min(8.0, seconds / self._plain) - self._guided[drafting])

    # --- gain of drafting

    def admitted(self, trees: Trees, budgets: np.ndarray) -> Trees:
        """Prune trees to the nodes that are worth verifying. budgets: (batch,), as for `Round`."""
        active = int((budgets != IDLE).sum())
        return tree.admitted(trees, active, self._curve, self._chances) if self.known else trees

    @property
    def worth(self) -> Worth:
        """Return what a node is worth to one sequence, if the others draft as much."""
        if self._worth is None:
            seconds = [1.0] * (self.nodes + 1)
            if self.known and self._batch:
                seconds = (self._curve[: self._batch * self.nodes + 1 : self._batch] / self._batch).tolist()
            chance = self.chance.tolist()
            self._worth = Worth(
                seconds, lambda score: chance[min(int(FINENESS * math.sqrt(max(-score, 0.0))), BINS - 1)]
            )
        return self._worth

    def _chances(self, scores: np.ndarray) -> np.ndarray:
        """Return the acceptance probabilities of nodes with these cumulative log-probabilities."""
        return self.chance[_bins(scores)]

    def saw(self, trees: Trees, paths: Seq[Seq[int]]) -> None:
        """Count accepted nodes by score. paths[b]: accepted rows of tree b, the root included."""
        for b, path in enumerate(paths):
            if len(path):
                bins = _bins(trees.scores[b])
                np.add.at(self.tried, bins[1 : trees.sizes[b]], 1)
                np.add.at(self.hits, bins[list(path[1:])], 1)

    def _weigh(self) -> None:
        """Update the acceptance probabilities from the counts, and halve counts that are too large."""
        if (most := float(self.tried.max())) > FADE:
            self.tried[:] = self.tried * (FADE / 2 / most)
            self.hits[:] = self.hits * (FADE / 2 / most)
        seen = (self.hits + TRUST * self._confidence) / (self.tried + TRUST)
        self.chance[:] = np.minimum.accumulate(seen)  # never larger for a lower score

    def calibration(self) -> list[tuple[float, float, int]]:
        """Return (probability by the draft, accepted share, number of nodes) for each range of scores, the likeliest
        first.

        Covers all nodes verified since the draft was loaded. After very many nodes, old ones count less.
        """
        seen = zip(self._confidence.tolist(), self.hits.tolist(), self.tried.tolist(), strict=True)
        return [(confidence, hits / tried, tried) for confidence, hits, tried in seen if tried]

    def begins(self, batch: int, prompt: int) -> bool:
        """Decide whether a new sequence is drafted for at all. batch: decoding sequences; prompt: tokens that the draft
        must read."""
        self._turn_to(batch)
        if not self.known or self._tries < TRIES or self._answers < ANSWERS:
            return True
        saved = self._length * self._plain / batch * (1.0 - self._price / (1.0 + self._brought))
        if saved > self._reading * prompt:
            return True
        self._passed_over = (self._passed_over + 1) % PROBE
        return self._passed_over == 0

    def budgets(self, sequences: Seq[Sequence], most: int) -> list[int]:
        """Return how many draft nodes each sequence may verify now, at most `most` each."""
        batch = len(sequences)
        self._turn_to(batch)
        if self.known:
            self._since += 1
            if self._since > self._patience or (self._moved > MOVED and self._since > FIRST_PLAIN):
                return [0] * batch  # measure the cost of a plain round
            # Do not draft many more nodes than are verified: growing a tree takes as long if it is pruned later.
            most = min(most, int(ROOM * self._typical) + 2)
        return [most if self._pays(sequence) else 0 for sequence in sequences]

    def _pays(self, sequence: Sequence) -> bool:
        """Decide whether a sequence drafts in this round, and advance its pause if it does not."""
        # The last token of an answer needs no draft: verifying the root alone emits it.
        if not sequence.speculates or sequence.remaining <= 1:
            return False
        if sequence.pause:
            sequence.pause -= 1
            return not sequence.pause  # at 0 it tries again
        if not sequence.tries:
            sequence.brought = self._brought if sequence.guide is None else self._brought_guided
        price = self._price if sequence.guide is None else self._guided[True] / self._guided[False]
        if self._tries < TRIES or 1.0 + sequence.brought >= SLACK * price:
            return True
        sequence.pause = sequence.next_pause = min(2 * sequence.next_pause or FIRST_PAUSE, LONGEST_PAUSE)
        return False

    def drafted(self, sequence: Sequence, accepted: int) -> None:
        """Learn from a round in which this sequence drafted. accepted: its accepted draft nodes.

        An answer that follows a grammar says nothing of others: its forced text is always right.
        """
        sequence.tries += 1
        sequence.brought += max(LEARN, 1.0 / (sequence.tries + TRIES)) * (accepted - sequence.brought)
        if sequence.guide is not None:
            self._brought_guided += LEARN * (accepted - self._brought_guided)
            return
        self._brought += (STEADY if self._tries > TRIES else 0.5) * (accepted - self._brought)
        self._tries += 1

    def finished(self, tokens: int) -> None:
        """Learn from the length of a finished answer, in tokens."""
        self._answers += 1
        self._length += max(LEARN, 1.0 / self._answers) * (tokens - self._length)

    def read(self, tokens: int, seconds: float) -> None:
        """Learn from the seconds that the draft took to read prompt tokens. A reading counts as at most twice the
        running mean."""
        each = seconds / tokens
        if self._reading:
            each = min(each, 2.0 * self._reading)
        self._readings += 1
        self._reading += max(LEARN, 1.0 / self._readings) * (each - self._reading)


def _bins(scores: np.ndarray) -> np.ndarray:
    """Sort cumulative log-probabilities into bins 0..BINS - 1, finer for likelier nodes."""
    return np.minimum(FINENESS * np.sqrt(-scores), BINS - 1).astype(np.int64)
