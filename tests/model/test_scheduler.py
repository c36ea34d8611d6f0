"""Test the order of passes, with durations that the test sets: no clock decides here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.config import EngineConfig
from model.decoding.detokenize import StopStrings
from model.engine.scheduler import Chunk, Decoding, Scheduler
from model.engine.sequence import Sequence
from model.engine.speculation import SpeculationController
from model.request import Request, SamplingParams
from model.targets.prompt import TokenizedPrompt

CHUNK = 64


def sequence(name: str, length: int) -> Sequence:
    request = Request(name, (), SamplingParams(max_tokens=10_000))
    return Sequence(request, TokenizedPrompt([0] * length, (), ()), None, StopStrings(()))  # type: ignore[arg-type]


class Day:
    """Simulate a scheduler and a machine on which a pass takes `seconds(chunk)`.

    turns: for each gap between two decode steps, the prompt chunks (name, tokens) computed in it.
    """

    def __init__(self, seconds: Callable[[Chunk], float], **settings: float) -> None:
        config = EngineConfig(prefill_chunk=CHUNK, **settings)  # type: ignore[arg-type]
        self.scheduler = Scheduler(config, SpeculationController(config.max_num_seqs, config.nodes))
        self.seconds = seconds
        self.turns: list[list[tuple[str, int]]] = [[]]
        self.gaps = [0.0]

    def add(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.scheduler.add(each)

    def run(self, passes: int) -> None:
        for _ in range(passes):
            match work := self.scheduler.schedule(free_slots=8):
                case None:
                    return
                case Chunk():
                    took = self.seconds(work)
                    work.sequence.computed = work.end
                    self.turns[-1].append((work.sequence.request.request_id, work.end - work.start))
                case Decoding():
                    took = 1.0
                    self.turns.append([])
            self.gaps[-1] += took
            if isinstance(work, Decoding):
                self.gaps.append(0.0)
            self.scheduler.took(work, took)

    def read(self, each: Sequence) -> int:
        return next((i for i, turn in enumerate(self.turns) for name, _ in turn if name == each.request.request_id), -1)


def test_short_prompts_are_read_at_once_and_none_is_begun_after_a_chunk_of_them() -> None:
    day = Day(lambda chunk: 5.0)
    day.add(sequence("a", 10))
    day.run(3)
    day.add(*(sequence(name, 30) for name in "bcde"))
    day.run(12)
    assert day.turns[2:5] == [[("b", 30), ("c", 30), ("d", 30)], [("e", 30)], []]


@pytest.mark.parametrize("stretch", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("each", [0.01, 0.03, 0.1])
def test_a_long_prompt_keeps_the_others_within_the_stretch(stretch: float, each: float) -> None:
    """Per token it takes longer the more came before it; bites get smaller accordingly, and are left out in turn."""
    day = Day(lambda chunk: (chunk.end - chunk.start) * each * (1 + chunk.start / 2000), max_decode_slowdown=stretch)
    day.add(sequence("a", 10))
    day.run(3)
    day.add(long := sequence("long", 3000))
    day.run(4000)
    assert long.computed == 3000
    first = day.read(long)
    whole, last = first + 5, max(i for i, turn in enumerate(day.turns) if turn)
    bites, gaps = day.turns[whole:last], day.gaps[whole:last]
    assert all(turn in ([], [("long", turn[0][1])]) and turn[0][1] % 16 == 0 for turn in bites if turn)
    assert sum(gaps) / len(gaps) <= stretch * 1.05
    if max(turn[0][1] for turn in bites if turn) < CHUNK:
        assert sum(gaps) / len(gaps) >= 1 + (stretch - 1) / 2, "and they are as large as may be"


def test_short_prompts_pass_a_long_one_and_it_still_gets_on() -> None:
    day = Day(lambda chunk: (chunk.end - chunk.start) * 0.01)
    day.add(sequence("a", 10))
    day.run(3)
    day.add(long := sequence("long", 100_000))
    day.run(30)
    read = long.computed
    assert CHUNK * 4 < read < 100_000
    for number in range(40):
        day.add(short := sequence(f"short {number}", 60))
        now = len(day.turns) - 1
        day.run(3)
        assert 0 <= day.read(short) - now <= 1
    assert long.computed - read > 40 * 16


def test_alone_a_long_prompt_takes_whole_chunks() -> None:
    day = Day(lambda chunk: 1.0)
    day.add(sequence("long", 1000))
    day.run(16)
    assert day.turns == [[("long", 64)] * 15 + [("long", 40)]]
