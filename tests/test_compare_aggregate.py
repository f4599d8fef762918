"""Aggregates against rliable's answers, hand-computed values and their own definitions."""

import json
from pathlib import Path

import numpy as np
import pytest

from embodied.compare_aggregate import (
    METRICS,
    aggregates,
    half_width,
    improvement,
    iqm,
    profile,
    runs_needed,
    summary,
)

# What rliable 1.2.0 said of four small matrices, with the versions it ran with; made once, outside this project.
ANSWERS = json.loads((Path(__file__).parent / "rliable_answers.json").read_text())
SCORES = {name: list(np.array(rows).T) for name, rows in ANSWERS["scores"].items()}  # name -> (R,) per task
ENDS = ("estimate", "low", "high")


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("key", ["aggregates", "aggregates_task_bootstrap"])
def test_aggregates_agree_with_rliable(name: str, key: str) -> None:
    # With few tasks drawn anew, the ends of rliable's own 50,000 resamples scatter by 0.003: ours must not add to that.
    resample_tasks, resamples = (True, 400_000) if "task" in key else (False, 50_000)
    found = aggregates(SCORES[name], name, 0, resamples, resample_tasks=resample_tasks)
    for metric in METRICS:
        expected = ANSWERS[key][name][metric]
        assert found[metric]["estimate"] == pytest.approx(expected["estimate"], abs=2e-6)
        for end in ENDS:
            assert found[metric][end] == pytest.approx(expected[end], abs=0.005), (metric, end)


@pytest.mark.parametrize("pair", ANSWERS["improvement"])
def test_probability_of_improvement_agrees_with_rliable(pair: str) -> None:
    first, second = pair.split(",")
    found = improvement(SCORES[first], SCORES[second], resamples=50_000)
    for end in ENDS:
        assert found[end] == pytest.approx(ANSWERS["improvement"][pair][end], abs=0.005)


@pytest.mark.parametrize("name", SCORES)
def test_profiles_agree_with_rliable(name: str) -> None:
    """The share of N M runs moves in steps of 1 / (N M): an interval's end lies on a step, and may lie on the next."""
    found = profile(SCORES[name], np.array(ANSWERS["profiles"]["thresholds"]), name, resamples=20_000)
    step = 1 / sum(map(len, SCORES[name]))
    for end, tolerance in (("estimate", 2e-6), ("low", step + 1e-6), ("high", step + 1e-6)):
        np.testing.assert_allclose(found[end], ANSWERS["profiles"][name][end], atol=tolerance)
        assert np.mean(np.abs(np.array(found[end]) - ANSWERS["profiles"][name][end])) < 0.005


def test_by_hand() -> None:
    # 8 values: two are cut at either end; of 1..8 there remain 3, 4, 5, 6. Task means 2.5 and 6.5.
    tasks = [np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 7, 8])]
    found = {metric: value["estimate"] for metric, value in aggregates(tasks, target=4.0, resamples=10).items()}
    # Shortfalls of 4: 3, 2, 1, 0 and 0 four times, mean 0.75.
    assert found == {"iqm": 4.5, "median": 4.5, "mean": 4.5, "optimality_gap": 0.75}
    assert iqm(np.array([3.0, 1.0, 2.0])) == 2.0
    assert iqm(np.array([9.0, 0, 1, 100, 2, 3])) == 3.75  # int(6 / 4) = 1 is cut at either end
    # Pairs won by the first: task one 3 of 4 and a tie (3.5 / 4); task two 0 of 4.
    first, second = [np.array([2.0, 3.0]), np.array([0.0, 0.0])], [np.array([2.0, 1.0]), np.array([1.0, 1.0])]
    assert improvement(first, second)["estimate"] == (3.5 / 4 + 0) / 2
    assert profile([np.array([0.0, 1.0])], np.array([-1.0, 0.0, 0.5, 1.0]))["estimate"] == [1.0, 0.5, 0.5, 0.0]


def test_a_seed_gives_the_same_interval_and_others_do_not_matter() -> None:
    tasks = SCORES["skewed"]
    assert aggregates(tasks, "a", 3) == aggregates([task.copy() for task in tasks], "a", 3)
    assert aggregates(tasks, "a", 3) != aggregates(tasks, "a", 4)
    assert aggregates(tasks, "a", 3) != aggregates(tasks, "b", 3)
    assert improvement(tasks, SCORES["rival"], "a", 1) == improvement(tasks, SCORES["rival"], "a", 1)
    low, high = (aggregates(tasks, "a", seed)["iqm"]["low"] for seed in (3, 4))
    assert low == pytest.approx(high, abs=0.005)


def test_one_run_has_no_interval() -> None:
    found = aggregates([np.array([0.5]), np.array([0.7])])
    assert found["iqm"] == {"estimate": 0.6, "low": None, "high": None}
    assert improvement([np.array([1.0])], [np.array([0.0])])["low"] is None
    with pytest.raises(ValueError, match="one run"):
        half_width([np.array([0.5])], 5)


def test_runs_are_resampled_inside_their_task() -> None:
    """Two tasks without spread: whatever is drawn, nothing changes; drawing over all runs would mix them."""
    found = aggregates([np.zeros(5), np.ones(5)], resamples=2000)
    for metric in METRICS:
        assert found[metric]["low"] == found[metric]["estimate"] == found[metric]["high"]
    mixed = aggregates([np.zeros(5), np.ones(5)], resamples=2000, resample_tasks=True)["mean"]
    assert (mixed["low"], mixed["high"]) == (0.0, 1.0)


def test_unequal_runs_pool_and_cannot_have_their_tasks_resampled() -> None:
    tasks = [np.arange(4.0), np.arange(10.0)]
    assert aggregates(tasks)["iqm"]["estimate"] == iqm(np.concatenate(tasks))
    assert aggregates(tasks)["mean"]["estimate"] == (1.5 + 4.5) / 2
    with pytest.raises(ValueError, match="same number of runs"):
        aggregates(tasks, resample_tasks=True)


def test_coverage_of_the_interval_with_five_runs() -> None:
    """Ten skewed tasks, five runs, 200 experiments: the nominal 95 % is a little optimistic, as the docs say."""
    rng = np.random.default_rng(7)
    scale = np.linspace(0.5, 1.5, 10)
    truth = iqm((rng.gamma(2.0, 0.25, (40_000, 10)) * scale).reshape(1, -1))[0]
    held = 0
    for repeat in range(200):
        tasks = list((rng.gamma(2.0, 0.25, (5, 10)) * scale).T)
        found = aggregates(tasks, seed=repeat, resamples=1000)["iqm"]
        held += found["low"] <= truth <= found["high"]  # type: ignore[operator]
    assert 0.85 <= held / 200 <= 0.98


def test_runs_needed_is_that_of_the_normal_law() -> None:
    """The mean of one task: a half width of p needs (1.96 std / p)^2 runs."""
    values = np.random.default_rng(3).normal(0, 0.2, 40)
    wanted = (1.96 * values.std(ddof=1) / 0.05) ** 2
    assert runs_needed([values], 0.05, "mean") == pytest.approx(wanted, rel=0.08)
    assert half_width([values], 40, "mean") == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(40), rel=0.06)
    assert runs_needed([values], 10.0) == 2
    assert runs_needed([values], 1e-4) is None
    # Two pilot runs underestimate the spread by (R - 1) / R in variance, which is made up for.
    assert half_width([np.array([0.0, 1.0])], 100, "mean") == pytest.approx(1.96 * np.sqrt(0.5) / 10, rel=0.06)


def test_summary_states_its_ddof() -> None:
    values = {"t": np.array([1.0, 2.0, 4.0])}
    assert summary(values, 0, 2)["t"]["printed"] == "2.33 ± 1.25"
    assert summary(values, 1, 1)["t"]["printed"] == "2.3 ± 1.5"
    assert summary({"t": np.array([1.0])}, 1, 1)["t"]["std"] is None
