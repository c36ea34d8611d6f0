"""Counts what the engine does between two readings. Knows nothing of how the figures are published."""

from __future__ import annotations

import time
from typing import Literal

from model.request import EngineStats

Phase = Literal["vision", "prefill", "draft", "verify"]


class Timed:
    """Seconds of what is done within; lighter than a generator, for there are several in every step."""

    __slots__ = ("_begun", "_counters", "_phase")

    def __init__(self, counters: Counters, phase: Phase) -> None:
        self._counters, self._phase = counters, phase

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._counters.step_seconds.append((self._phase, time.perf_counter() - self._begun))


class Counters:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = 0
        self.encoder_cache_queries = self.encoder_cache_hits = 0
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        self.accepted_per_position: list[int] = []
        self.acceptance_lengths: list[int] = []
        self.batch_sizes: list[int] = []
        self.step_seconds: list[tuple[str, float]] = []

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def timed(self, phase: Phase) -> Timed:
        return Timed(self, phase)

    def drafted(self, proposed: int, emitted: int) -> None:
        """Count one verify step of one sequence: `proposed` draft tokens, and `emitted` tokens, its acceptance length.
        All but the last are accepted draft tokens, one per position and none after the first miss. So the sum of
        acceptance lengths is drafts + accepted tokens, also where an answer ends in the middle of a step."""
        accepted = emitted - 1
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted
        self.acceptance_lengths.append(emitted)
        missing = accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * max(0, missing)
        for position in range(accepted):
            self.accepted_per_position[position] += 1

    def pop(self, *, running: int, waiting: int, kv_cache_usage: float) -> EngineStats:
        stats = EngineStats(
            running=running,
            waiting=waiting,
            kv_cache_usage=kv_cache_usage,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            drafts=self.drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            accepted_per_position=tuple(self.accepted_per_position),
            encoder_cache_queries=self.encoder_cache_queries,
            encoder_cache_hits=self.encoder_cache_hits,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
            acceptance_lengths=tuple(self.acceptance_lengths),
            batch_sizes=tuple(self.batch_sizes),
            step_seconds=tuple(self.step_seconds),
        )
        self.reset()
        return stats
