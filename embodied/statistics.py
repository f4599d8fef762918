"""Intervals for success rates and returns: Wilson's, and a seeded bootstrap over seeds and initial states."""

import dataclasses
import math

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval at `CONFIDENCE`."""

    estimate: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def wilson(successes: int, episodes: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); honest at 0 and 1, where the normal one has no width.

    Raises:
        ValueError: no episodes, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} successes of {episodes} episodes.")
    z = _normal_quantile(0.5 + confidence / 2)
    rate = successes / episodes
    centre = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    spread = z / (1 + z * z / episodes) * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    return Interval(rate, max(0.0, centre - spread), min(1.0, centre + spread))


def over_seeds(
    outcomes: np.ndarray, confidence: float = CONFIDENCE, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap of the mean success over training seeds *and* initial states.

    The design is crossed: every seed's policy starts from the same initial states. So rows and columns are resampled
    independently (Owen 2007, "The pigeonhole bootstrap"): the interval holds for a new seed in new initial states, and
    is not narrower than either source of chance alone. With one row only the initial states are resampled. Where all
    outcomes are equal the bootstrap has no width; Wilson's interval over the initial states stands in.

    Args:
        outcomes: (S, N) 0 or 1, seed s in initial state n.
        seed: of the resampling; equal input gives equal intervals.
    """
    outcomes = np.atleast_2d(np.asarray(outcomes, np.float64))
    if outcomes.size == 0:
        raise ValueError("no outcomes.")
    estimate = float(outcomes.mean())
    if np.all(outcomes == outcomes.flat[0]):
        return wilson(round(estimate * outcomes.shape[1]), outcomes.shape[1], confidence)
    return mean_over_seeds(outcomes, confidence, seed, resamples)


def mean_over_seeds(
    values: np.ndarray, confidence: float = CONFIDENCE, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The same bootstrap for (S, N) values of any kind, returns for one; no width where all are equal."""
    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.size == 0:
        raise ValueError("no values.")
    means = _resampled_means(values, seed, resamples)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(values.mean()), float(low), float(high))


def difference(
    first: np.ndarray, second: np.ndarray, confidence: float = CONFIDENCE, seed: int = 0, rates: bool = True
) -> Interval:
    """Bootstrap interval of mean(first) - mean(second) for two (S, N) tables over the *same* N initial states.

    The initial states are resampled together, the two policies' seeds apart. Where neither table varies the bootstrap
    has no width; if they are `rates`, 0 or 1, Newcombe's (1998) interval from the two Wilson intervals stands in.
    """
    first, second = (np.atleast_2d(np.asarray(a, np.float64)) for a in (first, second))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} initial states cannot be paired.")
    estimate = float(first.mean() - second.mean())
    if rates and all(np.all(a == a.flat[0]) for a in (first, second)):
        one, two = over_seeds(first, confidence), over_seeds(second, confidence)
        below = math.hypot(one.estimate - one.low, two.high - two.estimate)
        above = math.hypot(one.high - one.estimate, two.estimate - two.low)
        return Interval(estimate, max(-1.0, estimate - below), min(1.0, estimate + above))
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    columns = _counts(rng, first.shape[1], RESAMPLES)
    means = [_weighted_means(a, _counts(rng, len(a), RESAMPLES), columns) for a in (first, second)]
    low, high = np.quantile(means[0] - means[1], [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(estimate, float(low), float(high))


def mean_interval(values: np.ndarray, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of (N,) independent values."""
    values = np.asarray(values, np.float64)[None, :]
    low, high = np.quantile(_resampled_means(values, seed, RESAMPLES), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _resampled_means(table: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    columns = _counts(rng, table.shape[1], resamples)
    return _weighted_means(table, _counts(rng, len(table), resamples), columns)


def _counts(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """(resamples, size) how often each of `size` items is drawn in a resample with replacement, as shares."""
    if size == 1:
        return np.ones((resamples, 1))
    return rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size


def _weighted_means(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(resamples,) means of (S, N) `table` under row and column weights that each sum to 1."""
    return np.einsum("rn,rn->r", rows @ table, columns)


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)
