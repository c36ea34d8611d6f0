"""Finds what differs between two ways of decoding, where it begins, and whether rounding may be the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.bench.jobs import GREEDY, Answer, Job
from model.bench.margins import margin
from model.bench.reference import Reference
from model.bench.workload import Sample

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
    """`jobs[i]` should answer `expected[i]`, an aborted one its beginning, and answered `got[i]`.

    exact: both sides are promised to have the same bits, so rounding excuses no difference.
    """

    name: str
    jobs: Sequence[Job]
    expected: Sequence[Answer]
    got: Sequence[Answer]
    exact: bool = False

    def differing(self) -> list[int]:
        return [
            i
            for i, (job, expected, got) in enumerate(zip(self.jobs, self.expected, self.got, strict=True))
            if got != (expected if job.aborted_after is None else expected[: len(got)])
        ]


def find_differences(
    comparisons: Sequence[Comparison], samples: Sequence[Sample], judge: Reference, epsilon: tuple[float, float]
) -> list[Difference]:
    """List every difference with its margin, by teacher forcing in `judge`."""
    found = []
    for comparison in comparisons:
        for i in comparison.differing():
            job, expected, got = comparison.jobs[i], comparison.expected[i], comparison.got[i]
            sample, ends = samples[job.case], min(len(expected), len(got))
            at = next((p for p in range(ends) if expected[p] != got[p]), ends)
            ours, theirs = (answer[at] if at < len(answer) else None for answer in (got, expected))
            near = None
            if ours is not None and theirs is not None:  # an answer that only ended too early was not a close call
                logits = judge.logits(sample.conversation, expected[:at])
                near = margin(logits, job.params(sample), at, (theirs, ours))
            found.append(
                Difference(
                    comparison.name,
                    str(job.setting),
                    job.case,
                    sample.task,
                    at,
                    theirs,
                    ours,
                    near,
                    not comparison.exact and near is not None and near < epsilon[job.setting != GREEDY],
                )
            )
    return found


def summarize(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Count requests, tokens and differences of every comparison and setting."""
    rows = []
    for comparison in comparisons:
        differing = set(comparison.differing())
        for setting in dict.fromkeys(job.setting for job in comparison.jobs):
            numbers = [i for i, job in enumerate(comparison.jobs) if job.setting == setting]
            rows.append({
                "comparison": comparison.name,
                "setting": str(setting),
                "requests": len(numbers),
                "tokens": sum(len(comparison.got[i]) for i in numbers),
                "differences": len(differing.intersection(numbers)),
            })  # fmt: skip
    return rows
