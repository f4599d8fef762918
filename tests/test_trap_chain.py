"""The edge of reach: a pair of networks walks into a trap that no step shows, the minimum of diverse ones does not."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import trap_chain  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)


def test_the_chain_is_worth_what_arithmetic_says() -> None:
    best, reach = trap_chain.best()
    assert reach == pytest.approx(0.7 / 0.03)
    # From cell c: climb, paid 0.05 (c + 1) and so on, then 0.7 for ever.
    expected = [
        sum(0.97**i * 0.05 * (c + 1 + i) for i in range(14 - c)) + 0.97 ** (14 - c) * 0.7 / 0.03 for c in range(11)
    ]
    assert best == pytest.approx(np.mean(expected))
    fall = [sum(0.97**i * 0.05 * (c + 1 + i) for i in range(15 - c)) - 0.97 ** (15 - c) / 0.03 for c in range(11)]
    assert trap_chain.true_return(np.full(16, 2)) == pytest.approx(np.mean(fall))


def test_the_edge_is_seen_only_as_a_last_step() -> None:
    cells, _, reward, after = trap_chain.rollouts(500, np.full(16, 2), np.random.default_rng(0))
    assert cells.max() == 14
    assert after.max() == 15
    assert (cells.reshape(5, 500)[:4] < 14).all()  # cell 14 is left with the fifth step alone
    np.testing.assert_allclose(reward, 0.05 * after)


def test_a_pair_falls_into_the_trap_and_a_diverse_minimum_does_not() -> None:
    best, reach = trap_chain.best()
    pair = trap_chain.learn("base, N 2", seed=0, updates=4000)
    assert pair["true_return"] < 0
    assert pair["max_q_in_reach"] > 1.25 * reach
    diverse = trap_chain.learn("min of 10, strong priors (x20)", seed=0, updates=4000)
    assert diverse["true_return"] > 0.7 * best
    assert diverse["max_q_in_reach"] < reach
    assert diverse["spread_at_edge_over_reach"] > 2
