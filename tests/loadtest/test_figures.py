"""Figures from records whose truth is known, and the doubts that a report must voice."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.figures import NUM_SLICES, Objectives, Trust, client_figures, doubts, quantiles
from loadtest.plan import Outcome, Record
from loadtest.scrape import Scrape, server_figures


def record(start: float, first: float, end: float, tokens: int = 11, **more: Any) -> Record:
    return Record("image", start, end, 1, first=first, tokens=tokens, num_events=3, **more)


def outcome(*records: Record, **more: Any) -> Outcome:
    given: dict[str, Any] = {"cpu_share": 0.1, "machine_busy": 0.5, "lag": [0.001] * 100, "truncated": False} | more
    return Outcome(list(records), (0.0, 10.0), **given)


def test_throughput_is_what_arrived_in_the_window() -> None:
    """A request that the window's end cuts counts for what had arrived by then, and one that failed counts, too."""
    inside, cut = record(0.0, 1.0, 2.0), record(8.0, 9.0, 11.0)
    found = client_figures(outcome(inside, cut), Objectives())
    assert found["tokens_per_second"] == pytest.approx((11 + 1 + 5) / 10)
    assert found["requests_per_second"] == pytest.approx(1 / 10), "only one ended in the window"
    assert found["answered"] == 2
    assert len(found["slices"]) == NUM_SLICES
    assert sum(part["tokens_per_second"] for part in found["slices"]) / NUM_SLICES == pytest.approx(1.7)


def test_goodput_counts_answers_that_kept_to_both_objectives() -> None:
    good, late, slow = record(0, 0.5, 1.0), record(0, 2.0, 2.1), record(0, 0.5, 5.0)
    failed = record(0, 0.5, 0.6, failure="dropped")
    found = client_figures(outcome(good, late, slow, failed), Objectives(ttft=1.0, seconds_per_token=0.1))
    assert found["goodput"] == pytest.approx(1 / 10)
    assert found["goodput_share"] == pytest.approx(1 / 4)
    assert found["failures"] == {"dropped": 1}


def test_times_are_of_requests_that_began_in_the_window() -> None:
    found = client_figures(outcome(record(-1.0, 5.0, 6.0), record(1.0, 1.5, 2.5)), Objectives())
    assert found["ttft"]["number"] == 1
    assert found["ttft"]["p50"] == pytest.approx(0.5)
    assert found["seconds_per_token"]["p50"] == pytest.approx(0.1)


def test_quantiles_are_values_that_occurred() -> None:
    found = quantiles([float(number) for number in range(100)])
    assert found is not None
    assert (found["p50"], found["p95"], found["p99"], found["max"]) == (50, 95, 99, 99)
    assert quantiles([]) is None


CLEAN = {"generation_tokens": 440, "mean_ttft": 0.5, "mean_seconds_per_token": 0.1, "encoder_cache_hit_share": 0.0}
CLEAN |= {"worker_restarts": 0.0}


@pytest.mark.parametrize(
    ("generator", "server", "others", "words"),
    [
        ({}, {}, 0.0, None),
        ({"cpu_share": 0.9}, {}, 0.0, "90% of a core"),
        ({"lag": [0.2] * 100}, {}, 0.0, "late by 200 ms"),
        ({"lag": [0.001] * 99 + [3.0]}, {}, 0.0, "stood still for 3.0 s"),
        ({"truncated": True}, {}, 0.0, "--max-requests"),
        ({}, {"generation_tokens": 480}, 0.0, "told of 440 tokens, the service counted 480"),
        ({}, {"mean_ttft": 0.2}, 0.0, "200.0 ms: something between them"),
        ({}, {"mean_seconds_per_token": 0.02}, 0.0, "20.0 ms: something between them"),
        ({}, {"encoder_cache_hit_share": 0.5}, 0.0, "50% of the media"),
        ({}, {"worker_restarts": 1.0}, 0.0, "workers died"),
        ({}, {}, 0.6, "other processes used 60%"),
    ],
)
def test_what_casts_doubt_on_a_run_is_said(
    generator: dict[str, Any], server: dict[str, Any], others: float, words: str | None
) -> None:
    seen = outcome(*(record(i / 10, i / 10 + 0.5, i / 10 + 1.5) for i in range(40)), **generator)
    run = {"client": client_figures(seen, Objectives()), "server": CLEAN | server, "others_share": others}
    found = doubts(run, seen, Trust(), Objectives())
    assert len(found) == (words is not None), found
    assert words is None or words in found[0]


def test_few_requests_cast_doubt() -> None:
    seen = outcome(record(0, 1, 2))
    run = {"client": client_figures(seen, Objectives()), "server": None, "others_share": None}
    assert "only 1 requests" in doubts(run, seen, Trust(), Objectives())[0]


def test_what_the_service_counted_is_the_difference_of_two_scrapes() -> None:
    before, after = Scrape(), Scrape()
    for scrape, factor in ((before, 1), (after, 3)):
        for name, value in (("drafts", 10), ("draft_tokens", 70), ("accepted_tokens", 40)):
            scrape.samples[f"flash_spec_{name}_total"][(("worker", "0"),)] = value * factor
            scrape.samples[f"flash_spec_{name}_total"][(("worker", "1"),)] = value * factor
        scrape.samples["flash_generation_tokens_total"][()] = 100 * factor
    found = server_figures(after - before)
    assert found["acceptance_length"] == pytest.approx(1 + 160 / 40)
    assert found["accepted_share"] == pytest.approx(4 / 7)
    assert found["share_of_output_drafted"] == pytest.approx(160 / 200)
