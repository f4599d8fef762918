"""Which pairs to ask about: uniform, spread over episodes and time, or where the present model is least sure."""

from collections.abc import Callable

import numpy as np

from embodied.contracts.errors import ConfigError, StoreError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.windows import SegmentSampler

STRATEGIES = ("uniform", "stratified", "disagreement", "entropy")
CANDIDATES = 10  # per pair that is wanted, of which the informed strategies keep the best
Margins = Callable[[np.ndarray], np.ndarray]


def draw_pairs(
    sampler: SegmentSampler,
    length: int,
    count: int,
    strategy: str,
    seed: int,
    start: int = 0,
    taken: np.ndarray | None = None,
    margins: Margins | None = None,
) -> np.ndarray:
    """(count, 2) first rows of segments of `length` frames; a function of its arguments alone.

    No pair repeats, in either order, within itself or `taken`, and its two segments share no frame.

    Args:
        strategy: `uniform`, `stratified`, or, with `margins`, the pairs of ten times as many stratified ones on which
            the ensemble's members disagree most (variance of P(second preferred)) or are least sure (entropy of its
            mean).
        start: number of draws already made under this seed, so that rounds differ.
        taken: (n, 2) pairs asked before.
        margins: (n, 2, length) rows -> (M, n) log-odds of the second, per member.

    Raises:
        ConfigError: an unknown strategy, or an informed one without a model.
        StoreError: the store has not so many different pairs.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"pair strategy '{strategy}' is unknown. Valid: {', '.join(STRATEGIES)}.")
    informed = strategy in ("disagreement", "entropy")
    if informed and margins is None:
        raise ConfigError(f"pair strategy '{strategy}' needs a model; ask a first round with 'stratified'.")
    wanted = count * (CANDIDATES if informed else 1)
    seen = {_key(pair) for pair in (taken if taken is not None else np.empty((0, 2), np.int64))}
    found: list[np.ndarray] = []
    for attempt in range(20):
        step = start * 1000 + attempt
        draw = sampler.sample if strategy == "uniform" else sampler.stratified
        rows = draw(step, 2 * wanted)
        if strategy != "uniform":  # neighbours of a stratified draw come from one stratum: mix before pairing
            rows = rows[philox(seed, step, Stream.SEGMENTS).permutation(len(rows))]
        for pair in rows.reshape(-1, 2):
            if abs(int(pair[0]) - int(pair[1])) >= length and (key := _key(pair)) not in seen:
                seen.add(key)
                found.append(pair)
        if len(found) >= wanted:
            break
    if len(found) < count:
        raise StoreError(f"Only {len(found)} different pairs of {length} frames were found; {count} are wanted.")
    pairs = np.array(found[:wanted], np.int64)
    if not informed:
        return pairs
    assert margins is not None
    return pairs[np.sort(_least_sure(margins(pairs[..., None] + np.arange(length)), strategy)[:count])]


def _key(pair: np.ndarray) -> tuple[int, int]:
    return min(int(pair[0]), int(pair[1])), max(int(pair[0]), int(pair[1]))


def _least_sure(margins: np.ndarray, strategy: str) -> np.ndarray:
    """Indices of the pairs, the most worth asking first."""
    p = np.exp(-np.logaddexp(0, -margins.astype(np.float64)))
    if strategy == "disagreement":
        return np.argsort(-p.var(0), kind="stable")
    return np.argsort(np.abs(p.mean(0) - 0.5), kind="stable")
