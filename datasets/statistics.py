"""Statistics per key of a dataset: count, mean, deviation, range and quantiles, each number read once.

Moments are merged block by block in float64 (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances"), so memory holds one block and an offset a billion times the deviation costs no digits
that float64 has. Quantiles of pictures are exact, from counts of the 256 values. Quantiles of numbers are exact up to
`EXACT_ROWS` rows, which are kept until the end; of more, they are those of `EXACT_ROWS` rows drawn without replacement,
the same in every run: what is given as the quantile p is then, in 999 of 1,000 datasets, an exact quantile p' with
|p' - p| <= 3.3 sqrt(p (1 - p) / EXACT_ROWS): 0.0008 at 1 %, 0.0037 at the median.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.store import BLOCK_BYTES, EpisodeStore

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
EXACT_ROWS = 200_000
ROWS_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one key; every array has the shape of one row of it, (C,) for pictures.

    Attributes:
        count: int64, values that are finite. NaN and inf are left out of everything; where count is 0, the rest is NaN.
        mean, std, min, max: float64; std divides by the count.
        quantiles: `q01` to `q99` -> float64, linear between order statistics, as NumPy's default.
        exact_quantiles: False where they come from a sample of the rows.
    """

    count: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    quantiles: dict[str, np.ndarray]
    exact_quantiles: bool


class RunningStatistics:
    """Statistics of rows that come in blocks.

    Args:
        num_rows: how many rows will come, in all blocks together; it decides which of them the quantiles look at.
        quantiles: False leaves them out, which saves the rows they are taken from.
    """

    def __init__(self, num_rows: int, quantiles: bool = True) -> None:
        self._shape: tuple[int, ...] = ()
        self._seen = 0
        self._moments: tuple[np.ndarray, ...] | None = None  # count, mean, sum of squared deviations, min, max; (D,)
        self._quantiles = quantiles
        self._sampled: np.ndarray | None = None  # numbers of the rows that quantiles are taken from; None for all
        self._kept: list[np.ndarray] = []
        if quantiles and num_rows > EXACT_ROWS:
            rng = philox(0, num_rows, Stream.QUANTILES)
            self._sampled = np.sort(rng.choice(num_rows, EXACT_ROWS, replace=False, shuffle=False))

    def add(self, rows: np.ndarray) -> None:
        """The next rows, (n, ...) of any numeric type."""
        self._shape = rows.shape[1:]
        if len(rows) == 0:
            return
        values = rows.reshape(len(rows), -1)
        if self._quantiles:
            self._kept.append(self._sample_of(values))
        self._seen += len(rows)
        block = _moments(values.astype(np.float64))
        self._moments = block if self._moments is None else _merged(self._moments, block)

    def result(self) -> Statistics:
        """Statistics of what was added. Raises InputError where that is no row."""
        if self._moments is None:
            raise InputError("Statistics of no frames: the selection is empty.")
        count, mean, squares, low, high = self._moments
        empty = count == 0
        std = np.sqrt(squares / np.maximum(count, 1))
        values = {"mean": mean, "std": std, "min": low, "max": high}
        values = {name: np.where(empty, np.nan, value).reshape(self._shape) for name, value in values.items()}
        quantiles = {}
        if self._quantiles:
            found = _quantiles(np.concatenate(self._kept))  # (Q, D)
            quantiles = {name: row.reshape(self._shape) for name, row in zip(QUANTILES, found, strict=True)}
        return Statistics(
            count=count.astype(np.int64).reshape(self._shape),
            quantiles=quantiles,
            exact_quantiles=self._sampled is None,
            **values,
        )

    def _sample_of(self, values: np.ndarray) -> np.ndarray:
        if self._sampled is None:
            return values.copy()
        first, end = np.searchsorted(self._sampled, [self._seen, self._seen + len(values)])
        return values[self._sampled[first:end] - self._seen]


def array_statistics(array: np.ndarray, quantiles: bool = True) -> Statistics:
    """Statistics of the rows of an array (n, ...), `ROWS_AT_ONCE` at a time. Raises InputError where it has none."""
    running = RunningStatistics(len(array), quantiles)
    for start in range(0, len(array), ROWS_AT_ONCE):
        running.add(array[start : start + ROWS_AT_ONCE])
    return running.result()


def image_statistics(blocks: Iterable[np.ndarray]) -> Statistics:
    """Statistics of pictures per channel, from blocks (n, H, W, C) uint8, in units of 0 to 255. All of it is exact."""
    counts: np.ndarray | None = None  # (C, 256)
    for block in blocks:
        channels = [np.bincount(block[..., c].ravel(), minlength=256) for c in range(block.shape[-1])]
        counts = np.stack(channels) if counts is None else counts + channels
    if counts is None or not counts.any():
        raise InputError("Statistics of no frames: the selection is empty.")
    value = np.arange(256.0)
    count = counts.sum(1)  # (C,)
    mean = counts @ value / count
    variance = (counts * (value - mean[:, None]) ** 2).sum(1) / count
    below = counts.cumsum(1)  # (C, 256) pixels of at most this value
    quantiles = {}
    for name, p in QUANTILES.items():
        position = p * (count - 1)
        low = np.array([np.searchsorted(b, k, side="right") for b, k in zip(below, np.floor(position), strict=True)])
        high = np.array([np.searchsorted(b, k, side="right") for b, k in zip(below, np.ceil(position), strict=True)])
        quantiles[name] = low + (high - low) * (position - np.floor(position))
    return Statistics(
        count=count,
        mean=mean,
        std=np.sqrt(variance),
        min=(counts > 0).argmax(1).astype(np.float64),
        max=255.0 - (counts[:, ::-1] > 0).argmax(1),
        quantiles=quantiles,
        exact_quantiles=True,
    )


def store_statistics(
    store: EpisodeStore, names: Sequence[str] | None = None, episodes: Sequence[int] | np.ndarray | None = None
) -> dict[str, Statistics]:
    """Statistics of a store's arrays. Each is read once, in blocks.

    Args:
        names: frame-aligned arrays, such as `action` or `observation/images/wrist`; by default all but the flags.
        episodes: taken over these only, for instance those that are trained on; by default all.

    Returns:
        name -> `Statistics`. Actions and rewards over the rows that are steps (`step_valid`), pictures over the
        episodes that have the camera. An array without such a row is left out.
    """
    if names is None:
        flags = ("step_valid", "terminated", "truncated")
        names = [name for name in store.names() if name not in flags]
    chosen = np.ones(store.num_episodes, bool)
    if episodes is not None:
        chosen[:] = False
        chosen[np.asarray(episodes, np.int64)] = True
    steps = store.read("step_valid")
    found = {}
    for name in names:
        camera = name.removeprefix("observation/images/") if name.startswith("observation/images/") else None
        keep = np.repeat(chosen if camera is None else chosen & store.has_camera(camera), store.episode_length)
        if name in ("action", "reward"):
            keep &= steps
        if not keep.any():
            continue
        if camera is not None:
            found[name] = image_statistics(_kept_blocks(store, name, keep))
            continue
        running = RunningStatistics(int(keep.sum()))
        for block in _kept_blocks(store, name, keep):
            running.add(block)
        found[name] = running.result()
    return found


def _kept_blocks(store: EpisodeStore, name: str, keep: np.ndarray) -> Iterable[np.ndarray]:
    """The rows of an array where `keep` (F,), a block at a time; blocks without one are not read."""
    array = store.array(name)
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    rows = max(1, min(ROWS_AT_ONCE, BLOCK_BYTES // max(1, row_bytes)))
    for start in range(0, store.num_frames, rows):
        kept = keep[start : start + rows]
        if kept.any():
            yield store.read(name, start, start + rows)[kept]


def _moments(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Count, mean, sum of squared deviations, min and max of the finite values of each column of (n, D) float64."""
    finite = np.isfinite(values)
    if finite.all():
        count = np.full(values.shape[1], float(len(values)))
        low, high = values.min(0), values.max(0)
    else:
        count = finite.sum(0).astype(np.float64)
        low, high = np.where(finite, values, np.inf).min(0), np.where(finite, values, -np.inf).max(0)
        values = np.where(finite, values, 0.0)
    mean = values.sum(0) / np.maximum(count, 1)
    deviation = values - mean
    deviation[~finite] = 0.0
    return count, mean, np.einsum("nd,nd->d", deviation, deviation), low, high


def _merged(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    count = a[0] + b[0]
    share = b[0] / np.maximum(count, 1)
    apart = b[1] - a[1]
    mean = a[1] + apart * share
    return count, mean, a[2] + b[2] + apart**2 * a[0] * share, np.minimum(a[3], b[3]), np.maximum(a[4], b[4])


def _quantiles(values: np.ndarray) -> np.ndarray:
    """(Q, D) of (n, D), without what is not finite."""
    probabilities = list(QUANTILES.values())
    found = np.full((len(probabilities), values.shape[1]), np.nan)
    for column in range(values.shape[1]):
        kept = values[:, column]
        kept = kept[np.isfinite(kept)]
        if len(kept):
            found[:, column] = np.quantile(kept.astype(np.float64), probabilities)
    return found
