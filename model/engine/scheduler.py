"""Decides the next step: one pass of the target. Touches no tensor. Owns the lists of sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import EngineConfig
from model.engine.sequence import Sequence
from model.engine.speculation import SpeculationController


@dataclass(frozen=True)
class Chunk:
    """A step that computes prompt positions start..end of one sequence (chunked prefill)."""

    sequence: Sequence
    start: int
    end: int

    def moved(self, start: int) -> Chunk:
        """Return a chunk of about the same size that starts at `start`."""
        return Chunk(self.sequence, start, self.sequence.prompt.cut(start, start + self.end - self.start))


@dataclass(slots=True)  # not frozen: a frozen one takes several times as long to create, once per step
class Decoding:
    """A step that decodes all of these sequences. sequences[i] may verify nodes[i] draft nodes; `most`: the largest
    number for which each of them has room."""

    sequences: list[Sequence]
    nodes: list[int]
    most: int = 0


WHOLE_CHUNKS = 4  # full-size chunks at the start of a prompt; the rest is read in smaller ones
BITE = 16  # the smaller chunks are multiples of this, tokens: attention reads the whole context once per so many
TURNS_PER_PROBE = 16  # one of so many decode steps follows no small chunk, so that its duration can be measured


class Scheduler:
    """Serves sequences first come, first served. A new sequence joins after the current pass.

    Prompts go before decoding, chunk by chunk, so that new sequences join the same batch. Between two decode steps no
    chunk is started once `prefill_chunk` prompt tokens were read; a chunk that has started is not cut, because even a
    few tokens cost a whole pass. After the first WHOLE_CHUNKS chunks a long prompt is read in smaller chunks, and other
    prompts may overtake it. The size of these chunks is limited so that decoding becomes at most `max_decode_slowdown`
    times as slow. So a long video stalls no stream and delays no short prompt. The limit follows from the measured
    durations of passes.
    """

    def __init__(self, config: EngineConfig, load: SpeculationController) -> None:
        """Start with no sequences and no measurements."""
        self._config, self._load = config, load
        self._whole = WHOLE_CHUNKS * config.prefill_chunk
        self._turns = 0  # decode steps so far
        self._rows = 0  # prompt tokens in full-size chunks since the last decode step
        self._bitten = False  # whether a small chunk was read since then
        self._pace = 0.0  # seconds of a decode step that follows no prompt chunk, running mean
        self._row_seconds = 0.0  # seconds per prompt token, encoding of media included, running mean
        self._credit = 0.0  # seconds that small chunks may take within `max_decode_slowdown`
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Return whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to the waiting ones."""
        self.waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        """Return the sequence of a request, running or waiting; None if there is none."""
        return next((s for s in (*self.running, *self.waiting) if s.request.request_id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def schedule(self, free_slots: int) -> Chunk | Decoding | None:
        """Choose the next step; None if there is nothing to do. free_slots: slots for new sequences."""
        begun: list[Sequence] = []
        decoding: list[Sequence] = []
        for sequence in self.running:
            (begun if sequence.prefilling else decoding).append(sequence)
        if begun or self.waiting:
            for prompt in self._prompts(begun, free_slots):
                if room := self._room(prompt) if decoding else self._config.prefill_chunk:
                    if prompt not in self.running:
                        self.running.append(self.waiting.popleft())
                    return Chunk(prompt, prompt.computed, prompt.prompt.cut(prompt.computed, prompt.computed + room))
        return self._decode(decoding) if decoding else None

    def took(self, work: Chunk | Decoding, seconds: float) -> None:
        """Learn from the duration of a step, in seconds."""
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
        """Yield the prompts that may be read now, in order of preference: started ones, the first waiting one if a slot
        is free, and then the rest of long ones."""
        yield from (s for s in begun if s.computed < self._whole)
        if self.waiting and free_slots:
            yield self.waiting[0]
        yield from (s for s in begun if s.computed >= self._whole)

    def _room(self, prompt: Sequence) -> int:
        """Return how many tokens of a prompt may be computed before the next decode step."""
        chunk = self._config.prefill_chunk
        if prompt.computed < self._whole:
            return chunk if self._rows < chunk else 0
        if self._bitten or self._turns % TURNS_PER_PROBE == 0:
            return 0
        affordable = int(max(0.0, self._credit) / self._row_seconds + 1e-6) // BITE * BITE
        return min(max(chunk // BITE * BITE, BITE), affordable)

    def _decode(self, sequences: list[Sequence]) -> Decoding:
        """Divide `max_verify_tokens` among the sequences. The speculation controller decides how many of its draft
        nodes each one uses."""
        share = max(0, min(self._load.nodes, self._config.max_verify_tokens // len(sequences) - 1))
        return Decoding(sequences, self._load.budgets(sequences, share), share)
