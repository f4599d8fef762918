"""Does a label rise with true progress? Spearman's correlation per episode, with an interval over episodes.

Needs a ground truth, so it is for simulation, and for recordings whose progress someone has marked.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import rankdata

from embodied.contracts.errors import InputError


@dataclasses.dataclass(frozen=True)
class Audit:
    """How well a label set orders the frames of an episode.

    Attributes:
        per_episode: (E,) Spearman correlation; NaN where progress does not change within the episode, and 0 where the
            score does not change although progress does.
        mean, median: over the episodes that are not NaN.
        low, high: 95 % bootstrap interval of the mean over episodes.
        pooled: Spearman over all frames together: whether scores compare across episodes.
        num_undefined: episodes left out because their progress is constant.
    """

    per_episode: np.ndarray
    mean: float
    median: float
    low: float
    high: float
    pooled: float
    num_undefined: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able; an undefined episode becomes null."""
        values = [None if np.isnan(value) else float(value) for value in self.per_episode]
        return {**dataclasses.asdict(self), "per_episode": values}


def spearman(scores: np.ndarray, progress: np.ndarray) -> float:
    """Rank correlation with mean ranks for ties. NaN if `progress` is constant; 0 if only `scores` is."""
    if len(progress) < 2 or np.ptp(progress) == 0:
        return float("nan")
    if np.ptp(scores) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(scores), rankdata(progress))[0, 1])


def progress_correlation(
    scores: np.ndarray,
    progress: np.ndarray,
    episode_start: np.ndarray,
    episode_length: np.ndarray,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Audit:
    """Spearman's correlation of scores with progress in each episode.

    Args:
        scores, progress: (F,) per frame of the store.
        episode_start, episode_length: (E,) the episodes to look at, for example the held-out ones only.
        num_resamples: bootstrap resamples of the episodes.
        seed: of the bootstrap.

    Raises:
        InputError: shapes that do not fit, or no episode in which progress changes.
    """
    if scores.shape != progress.shape or scores.ndim != 1:
        raise InputError(f"scores {scores.shape} and progress {progress.shape} must be one number per frame each.")
    if len(episode_start) != len(episode_length) or np.any(episode_start + episode_length > len(scores)):
        raise InputError(f"The episodes do not fit into {len(scores)} frames.")
    rows = [np.arange(start, start + length) for start, length in zip(episode_start, episode_length, strict=True)]
    per_episode = np.array([spearman(scores[row], progress[row]) for row in rows])
    defined = per_episode[~np.isnan(per_episode)]
    if len(defined) == 0:
        raise InputError("Progress is constant in every episode; there is nothing to correlate with.")
    rng = np.random.default_rng(seed)
    means = defined[rng.integers(len(defined), size=(num_resamples, len(defined)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    together = np.concatenate(rows)
    return Audit(
        per_episode=per_episode,
        mean=float(defined.mean()),
        median=float(np.median(defined)),
        low=float(low),
        high=float(high),
        pooled=spearman(scores[together], progress[together]),
        num_undefined=int(np.isnan(per_episode).sum()),
    )
