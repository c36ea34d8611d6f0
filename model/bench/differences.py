"""What differs between two ways of decoding, where it begins, and whether rounding may be blamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.bench.jobs import GREEDY, Answer, Job, task_of
from model.bench.margins import margin
from model.bench.reference import Conversation, Reference

# Below these margins rounding may decide: (greedy: a share of the logits' range, sampled: a probability).
EPSILON = {"float64": (1e-12, 1e-12), "float32": (1e-5, 1e-5), "bfloat16": (0.02, 0.02), "float16": (0.005, 0.005)}


@dataclass(frozen=True)
class Difference:
    comparison: str
    setting: str
    case: int
    task: str
    position: int
    expected: int | None  # None: that answer had ended
    got: int | None
    margin: float | None
    excused: bool


@dataclass(frozen=True)
class Comparison:
    """`jobs[i]` must have answered `got[i]`; an aborted one the beginning of `expected[i]`."""

    name: str
    jobs: Sequence[Job]
    expected: Sequence[Answer]
    got: Sequence[Answer]

    def differing(self) -> list[int]:
        return [
            i
            for i, (job, expected, got) in enumerate(zip(self.jobs, self.expected, self.got, strict=True))
            if got != (expected if job.aborted_after is None else expected[: len(got)])
        ]


def differences(
    comparisons: Sequence[Comparison],
    conversations: Mapping[int, Conversation],
    judge: Reference,
    max_tokens: int,
    epsilon: tuple[float, float],
) -> list[Difference]:
    """Every difference with its margin, by teacher forcing in `judge`."""
    found = []
    for comparison in comparisons:
        for i in comparison.differing():
            job, expected, got = comparison.jobs[i], comparison.expected[i], comparison.got[i]
            ends = min(len(expected), len(got))
            at = next((p for p in range(ends) if expected[p] != got[p]), ends)
            ours, theirs = (answer[at] if at < len(answer) else None for answer in (got, expected))
            near = None
            if ours is not None and theirs is not None:  # an answer that only ended too early was not a close call
                logits = judge.logits(conversations[job.case], expected[:at])
                near = margin(logits, job.params(max_tokens), at, (theirs, ours))
            found.append(
                Difference(
                    comparison.name,
                    str(job.setting),
                    job.case,
                    task_of(job.case),
                    at,
                    theirs,
                    ours,
                    near,
                    near is not None and near < epsilon[job.setting != GREEDY],
                )
            )
    return found


def summary(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    made = []
    for comparison in comparisons:
        differing = set(comparison.differing())
        for setting in dict.fromkeys(job.setting for job in comparison.jobs):
            mine = [i for i, job in enumerate(comparison.jobs) if job.setting == setting]
            made.append({
                "comparison": comparison.name,
                "setting": str(setting),
                "requests": len(mine),
                "tokens": sum(len(comparison.got[i]) for i in mine),
                "differences": len(differing.intersection(mine)),
            })  # fmt: skip
    return made
