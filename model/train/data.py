"""What a draft learns from: prompts about media, and the answers that the *target itself* writes to them.

Training on other people's text costs much acceptance, so answers are always the target's, sampled at several
temperatures. They are kept on disk as token ids (small); hidden states are captured on the fly when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from model.engine import Engine
from model.request import Message, Request, SamplingParams


@dataclass(frozen=True)
class Example:
    """One prompt (made by number, so that media need not be kept) and the target's answer to it."""

    number: int
    answer: tuple[int, ...]


def write_answers(
    engine: Engine,
    messages: Callable[[int], tuple[Message, ...]],
    numbers: Iterable[int],
    file: Path,
    *,
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7, 1.0),
    max_tokens: int = 160,
) -> list[Example]:
    """Let the target answer every prompt, in batches; answers already in `file` are not written again."""
    known = {e.number: e for e in read_answers(file)}
    wanted = sorted(set(numbers))
    missing = [n for n in wanted if n not in known]
    pending, answers = iter(missing), dict[int, list[int]]()
    with file.open("a") as out, tqdm(total=len(missing), desc="answers", mininterval=5) as bar:
        if out.tell() and not file.read_text().endswith("\n"):
            out.write("\n")  # after a line torn by a kill, the next begins afresh
        while True:
            while len(engine.scheduler.waiting) + len(engine.scheduler.running) < engine.info.max_num_seqs:
                number = next(pending, None)
                if number is None:
                    break
                params = SamplingParams(
                    max_tokens=max_tokens, temperature=temperatures[number % len(temperatures)], seed=number
                )
                engine.add(Request(str(number), messages(number), params))
                answers[number] = []
            if not engine.has_work:
                break
            for output in engine.step():
                number = int(output.request_id)
                answers[number] += [t.id for t in output.tokens]
                if output.finish_reason:
                    known[number] = Example(number, tuple(answers.pop(number)))
                    out.write(json.dumps({"number": number, "answer": known[number].answer}) + "\n")
                    bar.update()
            engine.pop_stats()
    return [known[n] for n in wanted]


def read_answers(file: Path) -> list[Example]:
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return [Example(r["number"], tuple(r["answer"])) for r in rows]
