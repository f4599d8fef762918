"""audit: Spearman per episode, its interval over episodes, and what counts when nothing moves."""

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from embodied.contracts.errors import InputError
from embodied.vlm_rewards.audit import progress_correlation, spearman

START = np.array([0, 5, 10])
LENGTH = np.array([5, 5, 5])


def test_signs_and_order_of_episodes() -> None:
    progress = np.tile(np.arange(5.0), 3)
    scores = np.concatenate([np.exp(np.arange(5.0)), -np.arange(5.0), [0, 2, 1, 3, 4]])
    audit = progress_correlation(scores, progress, START, LENGTH)
    np.testing.assert_allclose(audit.per_episode, [1.0, -1.0, 0.9], atol=1e-12)  # 1 - 6 * 2 / (5 * 24) = 0.9
    assert audit.mean == pytest.approx(0.3)
    assert audit.median == pytest.approx(0.9)
    assert -1 <= audit.low <= audit.mean <= audit.high <= 1


def test_ties_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    scores, progress = rng.integers(0, 4, 50).astype(float), rng.integers(0, 4, 50).astype(float)
    theirs: Any = spearmanr(scores, progress)
    assert spearman(scores, progress) == pytest.approx(theirs.statistic, abs=1e-12)


def test_constant_score_counts_as_zero_and_constant_progress_is_left_out() -> None:
    progress = np.concatenate([np.arange(5.0), np.arange(5.0), np.ones(5)])
    scores = np.concatenate([np.arange(5.0), np.zeros(5), np.arange(5.0)])
    audit = progress_correlation(scores, progress, START, LENGTH)
    np.testing.assert_allclose(audit.per_episode[:2], [1.0, 0.0], atol=1e-12)
    assert np.isnan(audit.per_episode[2])
    assert audit.num_undefined == 1
    assert audit.mean == pytest.approx(0.5)
    assert json.loads(json.dumps(audit.to_json()))["per_episode"] == [pytest.approx(1.0), 0.0, None]


def test_only_the_episodes_given_are_read() -> None:
    progress = np.tile(np.arange(5.0), 3)
    scores = np.concatenate([np.arange(5.0), -np.arange(5.0), np.full(5, np.nan)])
    audit = progress_correlation(scores, progress, START[:1], LENGTH[:1])
    np.testing.assert_allclose([audit.mean, audit.low, audit.high, audit.pooled], 1.0, atol=1e-12)


def test_interval_covers_the_true_mean() -> None:
    """The interval from 40 noisy episodes holds the mean over very many nearly always."""
    rng = np.random.default_rng(1)

    def draw(episodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        progress = np.tile(np.arange(10.0), episodes)
        scores = progress + rng.normal(0, 3, 10 * episodes)
        return scores, progress, np.arange(episodes) * 10, np.full(episodes, 10)

    truth = progress_correlation(*draw(3000), num_resamples=10).mean
    inside = [a.low <= truth <= a.high for a in (progress_correlation(*draw(40), num_resamples=300) for _ in range(60))]
    assert 0.85 <= np.mean(inside) <= 1.0


def test_errors() -> None:
    with pytest.raises(InputError, match="one number per frame"):
        progress_correlation(np.zeros(3), np.zeros(4), START, LENGTH)
    with pytest.raises(InputError, match="do not fit into 5 frames"):
        progress_correlation(np.zeros(5), np.arange(5.0), np.array([1]), np.array([5]))
    with pytest.raises(InputError, match="constant in every episode"):
        progress_correlation(np.arange(5.0), np.zeros(5), START[:1], LENGTH[:1])
