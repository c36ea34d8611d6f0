"""The ways of answering that are compared, behind one method. An arm measures itself and knows of no other."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol, TypeVar

from model.bench.reference import Conversation, Reference
from model.bench.replay import ReplayDrafter
from model.engine.engine import Engine
from model.request import Request, SamplingParams

T = TypeVar("T")
PHASES = ("vision", "prefill", "draft", "verify")


@dataclass(frozen=True)
class Run:
    """What answering some requests took, all together. Times in seconds."""

    answers: tuple[tuple[int, ...], ...]
    seconds: float
    decode_seconds: float  # without tokenising, vision and prefill
    first_token_seconds: float  # summed over requests: from their submission to their first token
    phases: dict[str, float] = field(default_factory=dict)  # empty where an arm cannot tell
    drafts: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()  # drafts of which the first, the second, ... token was accepted

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Without the first token of each answer, which comes out of prefill. 0 where no answer has a second one."""
        tokens = self.num_tokens - len(self.answers)
        return tokens / self.decode_seconds if tokens and self.decode_seconds > 0 else 0.0


def rotated(arms: Sequence[T], repeat: int) -> tuple[T, ...]:
    """All arms, beginning with another one in each repeat, so that none always goes first."""
    first = repeat % len(arms)
    return (*arms[first:], *arms[:first])


def combined(runs: Sequence[Run]) -> Run:
    """Sum runs up to one."""
    phases: Counter[str] = Counter()
    for run in runs:
        phases.update(run.phases)
    return Run(
        answers=tuple(answer for run in runs for answer in run.answers),
        seconds=sum(run.seconds for run in runs),
        decode_seconds=sum(run.decode_seconds for run in runs),
        first_token_seconds=sum(run.first_token_seconds for run in runs),
        phases=dict(phases),
        drafts=sum(run.drafts for run in runs),
        accepted=sum(run.accepted for run in runs),
        accepted_at=tuple(map(sum, zip_longest(*(run.accepted_at for run in runs), fillvalue=0))),
    )


class Arm(Protocol):
    name: str

    def run(self, requests: Sequence[Request]) -> Run:
        """Answer all requests, submitted at once."""
        ...


class GenerateArm:
    """transformers' `generate`, one call for all requests. It samples with the seed of the first."""

    name = "generate"

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def run(self, requests: Sequence[Request]) -> Run:
        longest = max(request.params.max_tokens for request in requests)
        params = replace(requests[0].params, max_tokens=longest)
        begun = time.perf_counter()
        generated = self._reference.generate([request.messages for request in requests], params)
        ended = time.perf_counter()
        answers = zip(generated.tokens, requests, strict=True)
        first = generated.first_token_at - begun
        return Run(
            tuple(tokens[: request.params.max_tokens] for tokens, request in answers),
            ended - begun,
            ended - generated.first_token_at,
            first * len(requests),
        )


class EngineArm:
    """The engine with one drafter."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.engine = engine

    def run(self, requests: Sequence[Request], *, in_flight: int | None = None) -> Run:
        """Answer all requests, submitted at once; with `in_flight`, so many are kept running until none is left."""
        engine = self.engine
        engine.pop_stats()
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        pending = deque(requests)
        drafts = accepted = 0
        first_token_seconds = adding = 0.0
        begun = time.perf_counter()
        running = 0
        while pending or engine.has_work:
            before = time.perf_counter()
            while pending and (in_flight is None or running < in_flight):
                engine.add(pending.popleft())
                running += 1
            adding += time.perf_counter() - before
            for output in engine.step():
                answers[output.request_id] += [token.id for token in output.tokens]
                if output.stats is not None:
                    running -= 1
                    drafts, accepted = drafts + output.stats.drafts, accepted + output.stats.accepted_tokens
                    first_token_seconds += output.stats.time_to_first_token
                if output.finish_reason not in (None, "stop", "length"):
                    raise RuntimeError(f"a request ended with {output.finish_reason}: {output.error}")
        seconds = time.perf_counter() - begun
        phases = dict.fromkeys(PHASES, 0.0)
        stats = engine.pop_stats()
        for phase, spent in stats.step_seconds:
            phases[phase] += spent
        return Run(
            answers=tuple(tuple(answer) for answer in answers.values()),
            seconds=seconds,
            decode_seconds=seconds - adding - phases["vision"] - phases["prefill"],
            first_token_seconds=first_token_seconds,
            phases=phases,
            drafts=drafts,
            accepted=accepted,
            accepted_at=stats.accepted_per_position,
        )


class ReplayArm:
    """A simulated draft that is right with probability `accuracy` a token: see replay.py.

    Requests that are new to it are answered without a draft first, which is not measured.
    """

    def __init__(self, accuracy: float, plain: EngineArm, engine: Engine) -> None:
        """plain: gives the answers to replay. engine: works with the simulated draft while this arm runs."""
        self._drafter = ReplayDrafter(accuracy, engine.target.vocab_size)
        self._plain, self._replaying = plain, EngineArm(self._drafter.name, engine)
        self._known: set[tuple[int, SamplingParams]] = set()
        self._conversations: list[Conversation] = []  # kept, so that no other gets the same id
        self.name = self._drafter.name

    def run(self, requests: Sequence[Request]) -> Run:
        keys = {(id(request.messages), request.params) for request in requests}
        if not keys <= self._known:
            answers = self._plain.run(requests).answers
            for request, answer in zip(requests, answers, strict=True):
                self._drafter.learn(self._plain.engine.target.prompt(request.messages), answer)
            self._known |= keys
            self._conversations += [request.messages for request in requests]
        self._replaying.engine.use(self._drafter)
        return self._replaying.run(requests)
