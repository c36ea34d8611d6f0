"""Counts what the engine does between two calls of `pop`. Knows nothing of how the figures are published."""

from __future__ import annotations

import time
from typing import Literal

from model.request import EngineStats

Phase = Literal["vision", "prefill", "draft", "verify"]


class Timed:
    """Measures the seconds spent inside a `with` block. It is lighter than a generator, since every step uses it
    several times."""

    __slots__ = ("_begun", "_counters", "_phase")

    def __init__(self, counters: Counters, phase: Phase) -> None:
        """Prepare to add the seconds to `counters` under `phase`."""
        self._counters, self._phase = counters, phase

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._counters.step_seconds.append((self._phase, time.perf_counter() - self._begun))


class Counters:
    """Counts and durations since the last `pop`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.prompt_tokens = self.generation_tokens = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = 0
        self.encoder_cache_queries = self.encoder_cache_hits = 0
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        self.accepted_per_position: list[int] = []
        self.acceptance_lengths: list[int] = []
        self.batch_sizes: list[int] = []
        self.step_tokens: list[int] = []
        self._tokens_before_step = 0
        self.step_seconds: list[tuple[str, float]] = []

    @staticmethod
    def now() -> float:
        """Return the monotonic time in seconds."""
        return time.perf_counter()

    def timed(self, phase: Phase) -> Timed:
        """Return a context manager that records the seconds of a phase, unless the block raises."""
        return Timed(self, phase)

    def drafted(self, proposed: int, emitted: int) -> None:
        """Count one verify step of one sequence.

        proposed: draft tokens verified; emitted: tokens emitted, which is the acceptance length. All emitted tokens but
        the last are accepted draft tokens, one per position. So the sum of acceptance lengths is drafts + accepted
        tokens, also if an answer ends in the middle of a step.
        """
        accepted = emitted - 1
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted
        self.acceptance_lengths.append(emitted)
        missing = accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * max(0, missing)
        for position in range(accepted):
            self.accepted_per_position[position] += 1

    def end_step(self) -> None:
        """Count the tokens of the step that ends here: those of prompts, cached ones included, and those generated."""
        tokens = self.prompt_tokens + self.generation_tokens
        self.step_tokens.append(tokens - self._tokens_before_step)
        self._tokens_before_step = tokens

    def pop(self, *, running: int, waiting: int, kv_cache_usage: float) -> EngineStats:
        """Return the counts since the last call, with the present gauges, and reset them."""
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
            step_tokens=tuple(self.step_tokens),
            step_seconds=tuple(self.step_seconds),
        )
        self.reset()
        return stats
