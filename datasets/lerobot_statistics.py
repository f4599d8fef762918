"""The statistics of a LeRobot v3.0 dataset: per feature and episode, and of all episodes together.

Mean, standard deviation, extremes and counts are exact. Quantiles of all episodes are those of each episode weighted by
its length, as LeRobot itself computes them.
"""

from collections.abc import Mapping

import numpy as np

from embodied.datasets.statistics import QUANTILES

PICTURE_SIDE = 150  # larger pictures are thinned out to about this many pixels per side, as LeRobot does


def feature_statistics(array: np.ndarray) -> dict[str, np.ndarray]:
    """Of (N, ...) values, over the rows; one number per row gives (1,)."""
    values = np.asarray(array, np.float64)
    values = values.reshape(len(values), 1) if values.ndim == 1 else values
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


class PictureStatistics:
    """Statistics of pictures per channel, scaled to 0 to 1, from a histogram: any number of pictures costs 6 kB."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)
        self._pictures = 0

    def add(self, picture: np.ndarray) -> None:
        """Take (H, W, 3) uint8 into account."""
        step = max(1, max(picture.shape[:2]) // PICTURE_SIDE)
        thin = picture[::step, ::step]
        for channel in range(3):
            self._counts[channel] += np.bincount(thin[..., channel].reshape(-1), minlength=256)
        self._pictures += 1

    def result(self) -> dict[str, np.ndarray]:
        """Each (3, 1, 1), but for `count`: the number of pictures."""
        counts = self._counts.astype(np.float64)
        weights = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        levels = np.arange(256) / 255.0
        mean = weights @ levels
        deviation = np.sqrt(np.maximum(0, weights @ levels**2 - mean**2))
        below = np.cumsum(weights, axis=1)
        found = {
            "min": levels[(counts > 0).argmax(axis=1)],
            "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": deviation,
            **{name: levels[(below < q - 1e-12).sum(axis=1).clip(0, 255)] for name, q in QUANTILES.items()},
        }
        return {name: value.reshape(3, 1, 1) for name, value in found.items()} | {"count": np.array([self._pictures])}


def total(before: Mapping[str, np.ndarray] | None, more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of both: of the episodes so far, and of one more."""
    if before is None:
        return dict(more)
    old, new = int(before["count"][0]), int(more["count"][0])
    share = new / (old + new)
    mean = before["mean"] + (more["mean"] - before["mean"]) * share
    squares = (1 - share) * (before["std"] ** 2 + (before["mean"] - mean) ** 2)
    squares = squares + share * (more["std"] ** 2 + (more["mean"] - mean) ** 2)
    return {
        "min": np.minimum(before["min"], more["min"]),
        "max": np.maximum(before["max"], more["max"]),
        "mean": mean,
        "std": np.sqrt(squares),
        "count": np.array([old + new]),
        **{name: before[name] + (more[name] - before[name]) * share for name in QUANTILES},
    }
