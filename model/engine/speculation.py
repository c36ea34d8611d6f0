"""How much to draft at this load: what rounds take here, as measured, against what drafts have brought.

A round over B sequences that verifies n draft nodes takes T(B, n) seconds and emits B + (accepted nodes) tokens. So

  - nodes are admitted in descending probability of being accepted as long as (B + sum of probabilities) / T(B, n) has
    its maximum there (`model/decoding/tree.py`'s `admitted`, or the native library's twin of it);
  - a sequence drafts only while what its drafts bring it, 1 + accepted nodes a round, outweighs what a round then takes
    longer. One that does not pays no more for it, but tries again after a while, and later each time;
  - one whose answer is not expected to save as much as reading its prompt would cost the draft never begins to draft.

T is measured when the engine starts, for a few B and n, and corrected by every round since; between those it is
interpolated. Probabilities are the draft's own, corrected by how often nodes of such a score were accepted. Knows no
tensors, and nothing of how trees are drafted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq

import numpy as np

from model.decoding import tree
from model.decoding.tree import IDLE, Trees
from model.engine.sequence import Sequence

# Of a node's cumulative log-probability: its square root, so that bins are the finer the likelier; as in candidates.h.
BINS, FINENESS = 24, 12.0
TRUST = 16.0  # nodes of a bin after which what was seen of them counts as much as what the draft says
FADE = 8192.0  # nodes of a bin after which the old ones count half
PLACES = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63)  # nodes per sequence for which T is kept
LEARN = 0.1  # weight of the newest round, or answer
EACH = 4  # drafting rounds from one of which something is learnt
LEARN_PLAIN = 0.3  # of the newest plain round
COMMON = 0.5  # of what a round took longer than was thought, that others would have, too: a busier machine
MOVED = 0.5  # change of what is thought of plain rounds, none of which ran, after which one does
FIRST_PLAIN, PLAIN_EVERY = 4, 256  # rounds after which one is plain if none was: first after few, then after more
STEADY = 0.02  # of the newest round in what drafts bring over all
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # plain rounds of a sequence before it tries again to draft
TRIES = 4  # rounds of anybody before it is judged; and how much what others had counts for a new sequence
ANSWERS = 16  # finished answers before it is judged which prompts are not worth reading
PROBE = 16  # of so many sequences that would not be worth drafting for, one is drafted for all the same
SLACK = 0.97  # drafting is kept up a little below its price: to give it up and take it up again costs too
ROOM = 1.5  # times as many nodes as are verified of late are drafted
KNEE = 1.5  # times as long as without nodes: the most that is taken to be worth it where nothing was verified yet
RENEW = 16  # rounds after which what is made of the counts is made anew


class SpeculationController:
    """For an engine of `slots` slots, each of which verifies at most `nodes` nodes a round.

    Until `learn` was called it knows no prices: whoever may draft then drafts as much as there is room for.
    """

    def __init__(self, slots: int, nodes: int) -> None:
        self.nodes = nodes
        self.batches = [b for b in (1 << i for i in range(slots.bit_length())) if b < slots] + [slots]
        self.places = [n for n in PLACES if n < nodes] + [nodes]
        # Seconds of rounds by batch: in which all draft, by place, and in which nobody does; both times `scale`.
        self.drafting = [[0.0] * len(self.places) for _ in self.batches]
        self.plain = [0.0] * len(self.batches)
        self.scale = [1.0] * len(self.batches)
        self.tried, self.hits = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)  # nodes by score; those accepted
        self._confidence = np.exp(-(((np.arange(BINS) + 0.5) / FINENESS) ** 2))
        self.chance = self._confidence.copy()  # of being accepted, by score
        self.curve_at: int | None = None  # address of `curve`'s memory, where prices are known
        self._rounds = 0
        # For the batch of now: rows of the tables above near it, and how near they are; seconds of a plain round, and
        # of one in which all draft, by nodes over all; nodes per sequence, of late; how many times as long that takes.
        self._batch, self._near = 0, ((0, 1.0), (0, 0.0))
        self._plain, self._curve = 0.0, np.zeros(slots * nodes + 1)
        self._typical, self._price = float(nodes), 0.0
        self._tries, self._brought = 0, 0.0  # of anybody; accepted nodes per sequence and round, of late
        self._answers, self._length = 0, 0.0  # finished so far; tokens of one, of late
        self._readings, self._reading = 0, 0.0  # so far; seconds that the draft takes per prompt token, of late
        self._verified: dict[int, float] = {}  # batch -> nodes per sequence, of late
        self._passed_over = 0  # sequences that did not begin to draft, since one did
        self._plain_runs: dict[int, tuple[int, int]] = {}  # batch -> of the next two, when it was last the batch of now
        self._since, self._patience = 0, FIRST_PLAIN  # rounds since a plain one; rounds after which there is one
        self._moved = 0.0  # by how much plain rounds are thought to take longer or shorter since one ran

    @property
    def known(self) -> bool:
        """Whether there are prices."""
        return self.curve_at is not None

    def learn(self, plain: np.ndarray, drafting: np.ndarray) -> None:
        """Seconds of rounds: plain (batches,), drafting (batches, places)."""
        self.plain, self.drafting = plain.tolist(), drafting.tolist()
        self.curve_at = self._curve.ctypes.data

    def forget_draft(self) -> None:
        """Another draft is used from now on: nothing is known of what it brings. What rounds take stays, and is
        corrected as ever."""
        self.tried[:], self.hits[:] = 0, 0  # in place: the native library has their addresses
        self.chance[:] = self._confidence
        self._tries, self._brought, self._passed_over = 0, 0.0, 0
        self._readings, self._reading, self._answers = 0, 0.0, 0
        self._verified.clear()
        self._batch = 0  # so that all that is made for the batch of now is made anew

    # --- what a round takes

    def _turn_to(self, batch: int) -> None:
        """Make anew, when the batch is another and now and then, what is looked at in every round."""
        self._rounds += 1
        if not self.known or (batch == self._batch and self._rounds % RENEW):
            return
        upper = min(bisect_right(self.batches, batch), len(self.batches) - 1)
        lower = max(0, upper - 1)
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
        # Judged by its whole tree, drafting would never begin where rows are dear; and what it verifies never be seen.
        most_at_first = np.interp(KNEE * drafting[0], np.maximum.accumulate(drafting), self.places)
        self._typical = self._verified.get(batch, max(1.0, float(most_at_first)))
        self._price = float(np.interp(self._typical, self.places, drafting)) / self._plain
        if not self._rounds % RENEW:
            self._weigh()

    def took(self, batch: int, drafting: int, nodes: int, seconds: float) -> None:
        """A round did, in which so many of the batch drafted and so many nodes were verified over all: what was thought
        of its like is corrected."""
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

    # --- what drafting brings

    def admitted(self, trees: Trees, budgets: np.ndarray) -> Trees:
        """Of these trees what is worth verifying. budgets: (batch,), as of a round."""
        active = int((budgets != IDLE).sum())
        return tree.admitted(trees, active, self._curve, self._chances) if self.known else trees

    def _chances(self, scores: np.ndarray) -> np.ndarray:
        """Of being accepted, for nodes of these cumulative log-probabilities."""
        return self.chance[_bins(scores)]

    def saw(self, trees: Trees, paths: Seq[Seq[int]]) -> None:
        """The target has verified these trees and accepted the rows in `paths`, roots included."""
        for b, path in enumerate(paths):
            if len(path):
                bins = _bins(trees.scores[b])
                np.add.at(self.tried, bins[1 : trees.sizes[b]], 1)
                np.add.at(self.hits, bins[list(path[1:])], 1)

    def _weigh(self) -> None:
        if (most := float(self.tried.max())) > FADE:
            self.tried[:] = self.tried * (FADE / 2 / most)
            self.hits[:] = self.hits * (FADE / 2 / most)
        seen = (self.hits + TRUST * self._confidence) / (self.tried + TRUST)
        self.chance[:] = np.minimum.accumulate(seen)  # what the draft thinks less likely never counts for more

    def calibration(self) -> list[tuple[float, float, int]]:
        """By score, the likeliest first: the chance of being accepted that drafts gave their nodes, the share that was,
        and of how many. Of all that were verified since the draft came; of very many, the old ones count less."""
        seen = zip(self._confidence.tolist(), self.hits.tolist(), self.tried.tolist(), strict=True)
        return [(confidence, hits / tried, tried) for confidence, hits, tried in seen if tried]

    def begins(self, batch: int, prompt: int) -> bool:
        """Whether a sequence is to be drafted for at all, when `batch` of them decode; prompt: tokens."""
        self._turn_to(batch)
        if not self.known or self._tries < TRIES or self._answers < ANSWERS:
            return True
        saved = self._length * self._plain / batch * (1.0 - self._price / (1.0 + self._brought))
        if saved > self._reading * prompt:
            return True
        self._passed_over = (self._passed_over + 1) % PROBE
        return self._passed_over == 0

    def budgets(self, sequences: Seq[Sequence], most: int) -> list[int]:
        """How many nodes each may verify now, at most `most`."""
        batch = len(sequences)
        self._turn_to(batch)
        if self.known:
            self._since += 1
            if self._since > self._patience or (self._moved > MOVED and self._since > FIRST_PLAIN):
                return [0] * batch  # what such a round takes is to be known, not guessed
            # Not many more than are worth it: a tree that is cut takes as long to grow as one that is not.
            most = min(most, int(ROOM * self._typical) + 2)
        return [most if self._pays(sequence) else 0 for sequence in sequences]

    def _pays(self, sequence: Sequence) -> bool:
        # The last token of an answer needs no draft: verifying the root alone emits it.
        if not sequence.speculates or sequence.remaining <= 1:
            return False
        if sequence.pause:
            sequence.pause -= 1
            return not sequence.pause  # it tries again
        if not sequence.tries:
            sequence.brought = self._brought
        if self._tries < TRIES or 1.0 + sequence.brought >= SLACK * self._price:
            return True
        sequence.pause = sequence.next_pause = min(2 * sequence.next_pause or FIRST_PAUSE, LONGEST_PAUSE)
        return False

    def drafted(self, sequence: Sequence, accepted: int) -> None:
        """A round in which this sequence drafted brought it so many accepted nodes."""
        sequence.tries += 1
        sequence.brought += max(LEARN, 1.0 / (sequence.tries + TRIES)) * (accepted - sequence.brought)
        self._brought += (STEADY if self._tries > TRIES else 0.5) * (accepted - self._brought)
        self._tries += 1

    def finished(self, tokens: int) -> None:
        """An answer is over, of so many tokens."""
        self._answers += 1
        self._length += max(LEARN, 1.0 / self._answers) * (tokens - self._length)

    def read(self, tokens: int, seconds: float) -> None:
        """The draft has read so many prompt tokens. What took far longer than before, as the first ones do, counts for
        little."""
        each = seconds / tokens
        if self._reading:
            each = min(each, 2.0 * self._reading)
        self._readings += 1
        self._reading += max(LEARN, 1.0 / self._readings) * (each - self._reading)


def _bins(scores: np.ndarray) -> np.ndarray:
    return np.minimum(FINENESS * np.sqrt(-scores), BINS - 1).astype(np.int64)
