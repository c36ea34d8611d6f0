"""Collect the data of a draft's training: prompts about media, and the answers that the *target itself* writes to them.

A draft trained on text of other authors loses much acceptance length. Answers are therefore always the target's,
sampled at several temperatures. They are stored on disk as token ids, which are small; hidden states are captured
during training.
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
from model.request import Grammar, Message, Request, RequestError, SamplingParams

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
MAX_TOKENS = 160


class Unusable(Exception):
    """Raised for a prompt that the target cannot take, or whose media cannot be read; the message says why."""


class Interrupted(Exception):
    """Raised when training stops on request; all progress has been saved."""


class Prompts(Protocol):
    """Give access to a data set by prompt number, so that media need not be kept in memory.

    A number must name the same prompt in every run.
    """

    @property
    def train(self) -> Sequence[int]:
        """List the numbers of the prompts that a draft is trained on."""
        ...

    @property
    def held_out(self) -> Sequence[int]:
        """List the numbers of the prompts that a draft is only measured on."""
        ...

    @property
    def digest(self) -> str:
        """Identify the prompts by a text that changes when they change."""
        ...

    @property
    def summary(self) -> str:
        """Describe the data in one line for the model card."""
        ...

    def messages(self, number: int) -> tuple[Message, ...]:
        """Return the conversation up to the point where the target answers. Raises Unusable."""
        ...

    def grammar(self, number: int) -> Grammar | None:
        """Return the grammar that the answer to a prompt follows; None if it may be any text."""
        ...

    def kind(self, number: int) -> str:
        """Name the kind of a prompt. All prompts of a batch have one kind, and figures are reported by kind."""
        ...


def by_kind(prompts: Prompts) -> dict[str, list[int]]:
    """Group the numbers of held-out prompts by kind, in their order in the data."""
    kinds: dict[str, list[int]] = {}
    for number in prompts.held_out:
        kinds.setdefault(prompts.kind(number), []).append(number)
    return kinds


@dataclass(frozen=True)
class Example:
    """Hold the number of a prompt, the token ids of the target's answer to it, and the grammar that it follows."""

    number: int
    answer: tuple[int, ...]
    grammar: Grammar | None = None


def write_answers(
    engine: Engine,
    messages: Callable[[int], tuple[Message, ...]],
    numbers: Iterable[int],
    file: Path,
    *,
    grammar: Callable[[int], Grammar | None] = lambda _: None,
    temperatures: tuple[float, ...] = TEMPERATURES,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[Example]:
    """Let the target answer every prompt in batches, and skip answers that are already in `file`.

    Each finished answer is appended to `file` as one JSON line. A prompt that cannot be used is reported once and
    written to `file` as well, so that later runs do not try it again. Prompt `number` is sampled at
    `temperatures[number % len(temperatures)]`, within `grammar(number)`; one that cannot be compiled makes the prompt
    unusable.

    Returns the examples in ascending order of prompt number. Raises Interrupted once `stop()` is true; unfinished
    answers are lost.
    """
    known = {e.number: e for e in read_answers(file)}
    wanted = sorted(set(numbers))
    left_out = unusable(file)
    missing = [n for n in wanted if n not in known and n not in left_out]
    pending, answers = iter(missing), dict[int, list[int]]()
    # Line buffering: lines already written survive even SIGKILL.
    with (
        file.open("a", buffering=1) as out,
        tqdm(total=len(missing), desc="answers", mininterval=5, disable=None if missing else True) as bar,
    ):
        if out.tell() and not file.read_text().endswith("\n"):
            out.write("\n")  # terminate a line that a kill cut short
        while True:
            while len(engine.scheduler.waiting) + len(engine.scheduler.running) < engine.info.max_num_seqs:
                number = next(pending, None)
                if number is None:
                    break
                params = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=temperatures[number % len(temperatures)],
                    seed=number + 1_000_003 * seed,
                    grammar=grammar(number),
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
    """Return the `count` tokens that occur most often in answers, in ascending order of id.

    The tokens of `always` come first. If answers contain too few different tokens, the lowest token ids fill the rest:
    a BPE learns the most frequent tokens of its corpus first.
    """
    times = Counter(token for example in examples for token in example.answer)
    best = dict.fromkeys(
        [*always, *(token for token, _ in sorted(times.items(), key=lambda each: (-each[1], each[0])))]
    )
    others = (token for token in range(count + len(best)) if token not in best)
    return sorted(islice(chain(best, others), count))


def read_answers(file: Path) -> list[Example]:
    """Read the examples of an answers file; a missing file has none."""
    return [Example(r["number"], tuple(r["answer"])) for r in _rows(file) if "answer" in r]


def unusable(file: Path) -> dict[int, str]:
    """Read which prompts were left out of an answers file: number -> reason."""
    return {r["number"]: r["unusable"] for r in _rows(file) if "unusable" in r}


def _rows(file: Path) -> list[dict[str, Any]]:
    """Parse the complete lines of an answers file.

    A line that a kill cut short does not end with a brace, and is skipped.
    """
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
