"""Normalisation: numbers, and the sign that learned rewards must have."""

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.policies.normalize import apply_statistics, fit_statistics, normalize_rewards


def test_statistics_and_floor() -> None:
    array = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    statistics = fit_statistics(array)
    assert statistics["mean"].tolist() == [2.0, 5.0]
    assert statistics["std"].tolist() == pytest.approx([1.0, 1e-3])
    assert apply_statistics(array, statistics).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(InputError, match="no frames"):
        fit_statistics(np.empty((0, 2)))


def test_statistics_of_a_large_offset_keep_their_digits() -> None:
    array = (1e4 + np.random.default_rng(0).normal(size=(5000, 1))).astype(np.float32)
    assert float(fit_statistics(array)["std"][0]) == pytest.approx(1.0, abs=0.05)


def test_quantile_maps_to_minus_one_zero_and_never_above() -> None:
    rewards = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    result, record = normalize_rewards(rewards, "quantile")
    assert np.quantile(result, [0.01, 0.99]) == pytest.approx([-1.0, 0.0], abs=1e-3)
    assert result.max() == 0.0
    inside = result < 0
    np.testing.assert_allclose(result[inside], (rewards * record["scale"] + record["shift"])[inside], atol=1e-5)


def test_quantile_of_rare_success_and_of_a_constant() -> None:
    rare = np.zeros(1000)
    rare[:3] = 1.0  # fewer than the 1 % that the upper quantile cuts off
    assert np.unique(normalize_rewards(rare, "quantile")[0]).tolist() == [-1.0, 0.0]
    assert np.unique(normalize_rewards(np.full(10, 7.3), "quantile")[0]).tolist() == pytest.approx([-1.0])


def test_other_methods() -> None:
    rewards, episode = np.array([0.0, 1.0, 0.0, 3.0]), np.array([0, 0, 1, 1])
    assert normalize_rewards(rewards, "none")[0].tolist() == [0, 1, 0, 3]
    assert normalize_rewards(rewards, "minus_one")[0].tolist() == [-1, 0, -1, 2]
    assert normalize_rewards(rewards, "return_range", episode)[0].tolist() == [0, 500, 0, 1500]
    with pytest.raises(InputError, match="needs the episode"):
        normalize_rewards(rewards, "return_range")
    with pytest.raises(InputError, match="same return"):
        normalize_rewards(np.ones(4), "return_range", episode)
    with pytest.raises(ConfigError, match="Did you mean 'quantile'"):
        normalize_rewards(rewards, "quantiles")
    with pytest.raises(InputError, match="transition 2"):
        normalize_rewards(np.array([0, 1, np.nan]), "none")
