"""IQL in a table: how far the expectile gets from random walks, what the temperature adds, and where luck misleads it.

Four rooms of 4 x 4 cells, 400 random walks of at most 25 steps, a reward of 1 at the goal, which ends the walk.
"""

import functools

import numpy as np
import pytest
import torch

from embodied.policies.losses import advantage_weight, expectile_weight, td_target

torch.set_num_threads(1)
MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))
DISCOUNT, SEEDS = 0.95, (0, 1, 2)


@functools.cache
def rooms() -> tuple[np.ndarray, int]:
    """The cell that each action leads to, (68, 4), and the goal, a corner."""
    free = np.ones((9, 9), bool)
    free[4, :] = free[:, 4] = False
    for door in ((4, 2), (4, 6), (2, 4), (6, 4)):
        free[door] = True
    cells = [tuple(cell) for cell in np.argwhere(free)]
    number = {cell: i for i, cell in enumerate(cells)}
    return np.array([[number.get((r + a, c + b), i) for a, b in MOVES] for i, (r, c) in enumerate(cells)]), 67


@functools.cache
def walks(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N,) cell, action, next cell, reward."""
    following, goal = rooms()
    rng, steps = np.random.default_rng(seed), []
    for _ in range(400):
        s = int(rng.integers(goal))
        for _ in range(25):
            a = int(rng.integers(4))
            n = int(following[s, a])
            steps.append((s, a, n, float(n == goal)))
            if n == goal:
                break
            s = n
    table = np.array(steps)
    return table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2].astype(int), table[:, 3]


def fixed_point(
    s: np.ndarray, a: np.ndarray, n: np.ndarray, r: np.ndarray, states: int, expectile: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V (S,), Q and counts (S, 4) where the gradients of IQL's value and critic losses are 0; masks are 1 - reward."""
    state, pair, after, reward = (torch.from_numpy(x) for x in (s, 4 * s + a, n, r))
    V, Q = torch.zeros(states, dtype=torch.float64), torch.zeros(4 * states, dtype=torch.float64)
    count = torch.bincount(pair, minlength=4 * states).double()
    for _ in range(400):
        weight = expectile_weight(Q[pair] - V[state], expectile)
        total = torch.bincount(state, weight, states)
        V = torch.where(total > 0, torch.bincount(state, weight * Q[pair], states) / total.clamp(min=1e-9), V)
        y = td_target(reward, 1 - reward, V[after], DISCOUNT)
        Q = torch.bincount(pair, y, 4 * states) / count.clamp(min=1)
    return V, Q.view(states, 4), count.view(states, 4)


def success(weights: np.ndarray) -> float:
    """Share of 2,000 starts from which the policy that acts in proportion to (S, 4) weights is there in 60 steps."""
    following, goal = rooms()
    policy = np.where(weights.sum(1, keepdims=True) > 0, weights, 1.0)
    policy = policy.cumsum(1) / policy.sum(1, keepdims=True)
    rng = np.random.default_rng(0)
    s = rng.integers(goal, size=2000)
    for _ in range(60):
        a = (rng.random((2000, 1)) > policy[s]).sum(1).clip(max=3)
        s = np.where(s == goal, goal, following[s, a])
    return float((s == goal).mean())


@functools.cache
def outcome(expectile: float, inverse_temperature: float) -> tuple[float, float]:
    """Mean of V / V* over cells, and success; over three sets of walks."""
    following, goal = rooms()
    best = np.zeros(goal + 1)
    for _ in range(60):
        best = np.where(following == goal, 1.0, DISCOUNT * best[following]).max(1)
        best[goal] = 0.0
    ratios, rates = [], []
    for seed in SEEDS:
        V, Q, count = fixed_point(*walks(seed), goal + 1, expectile)
        assert (V.numpy() <= best + 1e-9).all()  # walls do not move: nothing is too good to be true
        ratios.append((V.numpy()[:goal] / best[:goal]).mean())
        rates.append(success((advantage_weight(Q - V[:, None], inverse_temperature) * count).numpy()))
    return float(np.mean(ratios)), float(np.mean(rates))


# Figures of another program, on other four rooms (66 cells) and one set of walks: expectile, V / V*, success and how
# far that is from set to set. At 0.5 ten of our sets gave 0.65 to 0.79.
MEASURED = [(0.5, 0.08, 0.8, 0.15), (0.7, 0.37, 1.0, 0.03), (0.9, 0.8, 1.0, 0.01), (0.99, 0.97, 1.0, 0.01)]


@pytest.mark.parametrize(("expectile", "ratio", "rate", "spread"), MEASURED)
def test_a_higher_expectile_comes_nearer_to_the_best_value(
    expectile: float, ratio: float, rate: float, spread: float
) -> None:
    found = outcome(expectile, 30.0)
    assert found[0] == pytest.approx(ratio, abs=0.06)
    assert found[1] == pytest.approx(rate, abs=spread)


def test_values_rise_with_the_expectile_to_nine_tenths_and_more() -> None:
    ratios = [outcome(expectile, 30.0)[0] for expectile in (0.5, 0.7, 0.9, 0.99)]
    assert ratios == sorted(ratios)
    assert ratios[-1] >= 0.9


def test_a_low_inverse_temperature_is_cloning_and_a_high_one_is_not() -> None:
    counts = [np.zeros((68, 4)) for _ in SEEDS]
    for seed, count in zip(SEEDS, counts, strict=True):
        np.add.at(count, walks(seed)[:2], 1.0)
    cloned = float(np.mean([success(count) for count in counts]))
    rates = [outcome(0.9, inverse_temperature)[1] for inverse_temperature in (0.1, 3.0, 30.0, 300.0)]
    assert cloned == pytest.approx(0.2, abs=0.06)
    assert rates[0] == pytest.approx(cloned, abs=0.04)
    assert rates[1] == pytest.approx(0.4, abs=0.08)
    assert min(rates[2:]) > 0.98


def test_luck_is_taken_for_skill_as_the_expectile_goes_to_one() -> None:
    """One cell, four actions that all pay 1 in 3 of 10 tries, ten tries each: V is worth 0.3 and no more."""
    rng, values = np.random.default_rng(0), {0.5: [], 0.9: [], 0.99: []}
    for _ in range(100):
        paid = (rng.random(40) < 0.3).astype(float)
        for expectile, found in values.items():
            V, Q = torch.zeros(1, dtype=torch.float64), torch.from_numpy(paid.reshape(4, 10).mean(1))
            for _ in range(60):
                weight = expectile_weight(Q - V, expectile)
                V = ((weight * Q).sum() / weight.sum()).view(1)
            found.append(float(V))
    means = [np.mean(found) for found in values.values()]
    assert means[0] == pytest.approx(0.3, abs=0.03)
    assert means[1] > 0.36
    assert means[2] > 0.4
