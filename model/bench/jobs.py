"""Puts the same requests to one engine in two ways: each alone, or many at once that come and go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from model.bench.workload import Sample
from model.engine.engine import Engine
from model.request import Request, SamplingParams

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """How tokens are chosen; a key of every comparison."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __str__(self) -> str:
        if self.temperature == 0.0:
            return "greedy"
        return f"T={self.temperature:g}" + (f" top_p={self.top_p:g}" if self.top_p < 1.0 else "")


GREEDY = Setting()
SETTINGS = (GREEDY, Setting(0.7), Setting(1.0), Setting(0.7, 0.9), Setting(1.0, 0.9))


@dataclass(frozen=True)
class Job:
    """One prompt under one setting."""

    case: int  # its sample's number
    setting: Setting
    speculation: bool = True
    aborted_after: int | None = None  # steps

    def params(self, sample: Sample) -> SamplingParams:
        seed = 1000 * self.case + SETTINGS.index(self.setting)
        return SamplingParams(
            max_tokens=sample.max_tokens, temperature=self.setting.temperature, top_p=self.setting.top_p, seed=seed
        )

    def request(self, request_id: str, samples: Sequence[Sample]) -> Request:
        sample = samples[self.case]
        return Request(request_id, sample.conversation, self.params(sample), self.speculation)


def answer_alone(
    engine: Engine, jobs: Iterable[Job], samples: Sequence[Sample], done: Callable[[], object] = lambda: None
) -> list[Answer]:
    """Answer each job by itself: the engine is idle before it and has nothing else to do beside it."""
    answers = []
    for job in jobs:
        answer: list[int] = []
        engine.add(job.request("alone", samples))
        while engine.has_work:
            answer += [token.id for output in engine.step() for token in output.tokens]
        answers.append(tuple(answer))
        done()
    return answers


def answer_in_crowd(
    engine: Engine,
    jobs: list[Job],
    samples: Sequence[Sample],
    *,
    seed: int,
    most: int = 16,
    done: Callable[[], object] = lambda: None,
) -> list[Answer]:
    """Answer up to `most` jobs at once, in an order and with arrivals drawn from `seed`; aborted ones are cut short.

    The crowd grows and shrinks, so that batches of every size occur.
    """
    rng = random.Random(seed)
    answers: list[list[int]] = [[] for _ in jobs]
    pending = rng.sample(range(len(jobs)), len(jobs))
    steps_left: dict[int, int] = {}  # of requests that will be aborted
    running: set[int] = set()
    crowd = most
    while pending or engine.has_work:
        if rng.random() < 0.05:
            crowd = rng.randint(1, most)
        for _ in range(rng.choice((0, 0, 0, 1, 2, 5)) if running else 1):
            if pending and len(running) < crowd:
                number = pending.pop()
                job = jobs[number]
                engine.add(job.request(str(number), samples))
                running.add(number)
                if job.aborted_after is not None:
                    steps_left[number] = job.aborted_after
        for output in engine.step():
            number = int(output.request_id)
            answers[number] += [token.id for token in output.tokens]
            if output.finish_reason is not None:
                running.discard(number)
                done()
        for number in [n for n, left in steps_left.items() if left == 0 and n in running]:
            engine.abort(str(number))
            running.discard(number)
            done()
        steps_left = {number: left - 1 for number, left in steps_left.items() if left > 0}
        engine.check_integrity()
    if engine.cache.num_free != engine.cache.num_slots:
        raise AssertionError("the engine is idle, yet a slot of its cache is in use")
    return [tuple(answer) for answer in answers]


def crowd_of(cases: Iterable[int], settings: Iterable[Setting], *, seed: int) -> list[Job]:
    """Every case under every setting, a fifth without speculation; and a fifth as many again that are aborted."""
    rng = random.Random(seed)
    pairs = [(case, setting) for setting in settings for case in cases]
    jobs = [Job(case, setting, speculation=rng.random() < 0.8) for case, setting in pairs]
    aborted = rng.sample(pairs, len(pairs) // 5)
    return jobs + [Job(case, setting, aborted_after=rng.randint(0, 20)) for case, setting in aborted]
