"""Intervals against scipy, hand-computed values and their own definition."""

import numpy as np
import pytest
from scipy.stats import binomtest

from embodied.statistics import Interval, difference, mean_interval, over_seeds, wilson


@pytest.mark.parametrize(("successes", "episodes"), [(0, 10), (3, 10), (10, 10), (41, 50), (1, 1)])
def test_wilson_equals_scipy(successes: int, episodes: int) -> None:
    expected = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    ours = wilson(successes, episodes)
    assert ours.estimate == successes / episodes
    np.testing.assert_allclose([ours.low, ours.high], [expected.low, expected.high], atol=1e-12)


def test_wilson_by_hand() -> None:
    # z = 1.96, 5 of 10: centre (0.5 + 0.19208) / 1.38416 = 0.5; half width 1.96 / 1.38416 * sqrt(0.034604) = 0.26341
    interval = wilson(5, 10)
    assert (interval.low, interval.high) == pytest.approx((0.23659, 0.76341), abs=2e-5)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, episodes)


def test_over_seeds_is_repeatable_and_depends_on_its_seed_only() -> None:
    table = np.random.default_rng(0).random((5, 40)) < 0.6
    assert over_seeds(table) == over_seeds(table.copy())
    assert over_seeds(table) != over_seeds(table, seed=1)
    assert over_seeds(table).low == pytest.approx(over_seeds(table, seed=1).low, abs=0.01)


def test_one_seed_gives_the_binomial_percentiles() -> None:
    # Resampling N outcomes with replacement draws Binomial(N, rate) / N, whose quantiles are known.
    from scipy.stats import binom

    table = np.array([[1] * 30 + [0] * 70])
    interval = over_seeds(table)
    assert interval.estimate == pytest.approx(0.30)
    np.testing.assert_allclose([interval.low, interval.high], binom(100, 0.3).ppf([0.025, 0.975]) / 100, atol=0.011)


def test_spread_between_seeds_widens_the_interval() -> None:
    # Both tables have rate 0.5 in every initial state; in the second, whole seeds succeed or fail.
    alternating = np.array([[s % 2 ^ n % 2 for n in range(40)] for s in range(6)])
    split = np.array([[s % 2] * 40 for s in range(6)])
    even, uneven = over_seeds(alternating), over_seeds(split)
    assert even.estimate == uneven.estimate == 0.5
    # Rows drawn of 6 with replacement: the mean of `split` is Binomial(6, 1/2) / 6 with quantiles 1/6 and 5/6.
    assert (uneven.low, uneven.high) == pytest.approx((1 / 6, 5 / 6))
    assert even.high - even.low < 0.4


def test_all_equal_outcomes_still_have_a_width() -> None:
    expected = wilson(20, 20)
    assert over_seeds(np.ones((5, 20))) == expected
    assert expected.low < 0.9


def test_coverage_of_the_interval_over_seeds() -> None:
    """Of many repetitions of an experiment with known rate, about 95 % of the intervals must hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        seed_effect = rng.normal(0, 0.1, (8, 1))
        state_effect = rng.normal(0, 0.1, (1, 40))
        table = rng.random((8, 40)) < np.clip(0.5 + seed_effect + state_effect, 0, 1)
        interval = over_seeds(table, resamples=1000)
        held += interval.low <= 0.5 <= interval.high
    assert held / 200 >= 0.88  # eight seeds: percentile intervals run a few per cent short of nominal


def test_difference_uses_the_pairing() -> None:
    # The second policy fails exactly where the first does, and in one state more.
    first = np.array([[1, 0] * 50])
    second = first.copy()
    second[0, 0] = 0
    interval = difference(first, second)
    assert interval.estimate == pytest.approx(0.01)
    assert interval.low == 0.0  # never negative: unpaired resampling would give about -0.13
    assert interval.high < 0.05
    with pytest.raises(ValueError, match="paired"):
        difference(first, second[:, :10])


def test_difference_of_two_constant_tables_has_a_width() -> None:
    # Newcombe: Wilson of 10/10 is [0.7225, 1], of 0/10 [0, 0.2775]; 1 - hypot(0.2775, 0.2775) = 0.6075.
    interval = difference(np.ones((3, 10)), np.zeros((5, 10)))
    assert (interval.estimate, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.6075, abs=2e-4)


def test_mean_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    interval = mean_interval(values)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([interval.low, interval.high], [values.mean() - half, values.mean() + half], atol=0.02)


def test_overlap() -> None:
    assert Interval(0.5, 0.4, 0.6).overlaps(Interval(0.7, 0.6, 0.8))
    assert not Interval(0.5, 0.4, 0.59).overlaps(Interval(0.7, 0.6, 0.8))
