"""What the next step is: one pass of the target. Touches no tensor; all lists of sequences live here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from model.config import EngineConfig
from model.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt positions start..end of one sequence are computed."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class Decoding:
    """Every one of these sequences goes on; sequences[i] may verify nodes[i] draft nodes."""

    sequences: tuple[Sequence, ...]
    nodes: tuple[int, ...]


LEAST_ROWS = 16  # of a chunk, unless the prompt ends: fewer cost as much
WHOLE_CHUNKS = 4  # of a prompt: a few long steps are lost among the many of an answer


class Scheduler:
    """First come, first served. A new sequence joins as soon as the pass under way is over.

    Prompts go first, chunk by chunk: what comes in the meantime joins the same batch. But between two passes of those
    that decode, prompts are read for no more than `prefill_chunk` tokens; and a prompt of more than a few chunks for no
    longer than stretches a step `prefill_stretch` times, so that nobody's stream stalls while a long video is read.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._decode_seconds = 0.0  # of the last pass of those that decode
        self._row_seconds = 0.0  # per prompt token, vision included, of the last chunk
        self._rows = 0  # prompt tokens since that pass
        self._seconds = 0.0  # and how long they took
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
        decoding = tuple(s for s in self.running if not s.prefilling)
        prompt = self._next_prompt(free_slots)
        room = self._room(prompt, len(decoding)) if prompt else 0
        if not (prompt and room):
            return self._decode(decoding) if decoding else None
        if prompt.slot is None:
            self.running.append(self.waiting.popleft())
        return Chunk(prompt, prompt.computed, min(prompt.computed + room, len(prompt.prompt.ids)))

    def took(self, work: Chunk | Decoding, seconds: float) -> None:
        """How long that pass was, with all that belongs to it."""
        if isinstance(work, Decoding):
            self._decode_seconds, self._rows, self._seconds = seconds, 0, 0.0
        else:
            self._row_seconds = seconds / (work.end - work.start)
            self._rows += work.end - work.start
            self._seconds += seconds

    def _next_prompt(self, free_slots: int) -> Sequence | None:
        """The one begun, or else the first that waits, where there is a slot for it."""
        if (begun := next((s for s in self.running if s.prefilling), None)) is not None:
            return begun
        return self.waiting[0] if self.waiting and free_slots else None

    def _room(self, prompt: Sequence, decoding: int) -> int:
        """How many tokens of it may be computed before the others' turn."""
        chunk = self._config.prefill_chunk
        if not decoding:
            return chunk
        room = chunk - self._rows
        if prompt.computed >= WHOLE_CHUNKS * chunk:
            seconds = (self._config.prefill_stretch - 1.0) * self._decode_seconds - self._seconds
            room = min(room, int(seconds / self._row_seconds))
        if self._rows == 0:
            room = max(room, LEAST_ROWS)  # it gets on, however slowly
        return room if room >= LEAST_ROWS else 0

    def _decode(self, sequences: tuple[Sequence, ...]) -> Decoding:
        """Share the rows of a pass among the sequences: the more there are, the less each drafts."""
        share = min(self._config.max_nodes, self._config.max_rows // len(sequences) - 1)
        # The last token of an answer needs no draft: verifying the root alone emits it.
        nodes = (max(0, share) if s.request.speculation and s.remaining > 1 else 0 for s in sequences)
        return Decoding(sequences, tuple(nodes))
