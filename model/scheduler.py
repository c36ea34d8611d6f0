"""Who runs in the next step, and how much of each. Touches no tensor; all lists of sequences live here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from model.config import EngineConfig
from model.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt positions start..end of one sequence are computed in this step."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class Decision:
    """One step's work. nodes[i]: how many draft nodes decoding[i] may verify."""

    admitted: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]
    decoding: tuple[Sequence, ...]
    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.nodes) == len(self.decoding)
        assert not {c.sequence for c in self.chunks} & set(self.decoding), "a sequence both prefills and decodes"
        assert all(c.start < c.end <= len(c.sequence.prompt.ids) for c in self.chunks)


class Scheduler:
    """First come, first served. New sequences join and finished ones leave at every step."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
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

    def schedule(self, free_slots: int) -> Decision:
        """Admit while slots last, hand out the prefill budget in order of arrival, decode everyone else."""
        admitted = [self.waiting.popleft() for _ in range(min(free_slots, len(self.waiting)))]
        self.running += admitted
        budget, chunks = self._config.prefill_chunk, []
        for sequence in self.running:
            if sequence.prefilling and budget > 0:
                end = min(sequence.computed + budget, len(sequence.prompt.ids))
                chunks.append(Chunk(sequence, sequence.computed, end))
                budget -= end - sequence.computed
        decoding = tuple(s for s in self.running if not s.prefilling)
        return Decision(tuple(admitted), tuple(chunks), decoding, self._nodes(decoding))

    def _nodes(self, decoding: tuple[Sequence, ...]) -> tuple[int, ...]:
        """Share the rows of a step among the sequences: the more there are, the less each drafts."""
        if not decoding:
            return ()
        share = min(self._config.max_nodes, self._config.max_rows // len(decoding) - 1)
        # The last token of an answer needs no draft: verifying the root alone emits it.
        return tuple(max(0, share) if s.request.speculation and s.remaining > 1 else 0 for s in decoding)
