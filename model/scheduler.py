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


class Scheduler:
    """First come, first served. A new sequence joins as soon as the pass under way is over.

    Prompts go first, chunk by chunk: what comes in the meantime joins the same batch. After `prefill_chunk` prompt
    tokens those that decode have their turn, so that nobody's stream waits longer than that.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._budget = config.prefill_chunk  # prompt tokens before those that decode have their turn
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
        if decoding and self._budget <= 0:
            return self._decode(decoding)
        if (sequence := self._next_prompt(free_slots)) is None:
            return self._decode(decoding) if decoding else None
        most = self._budget if decoding else self._config.prefill_chunk
        end = min(sequence.computed + most, len(sequence.prompt.ids))
        self._budget -= end - sequence.computed
        return Chunk(sequence, sequence.computed, end)

    def _next_prompt(self, free_slots: int) -> Sequence | None:
        """The one begun, or the next that gets a slot."""
        if (begun := next((s for s in self.running if s.prefilling), None)) is not None:
            return begun
        if not (self.waiting and free_slots):
            return None
        self.running.append(self.waiting.popleft())
        return self.running[-1]

    def _decode(self, sequences: tuple[Sequence, ...]) -> Decoding:
        """Share the rows of a pass among the sequences: the more there are, the less each drafts."""
        self._budget = self._config.prefill_chunk
        share = min(self._config.max_nodes, self._config.max_rows // len(sequences) - 1)
        # The last token of an answer needs no draft: verifying the root alone emits it.
        nodes = (max(0, share) if s.request.speculation and s.remaining > 1 else 0 for s in sequences)
        return Decoding(sequences, tuple(nodes))
