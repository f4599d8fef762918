"""AdaStop: its promise by simulation, its saving of runs, and its parts by hand."""

import itertools

import numpy as np
import pytest

from embodied.adastop import _boundary, _signs, adastop


def wrong_rate(agents: int, looks: int, repeats: int, draw: str = "normal") -> float:
    """Share of repeated experiments with equal agents in which some pair was called different."""
    rng = np.random.default_rng(agents * 100 + looks)
    wrong = 0
    for repeat in range(repeats):
        scores = {str(agent): getattr(rng, draw)(size=5 * looks) for agent in range(agents)}
        verdict = adastop(scores, 5, looks, 0.05, permutations=2000, seed=repeat % 10)
        wrong += any(decision.verdict in ("first", "second") for decision in verdict.decisions)
    return wrong / repeats


@pytest.mark.parametrize(("agents", "looks"), [(2, 1), (2, 5), (3, 5), (4, 3)])
def test_equal_agents_are_called_different_no_more_often_than_stated(agents: int, looks: int) -> None:
    # 2,000 repeats of a rate of 0.05 have a standard error of 0.0049; a boundary from signed sums gives 0.09 and more.
    rate = wrong_rate(agents, looks, 2000)
    assert 0.02 < rate < 0.05 + 2.5 * 0.0049


def test_skewed_scores_keep_the_level_too() -> None:
    assert wrong_rate(2, 5, 1000, "standard_exponential") < 0.05 + 2.5 * 0.0069


@pytest.mark.parametrize(("gap", "power", "runs"), [(1.0, 0.80, 18), (2.0, 0.99, 10.5), (3.0, 0.99, 8.5)])
def test_large_differences_take_fewer_runs_than_a_fixed_design(gap: float, power: float, runs: float) -> None:
    """Five looks at five runs: 25 a fixed design would take."""
    rng = np.random.default_rng(int(10 * gap))
    found, used = 0, 0
    for repeat in range(300):
        scores = {"better": rng.normal(gap, 1, 25), "worse": rng.normal(0, 1, 25)}
        verdict = adastop(scores, 5, 5, 0.05, permutations=2000, seed=repeat % 10)
        found += verdict.decisions[0].verdict == "first"
        used += verdict.runs_used["better"]
    assert found / 300 >= power
    assert used / 300 <= runs


def test_a_difference_between_two_of_three_leaves_the_third_pair_at_its_level() -> None:
    """Two equal agents beside one that is far off: the equal pair is called different in 5 % of experiments at most."""
    rng = np.random.default_rng(5)
    wrong = far = 0
    for repeat in range(600):
        scores = {"a": rng.normal(0, 1, 15), "b": rng.normal(0, 1, 15), "far": rng.normal(6, 1, 15)}
        pairs = {(d.first, d.second): d for d in adastop(scores, 5, 3, 0.05, 2000, seed=repeat % 10).decisions}
        wrong += pairs["a", "b"].verdict != "equal"
        far += pairs["a", "far"].verdict == pairs["b", "far"].verdict == "second"
    assert wrong / 600 < 0.05 + 2.5 * 0.0089
    assert far / 600 > 0.99


def test_what_the_next_look_lacks() -> None:
    equal = np.random.default_rng(0).normal(size=(2, 12))
    verdict = adastop({"a": equal[0], "b": equal[1][:7], "c": equal[0][:10] + 9}, 5, 5)
    assert not verdict.decided
    assert verdict.needs == {"a": 3, "b": 3} or verdict.needs == {"b": 3}
    pairs = {(d.first, d.second): d for d in verdict.decisions}
    assert pairs["a", "b"].verdict == "open"
    assert pairs["a", "c"].verdict == pairs["b", "c"].verdict == "second"
    assert adastop({"a": equal[0][:3], "b": equal[1]}, 5, 5).needs == {"a": 2}
    first = adastop({"a": equal[0][:3], "b": equal[1]}, 5, 5).decisions[0]
    assert (first.look, first.boundary) == (0, None)


def test_only_what_was_looked_at_counts() -> None:
    """Runs after the deciding look do not change the verdict: the order of the runs is part of the test."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(4, 1, 25), rng.normal(0, 1, 25)
    whole = adastop({"a": a, "b": b}, seed=3)
    look = whole.decisions[0].look
    assert look <= 2
    assert adastop({"a": a[: 5 * look], "b": b[: 5 * look]}, seed=3) == whole
    spoiled = np.concatenate([a[: 5 * look], a[5 * look :] - 100])
    assert adastop({"a": spoiled, "b": b}, seed=3) == whole


def test_a_seed_gives_a_verdict_again() -> None:
    rng = np.random.default_rng(2)
    scores = {"a": rng.normal(0.7, 1, (10, 3)), "b": rng.normal(0, 1, (10, 3))}
    assert adastop(scores, 5, 2, seed=4) == adastop(scores, 5, 2, seed=4)
    assert adastop(scores, 5, 2, seed=4) != adastop(scores, 5, 2, seed=5)


def test_one_look_is_the_permutation_test() -> None:
    """All C(8, 4) = 70 ways of sharing eight runs out: the sampled boundary lies between the two exact quantiles."""
    a, b = np.array([3.0, 4.1, 2.2, 5.7]), np.array([1.0, 2.5, 0.3, 2.9])
    pooled = np.concatenate([a, b])
    exact = [abs(2 * sum(pooled[list(chosen)]) - pooled.sum()) for chosen in itertools.combinations(range(8), 4)]
    verdict = adastop({"a": a, "b": b}, 4, 1, 0.10, permutations=20_000)
    boundary = 4 * verdict.decisions[0].boundary  # type: ignore[operator]
    assert np.quantile(exact, 0.87) <= boundary <= np.quantile(exact, 0.93)
    p_value = np.mean(np.array(exact) >= a.sum() - b.sum() - 1e-9)
    assert (verdict.decisions[0].verdict == "first") == (p_value <= 0.10)
    assert verdict.decisions[0].statistic == pytest.approx(a.mean() - b.mean())


def test_boundary_by_hand() -> None:
    """Ten permutations, level 0.3: three may pass. One passed at an earlier look, so two of the rest may."""
    earlier = np.array([9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    now = np.array([5.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert _boundary({0: now}, {0: np.empty((0, 10))}, [], 0.3) == 6.0
    assert _boundary({0: now}, {0: earlier[None]}, [8.0], 0.3) == 7.0
    # The greatest of two open pairs counts.
    assert _boundary({0: now, 1: now[::-1]}, {0: np.empty((0, 10)), 1: np.empty((0, 10))}, [], 0.3) == 8.0


def test_signs_are_balanced_and_begin_with_the_data() -> None:
    signs = _signs(0, 1, 0, 3, 1000)
    assert (signs.sum(1) == 0).all()
    assert signs[0].tolist() == [1, 1, 1, -1, -1, -1]
    assert abs(signs[1:].mean(0)).max() < 0.12
    assert not np.array_equal(signs[1:], _signs(0, 2, 0, 3, 1000)[1:])


@pytest.mark.parametrize(
    ("scores", "settings", "says"),
    [
        ({"a": np.ones(5)}, {}, "two agents"),
        ({"a": np.ones((5, 2)), "b": np.ones((5, 3))}, {}, "same tasks"),
        ({"a": np.ones(5), "b": np.array([1, 2, np.nan, 4, 5])}, {}, "finite"),
        ({"a": np.ones(5), "b": np.ones(5)}, {"group": 1}, "out of range"),
        ({"a": np.ones(5), "b": np.ones(5)}, {"alpha": 1.0}, "out of range"),
    ],
)
def test_what_cannot_be_tested_is_refused(scores: dict, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adastop(scores, **settings)


def test_equal_constant_scores_are_equal() -> None:
    assert adastop({"a": np.ones(10), "b": np.ones(10)}, 5, 2).decisions[0].verdict == "equal"
