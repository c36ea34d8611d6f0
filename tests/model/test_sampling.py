"""Test sampling: the distribution is transformers', and the draw depends on (seed, position) alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.decoding.sampling import choose, distribution, invert, uniform
from model.request import RequestError, SamplingParams


def params(**settings: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **settings})  # type: ignore[arg-type]


# -- uniform


@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_the_numbers_of_one_request_are_uniform(seed: int) -> None:
    """Kolmogorov-Smirnov over 20,000 positions; a poor mix of nearby positions would bend every sampled answer."""
    drawn = np.sort([uniform(seed, i) for i in range(20_000)])
    assert 0.0 <= drawn[0]
    assert drawn[-1] < 1.0
    n = len(drawn)
    distance = max(np.max(np.arange(1, n + 1) / n - drawn), np.max(drawn - np.arange(n) / n))
    assert distance < 1.95 / np.sqrt(n), "p < 0.001"


def test_the_numbers_of_one_position_are_uniform_over_seeds() -> None:
    """Users number their seeds 0, 1, 2...: neighbours must not draw alike."""
    for position in (0, 1, 77):
        drawn = np.sort([uniform(seed, position) for seed in range(20_000)])
        distance = np.max(np.abs(np.arange(1, 20_001) / 20_000 - drawn))
        assert distance < 1.95 / np.sqrt(20_000)


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """uniform(s, i) == uniform(s + 1, i - 1), say, would make request s + 1 repeat request s one token later."""
    grid = np.array([[uniform(seed, i) for i in range(300)] for seed in range(300)])
    assert len(np.unique(grid)) == grid.size
    for shifted in (grid[1:, :-1] - grid[:-1, 1:], grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]):
        assert abs(np.var(shifted) - 1 / 6) < 0.004, "the difference of two independent uniforms has variance 1/6"


def test_the_numbers_never_change() -> None:
    """A seeded answer must stay the same in later versions: changing these figures is a breaking change."""
    assert [uniform(0, 0), uniform(0, 1), uniform(42, 7), uniform(-1, 0)] == [
        0.6524484863740322,
        0.011660290489395542,
        0.2533747892796062,
        0.3662420901697574,
    ]


# -- distribution


def reference(logits: torch.Tensor, settings: SamplingParams) -> torch.Tensor:
    """Apply transformers' own warpers in transformers' own order, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p > 0.0:
        warpers.append(MinPLogitsWarper(settings.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double()).softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        params(),
        params(temperature=0.3),
        params(temperature=3.0),
        params(top_k=1),
        params(top_k=5),
        params(top_k=10_000),
        params(top_p=0.9),
        params(top_p=0.01),
        params(top_p=0.999),
        params(min_p=0.1),
        params(min_p=1.0),
        params(temperature=0.7, top_k=20, top_p=0.8),
        params(temperature=1.3, top_k=40, top_p=0.95, min_p=0.05),
    ],
    ids=lambda p: f"t{p.temperature} k{p.top_k} p{p.top_p} m{p.min_p}",
)
def test_the_distribution_is_the_one_that_transformers_draws_from(settings: SamplingParams) -> None:
    """The processors' order matters, and that each works on what the one before left."""
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(1)) * 3
    ours, theirs = distribution(logits, settings), reference(logits, settings)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_the_tiniest_temperatures_are_as_good_as_greedy() -> None:
    """Logits over 1e-320 are infinite and their softmax is NaN, from which any token at all might be drawn."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(2)) * 10
    for temperature in (1e-3, 1e-30, 1e-308, 5e-324):
        probs = distribution(logits, params(temperature=temperature, top_p=0.9, top_k=3, min_p=0.1))
        assert torch.equal(probs.argmax(-1), logits.argmax(-1))
        assert torch.equal(probs.max(-1).values, torch.ones(20, dtype=torch.float64)), temperature


# -- invert and choose


def test_inverting_draws_from_the_distribution() -> None:
    """Run a chi-square test over 40,000 seeds and one position, as requests draw."""
    probs = distribution(torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0, 1.5, -0.5, 0.3]]), params())
    draws = torch.tensor([uniform(seed, 3) for seed in range(40_000)], dtype=torch.float64)
    counts = invert(probs.expand(40_000, -1), draws).bincount(minlength=8)
    expected = probs[0] * 40_000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3, "p < 0.001 at 7 degrees of freedom"


def test_a_token_without_probability_is_never_drawn() -> None:
    """This holds at both ends of the interval, where rounding matters, and between."""
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.0, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for number in (0.0, 5e-324, 0.3 - 2**-54, 0.3, 0.3 + 2**-52, 0.5, 1.0 - 2**-53):
        tokens = invert(probs, torch.full((2,), number, dtype=torch.float64))
        assert (probs.gather(1, tokens[:, None]) > 0).all(), number
    long = torch.rand(64, 32_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    long[:, ::3] = 0.0
    long[:, -50:] = 0.0
    long /= long.sum(-1, keepdim=True)
    for number in (0.0, 0.999_999_999_999, 1.0 - 2**-53):
        tokens = invert(long, torch.full((64,), number, dtype=torch.float64))
        assert (long.gather(1, tokens[:, None]) > 0).all(), number


def test_each_request_of_a_batch_draws_with_its_own_parameters_at_its_own_positions() -> None:
    """Row r of request b decides position positions[b][r]; a batch must not share seeds; greedy rows draw nothing."""
    logits = torch.randn(3, 4, 60, generator=torch.Generator().manual_seed(4))
    given = [params(seed=1), SamplingParams(), params(seed=2, temperature=0.7, top_p=0.8)]
    positions = [[5, 6, 6, 7], [0, 1, 1], [9]]
    tokens = choose(logits, given, positions.__getitem__, logits.argmax(-1).numpy())
    assert tokens[1].tolist() == logits[1].argmax(-1).tolist()
    assert tokens[2, 1:].tolist() == logits[2, 1:].argmax(-1).tolist(), "rows that decide nothing"
    for b in (0, 2):
        for row, position in enumerate(positions[b]):
            draw = torch.tensor([uniform(given[b].seed, position)], dtype=torch.float64)
            assert tokens[b, row] == invert(distribution(logits[b, row : row + 1], given[b]), draw)


MIXED = (
    params(),
    params(temperature=1e-308),
    params(temperature=5e-324, top_k=3),
    params(top_k=1),
    params(top_k=40, temperature=1.3, top_p=0.95, min_p=0.05),
    params(top_k=10_000),
    params(top_p=0.3, temperature=2.0),
    params(min_p=0.2),
    params(top_k=7),
    params(top_k=3, top_p=1.0),
)


@pytest.mark.parametrize(("vocab", "threads"), [(97, 1), (5000, 1), (152_064, 2)])
def test_a_row_among_others_has_the_very_bits_that_it_has_alone(
    vocab: int, threads: int, request: pytest.FixtureRequest
) -> None:
    """Otherwise a seeded answer would depend on the other requests in the batch."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    rows = [MIXED[i % len(MIXED)] for i in range(37)]
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(5)) * 4
    logits[::5] = logits[::5].round()  # ties, at the limits too
    together = distribution(logits, rows)
    for i, settings in enumerate(rows):
        assert torch.equal(together[i], distribution(logits[i : i + 1], settings)[0]), settings


def test_requests_of_every_kind_together_choose_what_each_chooses_alone() -> None:
    given = [p if i % 3 else SamplingParams() for i, p in enumerate(MIXED * 2)]
    logits = torch.randn(len(given), 4, 300, generator=torch.Generator().manual_seed(6)) * 2
    positions = [list(range(i, i + i % 5)) for i in range(len(given))]
    together = choose(logits, given, positions.__getitem__)
    for b in range(len(given)):
        assert np.array_equal(
            together[b], choose(logits[b : b + 1], given[b : b + 1], positions[b : b + 1].__getitem__)[0]
        )


# -- parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("stop", ("fine", "")),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    """An empty stop string occurs in every text; a top_p of 0 leaves no token."""
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_parameters_at_the_ends_of_their_ranges_are_taken() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    SamplingParams(temperature=100.0, top_p=1e-9, min_p=1.0, seed=2**64 + 1)
