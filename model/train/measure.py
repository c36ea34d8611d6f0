"""Measure the acceptance length of a draft on held-out prompts, with the engine that serves it.

The engine must be set to draft always, whatever drafting costs on this machine: the figures are about the draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from model.engine.engine import Engine
from model.request import Grammar, Message, Request, RequestError, SamplingParams
from model.train.data import Unusable


@dataclass(frozen=True)
class Acceptance:
    """Count the outcome of verify steps that had a draft.

    tokens: emitted by all those steps. accepted[j]: number of drafts whose position j + 1 was accepted. prompts: number
    of prompts begun.
    """

    tokens: int = 0
    drafts: int = 0
    accepted: tuple[int, ...] = ()
    prompts: int = 0

    def __add__(self, other: Acceptance) -> Acceptance:
        """Sum the counts, position by position."""
        accepted = tuple(a + b for a, b in zip_longest(self.accepted, other.accepted, fillvalue=0))
        return Acceptance(
            self.tokens + other.tokens, self.drafts + other.drafts, accepted, self.prompts + other.prompts
        )

    @property
    def length(self) -> float:
        """Return the mean number of tokens that a verify step emits; 1 if nothing was drafted."""
        return self.tokens / self.drafts if self.drafts else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return acceptance length, acceptance rate by position, and the counts of drafts and prompts."""
        return {
            "length": round(self.length, 3),
            "positions": [round(count / self.drafts, 3) for count in self.accepted],
            "drafts": self.drafts,
            "prompts": self.prompts,
        }


def miscalibration(calibration: Sequence[tuple[float, float, int]]) -> float:
    """Average the absolute error of a draft's confidences, weighted by nodes.

    calibration: as returned by `SpeculationController.calibration`.
    """
    nodes = sum(count for _, _, count in calibration)
    return sum(count * abs(confidence - seen) for confidence, seen, count in calibration) / max(1, nodes)


def acceptance(
    engine: Engine,
    messages: Callable[[int], tuple[Message, ...]],
    numbers: Sequence[int],
    *,
    grammar: Callable[[int], Grammar | None] = lambda _: None,
    max_tokens: int = 160,
    temperature: float = 0.0,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Acceptance:
    """Answer prompts and count accepted tokens.

    After `seconds`, or once `stop()` is true, unfinished answers are aborted and count with the tokens they have.
    Prompts that cannot be used are skipped.
    """
    engine.pop_stats()
    deadline = None if seconds is None else time.monotonic() + seconds
    pending, begun, measured = list(reversed(numbers)), 0, Acceptance()
    while True:
        while pending and len(engine.scheduler.waiting) + len(engine.scheduler.running) < engine.info.max_num_seqs:
            number = pending.pop()
            params = SamplingParams(
                max_tokens=max_tokens, temperature=temperature, seed=number, grammar=grammar(number)
            )
            try:
                engine.add(Request(str(number), messages(number), params))
            except (Unusable, RequestError):
                continue  # an unreadable held-out file says nothing about the draft
            begun += 1
        if not engine.has_work:
            break
        engine.step()
        stats = engine.pop_stats()
        measured += Acceptance(sum(stats.acceptance_lengths), stats.drafts, tuple(stats.accepted_per_position))
        if stop() or (deadline is not None and time.monotonic() > deadline):
            for sequence in (*engine.scheduler.running, *engine.scheduler.waiting):
                engine.abort(sequence.request.request_id)
            break
    return measured + Acceptance(prompts=begun)
