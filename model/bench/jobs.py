"""Ways in which one engine can be given the same requests: each alone, or all mixed with what else is going on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from model.bench.reference import Conversation
from model.demo.prompts import TASKS, Task
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


def task_of(case: int) -> Task:
    """The tasks take turns, so that any number of cases mixes them."""
    return TASKS[case % len(TASKS)]


@dataclass(frozen=True)
class Job:
    case: int  # index of its conversation
    setting: Setting
    speculation: bool = True
    aborted_after: int | None = None  # steps

    def params(self, max_tokens: int) -> SamplingParams:
        seed = 1000 * self.case + SETTINGS.index(self.setting)
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.setting.temperature, top_p=self.setting.top_p, seed=seed
        )


def alone(
    engine: Engine,
    jobs: Iterable[Job],
    conversations: Mapping[int, Conversation],
    max_tokens: int,
    done: Callable[[], object] = lambda: None,
) -> list[Answer]:
    """Each by itself: the engine is empty when it comes, and nothing comes beside it."""
    answers = []
    for job in jobs:
        answer: list[int] = []
        engine.add(Request("alone", conversations[job.case], job.params(max_tokens), job.speculation))
        while engine.has_work:
            answer += [token.id for output in engine.step() for token in output.tokens]
        answers.append(tuple(answer))
        done()
    return answers


def mixed(
    engine: Engine,
    jobs: list[Job],
    conversations: Mapping[int, Conversation],
    max_tokens: int,
    *,
    seed: int,
    in_flight: int = 16,
    done: Callable[[], object] = lambda: None,
) -> list[Answer]:
    """All in an order and with arrivals drawn from `seed`, up to `in_flight` at once; what was aborted is cut short.

    The crowd is let grow and shrink, so that batches of every size occur.
    """
    rng = random.Random(seed)
    answers: list[list[int]] = [[] for _ in jobs]
    coming = rng.sample(range(len(jobs)), len(jobs))
    steps_left: dict[int, int] = {}  # of requests that will be aborted
    running: set[int] = set()
    crowd = in_flight
    while coming or engine.has_work:
        if rng.random() < 0.05:
            crowd = rng.randint(1, in_flight)
        for _ in range(rng.choice((0, 0, 0, 1, 2, 5)) if running else 1):
            if coming and len(running) < crowd:
                number = coming.pop()
                job = jobs[number]
                engine.add(Request(str(number), conversations[job.case], job.params(max_tokens), job.speculation))
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
        raise AssertionError("the engine is idle, yet a slot is taken")
    return [tuple(answer) for answer in answers]


def crowd_of(cases: Iterable[int], settings: Iterable[Setting], *, seed: int) -> list[Job]:
    """Every case under every setting; some without speculation, and as many again as a fifth that are aborted."""
    rng = random.Random(seed)
    pairs = [(case, setting) for setting in settings for case in cases]
    jobs = [Job(case, setting, speculation=rng.random() < 0.8) for case, setting in pairs]
    doomed = rng.sample(pairs, len(pairs) // 5)
    return jobs + [Job(case, setting, aborted_after=rng.randint(0, 20)) for case, setting in doomed]
