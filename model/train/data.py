"""What a draft learns from: prompts about media, and the answers that the *target itself* writes to them.

Training on other people's text costs much acceptance, so answers are always the target's, sampled at several
temperatures. They are kept on disk as token ids (small); hidden states are captured on the fly when they are needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from model.engine.engine import Engine
from model.request import Message, Request, RequestError, SamplingParams

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
MAX_TOKENS = 160


class Unusable(Exception):
    """A prompt whose media cannot be read, or that the target cannot take; the message says which, and why."""


class Interrupted(Exception):
    """Someone asked to stop; all that was done is saved."""


class Prompts(Protocol):
    """A data set: prompts by number, so that media need not be kept. Numbers stay what they are between runs."""

    @property
    def train(self) -> Sequence[int]: ...

    @property
    def held_out(self) -> Sequence[int]: ...

    @property
    def digest(self) -> str:
        """Changes when the prompts do."""
        ...

    @property
    def summary(self) -> str:
        """One line, for the model card."""
        ...

    def messages(self, number: int) -> tuple[Message, ...]:
        """The conversation up to where the target answers. Raises Unusable."""
        ...

    def kind(self, number: int) -> str:
        """What it is about, in words. A batch is of one kind, and figures are told for each."""
        ...


def by_kind(prompts: Prompts) -> dict[str, list[int]]:
    """The held-out ones."""
    kinds: dict[str, list[int]] = {}
    for number in prompts.held_out:
        kinds.setdefault(prompts.kind(number), []).append(number)
    return kinds


@dataclass(frozen=True)
class Example:
    """One prompt and the target's answer to it."""

    number: int
    answer: tuple[int, ...]


def write_answers(
    engine: Engine,
    messages: Callable[[int], tuple[Message, ...]],
    numbers: Iterable[int],
    file: Path,
    *,
    temperatures: tuple[float, ...] = TEMPERATURES,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[Example]:
    """Let the target answer every prompt, in batches; answers already in `file` are not written again.

    A prompt that cannot be used is left out, told once, and written down so that no later run tries it again.
    """
    known = {e.number: e for e in read_answers(file)}
    wanted = sorted(set(numbers))
    left_out = unusable(file)
    missing = [n for n in wanted if n not in known and n not in left_out]
    pending, answers = iter(missing), dict[int, list[int]]()
    # Line by line: what is written survives even a kill that nothing can catch.
    with (
        file.open("a", buffering=1) as out,
        tqdm(total=len(missing), desc="answers", mininterval=5, disable=None if missing else True) as bar,
    ):
        if out.tell() and not file.read_text().endswith("\n"):
            out.write("\n")  # after a line torn by a kill, the next begins afresh
        while True:
            while len(engine.scheduler.waiting) + len(engine.scheduler.running) < engine.info.max_num_seqs:
                number = next(pending, None)
                if number is None:
                    break
                params = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=temperatures[number % len(temperatures)],
                    seed=number + 1_000_003 * seed,
                )
                try:
                    engine.add(Request(str(number), messages(number), params))
                except (Unusable, RequestError) as error:
                    bar.write(f"left out: {error}")
                    out.write(json.dumps({"number": number, "unusable": str(error)}) + "\n")
                    bar.update()
                    continue
                answers[number] = []
            if not engine.has_work:
                break
            if stop():
                for number in answers:
                    engine.abort(str(number))
                raise Interrupted
            for output in engine.step():
                number = int(output.request_id)
                answers[number] += [t.id for t in output.tokens]
                if output.finish_reason:
                    known[number] = Example(number, tuple(answers.pop(number)))
                    out.write(json.dumps({"number": number, "answer": known[number].answer}) + "\n")
                    bar.update()
            engine.pop_stats()
    return [known[n] for n in wanted if n in known]


def frequent(examples: Iterable[Example], count: int, always: Iterable[int]) -> list[int]:
    """The `count` tokens that answers have most often, ascending; `always` among them. Where answers have fewer, those
    of the lowest ids besides, which are frequent in all text: a BPE learns them first."""
    times = Counter(token for example in examples for token in example.answer)
    best = dict.fromkeys(
        [*always, *(token for token, _ in sorted(times.items(), key=lambda each: (-each[1], each[0])))]
    )
    others = (token for token in range(count + len(best)) if token not in best)
    return sorted(islice(chain(best, others), count))


def read_answers(file: Path) -> list[Example]:
    return [Example(r["number"], tuple(r["answer"])) for r in _rows(file) if "answer" in r]


def unusable(file: Path) -> dict[int, str]:
    """Prompts that were left out, and why."""
    return {r["number"]: r["unusable"] for r in _rows(file) if "unusable" in r}


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
