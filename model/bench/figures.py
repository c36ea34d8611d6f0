"""Computes the rows of the table: medians over repeats, and ratios within one repeat."""

from __future__ import annotations

from statistics import median
from typing import Any

from model.bench.arms import Run, combined

BASES = {"plain": "off", "generate": "generate"}  # speedup_over_<key>: over the arm of that name


def rows(runs: dict[str, list[Run]], *, task: str, target: str, sampling: str, batch: int) -> list[dict[str, Any]]:
    """Compute one row per arm. runs[arm][r]: the arm's run in repeat r, with the same prompts as all others."""
    return [
        {
            "task": task,
            "target": target,
            "drafter": arm,
            "sampling": sampling,
            "batch": batch,
            **_speed(runs[arm]),
            **_speculation(runs[arm]),
            **_ratios(runs, arm),
            "same_tokens_as_plain": _agreement(runs, arm),
        }
        for arm in runs
    ]


def _speed(repeats: list[Run]) -> dict[str, Any]:
    requests = len(repeats[0].answers)
    return {
        "tokens_per_second": round(median(run.tokens_per_second for run in repeats), 2),
        "decode_tokens_per_second": round(median(run.decode_tokens_per_second for run in repeats), 2),
        "time_to_first_token": round(median(run.first_token_seconds / requests for run in repeats), 4),
        "requests": requests,
        "tokens": repeats[0].num_tokens,
        "repeats": len(repeats),
    }


def _speculation(repeats: list[Run]) -> dict[str, Any]:
    """Acceptance length: tokens that a verify step with a draft emitted, bonus token included; 1 without drafts.
    accepted_at: the share of drafts whose first, second, ... token was accepted."""
    total = combined(repeats)
    drafts, accepted = total.drafts, total.accepted
    seconds = sum(run.seconds for run in repeats)
    share = {phase: sum(run.phases[phase] for run in repeats) / seconds for phase in repeats[0].phases}
    if share:
        share["other"] = 1.0 - sum(share.values())
    return {
        "acceptance_length": round(1.0 + accepted / drafts, 3) if drafts else 1.0,
        "accepted_at": [round(count / drafts, 4) for count in total.accepted_at] if drafts else [],
        "share": {phase: round(value, 4) for phase, value in share.items()} or None,
    }


def _ratios(runs: dict[str, list[Run]], arm: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base, other in BASES.items():
        for kind, speed in (("", "tokens_per_second"), ("decode_", "decode_tokens_per_second")):
            name = f"{kind}speedup_over_{base}"
            ratios = [
                getattr(mine, speed) / getattr(theirs, speed)
                for mine, theirs in zip(runs[arm], runs.get(other, []), strict=False)
                if getattr(theirs, speed)
            ]
            found[name] = round(median(ratios), 3) if ratios else None
            found[f"{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None
    return found


def _agreement(runs: dict[str, list[Run]], arm: str) -> float | None:
    """The share of requests that have the tokens of plain decoding; model.bench.equality shows what differs."""
    if "off" not in runs:
        return None
    pairs = [
        mine == plain
        for own, plain_run in zip(runs[arm], runs["off"], strict=True)
        for mine, plain in zip(own.answers, plain_run.answers, strict=True)
    ]
    return round(sum(pairs) / len(pairs), 4)
