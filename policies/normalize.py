"""Normalisation of observations (statistics travel in the bundle) and of rewards (declared in a learner's config)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.datasets.statistics import array_statistics

OBSERVATIONS = ("standard", "none")
# reward -> scale * reward + shift
_AFFINE = {"none": (1.0, 0.0), "minus_one": (1.0, -1.0), "ten_minus_five": (10.0, -5.0), "hundred": (100.0, 0.0)}
STD_FLOOR = 1e-3  # in the key's own unit; CORL's epsilon. A joint that never moves must not be blown up by noise.


def fit_statistics(array: np.ndarray, method: str = "standard") -> dict[str, np.ndarray]:
    """Mean and standard deviation of one key over frames: (F, D) -> {"mean", "std"} (D,) float32, std floored.

    Args:
        method: `standard`, or `none`: mean 0 and deviation 1, which leave observations in their own units.

    Raises:
        ConfigError: unknown method.
    """
    if method not in OBSERVATIONS:
        raise ConfigError(f"Unknown observation normalisation '{method}'.{suggest(method, OBSERVATIONS)}")
    if method == "none":
        size = int(np.prod(array.shape[1:]))
        return {"mean": np.zeros(size, np.float32), "std": np.ones(size, np.float32)}
    found = array_statistics(array, quantiles=False)
    std = np.maximum(found.std, STD_FLOOR).reshape(-1)
    return {"mean": found.mean.reshape(-1).astype(np.float32), "std": std.astype(np.float32)}


def apply_statistics(array: np.ndarray, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """(x - mean) / std, float32, over the last axis of a flattened array (..., D)."""
    return ((array - statistics["mean"]) / statistics["std"]).astype(np.float32)


def normalize_rewards(
    rewards: np.ndarray,
    method: str,
    episode: np.ndarray | None = None,
    quantiles: tuple[float, float] = (0.01, 0.99),
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards as a learner sees them, and what was done to them, for the provenance.

    Args:
        rewards: (N,) of every transition of the dataset.
        method: `none`; `minus_one` (r - 1, IQL's antmaze); `ten_minus_five` (10 r - 5, CQL's antmaze); `hundred`
            (100 r, ReBRAC's antmaze); `return_range` (1000 r / (max - min episode return), IQL's locomotion; needs
            `episode`); `quantile` ((r - q_low) / (q_high - q_low) - 1, at most 0: learned
            rewards have no scale of their own, and positive ones teach to put off a success that ends the episode).
        episode: (N,) episode of each transition.
        quantiles: low and high of `quantile`. A constant reward becomes -1.

    Raises:
        ConfigError: unknown method. InputError: rewards that are not finite, or `return_range` without episodes.
    """
    rewards = np.asarray(rewards, np.float64)
    if not np.isfinite(rewards).all():
        raise InputError(f"The reward of transition {int(np.flatnonzero(~np.isfinite(rewards))[0])} is not finite.")
    if method in _AFFINE:
        scale, shift = _AFFINE[method]
    elif method == "return_range":
        shift, scale = 0.0, 1000.0 / _return_range(rewards, episode)
    elif method == "quantile":
        low, high = np.quantile(rewards, quantiles)
        if high <= low:  # fewer successes than the quantile cuts off: use them all
            low, high = rewards.min(), rewards.max()
        scale = 1.0 / (high - low) if high > low else 1.0
        shift = -low * scale - 1.0
    else:
        valid = (*_AFFINE, "return_range", "quantile")
        raise ConfigError(f"Unknown reward normalisation '{method}'.{suggest(method, valid)}")
    result = rewards * scale + shift
    if method == "quantile":
        result = np.minimum(result, 0.0)
    record = {"method": method, "scale": float(scale), "shift": float(shift), "at_most_zero": method == "quantile"}
    return result.astype(np.float32), record


def _return_range(rewards: np.ndarray, episode: np.ndarray | None) -> float:
    """Largest minus smallest undiscounted episode return."""
    if episode is None:
        raise InputError("Reward normalisation 'return_range' needs the episode of each transition.")
    ids = np.unique(episode, return_inverse=True)[1]
    returns = np.bincount(ids, weights=rewards)
    if np.ptp(returns) == 0:
        raise InputError(
            "All episodes have the same return: 'return_range' cannot scale by it. Use 'none' or 'quantile'."
        )
    return float(np.ptp(returns))
