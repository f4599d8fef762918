"""Aggregates over runs and tasks with stratified bootstrap intervals: rliable's definitions, a bootstrap of our own.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice". The scores of an algorithm
are a list with one array (R,) per task: a number per run, a run being one training seed. Runs are resampled inside each
task, independently of the other tasks; intervals are percentiles. Equal scores and an equal seed give equal intervals,
whatever stands beside them: the draws of an algorithm hang on the seed and its own name alone.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.statistics import CONFIDENCE

RESAMPLES = 20_000
PROFILE_RESAMPLES = 2_000
TRIM = 0.25  # share cut off at either end for the interquartile mean
METRICS = ("iqm", "median", "mean", "optimality_gap")
BLOCK = 2_000_000  # numbers drawn at a time: 16 MB
MOST_RUNS = 10_000  # beyond this `runs_needed` gives up

Tasks = Sequence[np.ndarray]


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis, (..., n) -> (...): int(n / 4) are cut at either end, as in scipy."""
    count = values.shape[-1]
    cut = int(TRIM * count)
    if cut == 0:
        return values.mean(-1)
    return np.partition(values, (cut, count - cut - 1), axis=-1)[..., cut : count - cut].mean(-1)


def aggregate(pooled: np.ndarray, task_means: np.ndarray, task_gaps: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of (..., n) scores, (..., M) means of the tasks and (..., M) mean shortfalls of the tasks."""
    return {
        "iqm": iqm(pooled),
        "median": np.median(task_means, -1),
        "mean": task_means.mean(-1),
        "optimality_gap": task_gaps.mean(-1),
    }


def aggregates(
    tasks: Tasks,
    name: str = "",
    seed: int = 0,
    resamples: int = RESAMPLES,
    target: float = 1.0,
    resample_tasks: bool = False,
    confidence: float = CONFIDENCE,
) -> dict[str, dict[str, float | None]]:
    """IQM, median and mean of the task means, and optimality gap, each with its interval.

    Args:
        tasks: scores (R,) of each task. With unequal R the IQM pools the runs, so a task with more of them counts more.
        name: of the algorithm; its own stream of random numbers.
        target: gamma of the optimality gap, gamma - mean(min(score, gamma)).
        resample_tasks: draw the tasks with replacement too: the interval then holds for tasks like these.

    Returns:
        metric -> estimate, low, high. Low and high are None where no task has two runs: one run has no spread.
    """
    tasks = [np.asarray(task, np.float64) for task in tasks]
    points = _metrics_of([task[None] for task in tasks], target)
    estimates = {metric: float(points[metric][0]) for metric in METRICS}
    if max(map(len, tasks)) < 2 and not (resample_tasks and len(tasks) > 1):
        return {metric: {"estimate": value, "low": None, "high": None} for metric, value in estimates.items()}
    rng = generator(seed, name, "aggregates")
    parts = [_metrics_of(drawn, target) for drawn in _resamples(tasks, resamples, rng, resample_tasks)]
    ends = [0.5 - confidence / 2, 0.5 + confidence / 2]
    result: dict[str, dict[str, float | None]] = {}
    for metric in METRICS:
        low, high = np.quantile(np.concatenate([part[metric] for part in parts]), ends)
        result[metric] = {"estimate": estimates[metric], "low": float(low), "high": float(high)}
    return result


def improvement(
    first: Tasks,
    second: Tasks,
    name: str = "",
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[str, float | None]:
    """P(first > second): over tasks the mean of the Mann-Whitney statistic / (N K), ties one half, with its interval.

    Args:
        first, second: scores of the same tasks in the same order, (N,) and (K,) each.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} tasks cannot be paired.")
    wins = [_wins(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(first, second, strict=True)]
    estimate = float(np.mean([table.mean() for table in wins]))
    if max(max(table.shape) for table in wins) < 2:
        return {"estimate": estimate, "low": None, "high": None}
    rng = generator(seed, name, "improvement")
    total = np.zeros(resamples)
    for table in wins:
        rows, columns = (_shares(rng, size, resamples) for size in table.shape)
        total += np.einsum("rk,rk->r", rows @ table, columns)
    low, high = np.quantile(total / len(wins), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return {"estimate": estimate, "low": float(low), "high": float(high)}


def profile(
    tasks: Tasks,
    thresholds: np.ndarray,
    name: str = "",
    seed: int = 0,
    resamples: int = PROFILE_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[str, list[float]]:
    """Performance profile: share of runs with a score above each threshold, tasks counting equally; pointwise band."""
    above = [np.asarray(task, np.float64)[:, None] > thresholds for task in tasks]  # (R, T) each
    estimate = np.mean([table.mean(0) for table in above], 0)
    rng = generator(seed, name, "profile")
    total = np.zeros((resamples, len(thresholds)))
    for table in above:
        total += _shares(rng, len(table), resamples) @ table
    low, high = np.quantile(total / len(above), [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
    return {"estimate": estimate.tolist(), "low": low.tolist(), "high": high.tolist()}


def half_width(tasks: Tasks, runs: int, metric: str = "iqm", seed: int = 0, resamples: int = 4_000) -> float:
    """Expected half width of the 95 % interval of `metric` with `runs` runs per task, judged from the runs at hand.

    Runs are drawn with replacement from each task's own. Their variance is that of the runs at hand with ddof 0, which
    falls short of the population's by (R - 1) / R; the width is corrected for that.
    """
    tasks = [np.asarray(task, np.float64) for task in tasks]
    least = min(map(len, tasks))
    if least < 2:
        raise ValueError("one run per task says nothing about the spread of runs.")
    rng = generator(seed, f"{runs}", "half_width")
    parts = [_metrics_of(drawn, 1.0)[metric] for drawn in _resamples(tasks, resamples, rng, False, runs)]
    low, high = np.quantile(np.concatenate(parts), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(high - low) / 2 * np.sqrt(least / (least - 1))


def runs_needed(tasks: Tasks, precision: float, metric: str = "iqm", seed: int = 0) -> int | None:
    """Least runs per task for a half width of at most `precision`; None if `MOST_RUNS` would not do.

    The runs at hand stand for all that could be made: with 5 of them the answer is itself rough.
    """
    if precision <= 0:
        raise ValueError(f"a precision of {precision} cannot be reached.")
    low, high = 1, 2
    while half_width(tasks, high, metric, seed) > precision:
        low, high = high, 2 * high
        if high > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if half_width(tasks, middle, metric, seed) <= precision else (middle, high)
    return high


def summary(tasks: Mapping[str, np.ndarray], ddof: int, digits: int) -> dict[str, dict[str, Any]]:
    """task -> runs, mean and standard deviation (None where `ddof` leaves nothing), and both as a table prints them."""
    result = {}
    for task, values in tasks.items():
        std = float(np.std(values, ddof=ddof)) if len(values) > ddof else None
        printed = f"{values.mean():.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")
        result[task] = {"runs": len(values), "mean": float(values.mean()), "std": std, "printed": printed}
    return result


def generator(seed: int, name: str, purpose: str) -> np.random.Generator:
    """Random numbers that are a function of the three arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(f"{purpose}/{name}".encode())]))


def _metrics_of(tasks: Sequence[np.ndarray], target: float) -> dict[str, np.ndarray]:
    """Every metric of M arrays (r, R_m)."""
    means = np.stack([task.mean(-1) for task in tasks], -1)
    gaps = np.stack([(target - np.minimum(task, target)).mean(-1) for task in tasks], -1)
    return aggregate(np.concatenate(tasks, -1), means, gaps)


def _resamples(
    tasks: Sequence[np.ndarray], count: int, rng: np.random.Generator, resample_tasks: bool, runs: int | None = None
) -> Iterator[list[np.ndarray]]:
    """Blocks of M arrays (r, R_m): scores drawn with replacement inside each task; `runs` per task if given."""
    sizes = [runs or len(task) for task in tasks]
    block = max(1, BLOCK // sum(sizes))
    for start in range(0, count, block):
        rows = min(block, count - start)
        drawn = [
            task[rng.integers(0, len(task), (rows, size))] for task, size in zip(tasks, sizes, strict=True)
        ]  # (r, R_m) each
        if resample_tasks:
            drawn = _redrawn(tasks, sizes, rows, rng)
        yield drawn


def _redrawn(
    tasks: Sequence[np.ndarray], sizes: Sequence[int], rows: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """As many tasks as there are, drawn with replacement, and runs drawn inside each of them."""
    if len(set(sizes)) > 1:
        raise ValueError("tasks can be resampled only where all have the same number of runs.")
    table = np.stack(tasks)  # (M, R)
    chosen = rng.integers(0, len(table), (rows, len(table)))  # (r, M)
    runs = rng.integers(0, table.shape[1], (rows, len(table), table.shape[1]))  # (r, M, R)
    return list(table[chosen[..., None], runs].transpose(1, 0, 2))


def _wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, K) 1 where the first is greater, one half where they are equal, 0 otherwise."""
    gap = first[:, None] - second
    return (gap > 0) + 0.5 * (gap == 0)


def _shares(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """(resamples, size) how often each of `size` runs is drawn in a resample with replacement, as shares."""
    return rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size
