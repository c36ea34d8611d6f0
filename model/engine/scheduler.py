"""What the next step is: one pass of the target. Touches no tensor; all lists of sequences live here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import EngineConfig
from model.engine.sequence import Sequence
from model.engine.speculation import SpeculationController


@dataclass(frozen=True)
class Chunk:
    """Prompt positions start..end of one sequence are computed."""

    sequence: Sequence
    start: int
    end: int

    def moved(self, start: int) -> Chunk:
        """As many of its positions from `start` on."""
        return Chunk(self.sequence, start, min(start + self.end - self.start, len(self.sequence.prompt.ids)))


@dataclass(slots=True)  # not frozen: every step makes one, and that takes several times as long
class Decoding:
    """Every one of these sequences goes on; sequences[i] may verify nodes[i] draft nodes."""

    sequences: list[Sequence]
    nodes: list[int]


WHOLE_CHUNKS = 4  # what a prompt is longer than is read in bites: a few long steps are lost among those of an answer
BITE = 16  # tokens, or a multiple: attention reads all that came before once for as many
TURNS_PER_PROBE = 16  # of those that decode; one of them is had without a bite before it, to learn their pace


class Scheduler:
    """First come, first served. A new sequence joins as soon as the pass under way is over.

    Prompts go first, chunk by chunk: what comes in the meantime joins the same batch. Between two turns of those that
    decode, though, none is begun once `prefill_chunk` tokens were read (it is not cut either: a few tokens cost a pass
    of their own). What is beyond the first few chunks of a prompt is read in bites, small enough to keep those that
    decode within `max_decode_slowdown` times their pace, and lets other prompts pass: no stream stalls, and no short
    question waits, behind a long video. How much a bite may be is learnt from how long passes take.
    """

    def __init__(self, config: EngineConfig, load: SpeculationController) -> None:
        self._config, self._load = config, load
        self._whole = WHOLE_CHUNKS * config.prefill_chunk
        self._turns = 0  # of those that decode
        self._rows = 0  # prompt tokens since the last of them, without bites
        self._bitten = False  # whether a bite was taken since then
        self._pace = 0.0  # seconds of a turn with nothing before it, of late
        self._row_seconds = 0.0  # per prompt token of a bite, vision included, of late
        self._credit = 0.0  # seconds that bites may take without stretching that pace too far
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.request.request_id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def schedule(self, free_slots: int) -> Chunk | Decoding | None:
        """What to compute now; None where there is nothing to do."""
        begun: list[Sequence] = []
        decoding: list[Sequence] = []
        for sequence in self.running:
            (begun if sequence.prefilling else decoding).append(sequence)
        if begun or self.waiting:
            for prompt in self._prompts(begun, free_slots):
                if room := self._room(prompt) if decoding else self._config.prefill_chunk:
                    if prompt not in self.running:
                        self.running.append(self.waiting.popleft())
                    return Chunk(prompt, prompt.computed, min(prompt.computed + room, len(prompt.prompt.ids)))
        return self._decode(decoding) if decoding else None

    def took(self, work: Chunk | Decoding, seconds: float) -> None:
        """How long that pass was, with all that belongs to it."""
        if isinstance(work, Decoding):
            if not (self._rows or self._bitten):
                self._pace = (self._pace + seconds) / 2.0 if self._pace else seconds
            allowed = self._config.max_decode_slowdown * self._pace
            most = max(allowed, BITE * self._row_seconds)
            self._credit = min(self._credit + max(0.0, allowed - seconds), most)
            self._turns, self._rows, self._bitten = self._turns + 1, 0, False
        elif work.start >= self._whole:
            self._row_seconds = (self._row_seconds + seconds / (work.end - work.start)) / 2.0
            self._credit -= seconds
            self._bitten = True
        else:
            self._row_seconds = seconds / (work.end - work.start)
            self._rows += work.end - work.start

    def _prompts(self, begun: list[Sequence], free_slots: int) -> Iterator[Sequence]:
        """Those that may be read now, best first: begun; waiting, where there is a slot; the rest of long ones."""
        yield from (s for s in begun if s.computed < self._whole)
        if self.waiting and free_slots:
            yield self.waiting[0]
        yield from (s for s in begun if s.computed >= self._whole)

    def _room(self, prompt: Sequence) -> int:
        """How many tokens of it may be computed before the others' turn."""
        chunk = self._config.prefill_chunk
        if prompt.computed < self._whole:
            return chunk if self._rows < chunk else 0
        if self._bitten or self._turns % TURNS_PER_PROBE == 0:
            return 0
        affordable = int(max(0.0, self._credit) / self._row_seconds + 1e-6) // BITE * BITE
        return min(max(chunk // BITE * BITE, BITE), affordable)

    def _decode(self, sequences: list[Sequence]) -> Decoding:
        """Share the rows of a pass among the sequences; how many of them are worth it, they are told by the load."""
        share = max(0, min(self._load.nodes, self._config.max_verify_tokens // len(sequences) - 1))
        return Decoding(sequences, self._load.budgets(sequences, share))
