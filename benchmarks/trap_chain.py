"""The edge of reach in one dimension, with exact dynamics: which values lead into a trap that no step ever shows.

    python benchmarks/trap_chain.py

Cells 0 to 15, 0.05 apart; actions left, stay, right; the reward is the position that a step leads to. Rollouts begin
in cells 0 to 10 and are cut after 5 steps, so that cells 0 to 14 are trained on and cell 15 is only ever bootstrapped
from. It is a trap: whoever enters is dragged away and gets -1 for ever. The model is the chain itself. Staying in cell
14 is worth 0.7 / (1 - 0.97) = 23.3 and nothing within reach is worth more; cell 15 is worth -33.3.

Six variants of a Q ensemble, each on 3 seeds: the minimum or the mean of N networks of the position, with random prior
functions of the cell for diversity (Osband et al. 2018), or told the true value of the edge. Success: the base and the
mean overestimate by a quarter or more and walk into the trap on all seeds; the oracle and the diverse minimum get 70 %
of the best return or more; the ensemble's spread at the edge is at least twice that within reach.

Ours, where no source says: the rate of the target networks, under which the base overestimates, and that priors are
functions of the cell, not of the position. Functions of the position hardly differ between a cell and the next: with
them not even priors of x20 hold the minimum down at the edge.
"""

import argparse
import copy
import time
from typing import Any

import numpy as np
import torch
from record import write_result
from torch import Tensor

from embodied.policies.loop import Adam, update_target
from embodied.policies.losses import td_target
from embodied.policies.networks import StackedMLP, generators

CELLS, EDGE, SPACING = 16, 15, 0.05
STARTS, LENGTH = 11, 5  # cells that rollouts begin in; steps until they are cut
DISCOUNT, TRAP = 0.97, -1.0
BATCH, EXPLORE, TARGET_RATE = 256, 0.3, 0.01

# name -> members, how they are joined, scale of the random priors, is the edge's true value given
VARIANTS: dict[str, tuple[int, str, float, bool]] = {
    "base, N 2": (2, "min", 0.0, False),
    "mean of 10": (10, "mean", 0.0, False),
    "min of 10": (10, "min", 0.0, False),
    "min of 10, weak priors (x5)": (10, "min", 5.0, False),
    "min of 10, strong priors (x20)": (10, "min", 20.0, False),
    "N 2, true value at the edge": (2, "min", 0.0, True),
}


def step(cells: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chain: next cells, rewards. Actions 0, 1, 2 are left, stay, right. Nobody asks about the trap."""
    after = np.clip(cells + actions - 1, 0, EDGE)
    return after, SPACING * after


def true_return(policy: np.ndarray) -> float:
    """Discounted return of a policy (cell -> action) in the chain, mean over the start cells."""
    value = np.zeros(CELLS)
    for _ in range(2000):
        after, reward = step(np.arange(CELLS), policy)
        value = reward + DISCOUNT * value[after]
        value[EDGE] = TRAP / (1 - DISCOUNT)
    return float(value[:STARTS].mean())


def best() -> tuple[float, float]:
    """The best mean return over the starts, and the largest true value within reach."""
    climb = np.where(np.arange(CELLS) < EDGE - 1, 2, 1)
    return true_return(climb), SPACING * (EDGE - 1) / (1 - DISCOUNT)


def rollouts(count: int, policy: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Cell, action, reward, next cell of `count` rollouts of the policy with exploration, `LENGTH` steps each: cut, not
    ended. A rollout that reached the edge with its last step is the only way to see it."""
    cells, rows = rng.integers(STARTS, size=count), []
    for _ in range(LENGTH):
        random = rng.random(count) < EXPLORE
        actions = np.where(random, rng.integers(3, size=count), policy[cells])
        after, reward = step(cells, actions)
        rows.append((cells, actions, reward, after))
        cells = after
    return tuple(np.concatenate(column) for column in zip(*rows, strict=True))


class Ensemble:
    """Q_i(cell, action) = net_i(position in [-1, 1]) + scale * prior_i(cell): (N, cells, 3)."""

    def __init__(self, seed: int, members: int, scale: float) -> None:
        draws = generators([seed])
        self.net, prior = StackedMLP(draws, (1, 64, 64, 3), members), StackedMLP(draws, (CELLS, 64, 64, 3), members)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.x = torch.linspace(-1.0, 1.0, CELLS)[None, :, None].expand(members, -1, -1)
        with torch.no_grad():
            for layer in prior.layers:  # torch's own start
                bound = layer.weight.shape[1] ** -0.5
                layer.weight.uniform_(-bound, bound, generator=draws[0])
                layer.bias.uniform_(-bound, bound, generator=draws[0])
            self.offset = scale * prior(torch.eye(CELLS).expand(members, -1, -1))

    def values(self, net: StackedMLP) -> Tensor:
        return net(self.x) + self.offset


def joined(q: Tensor, how: str) -> Tensor:
    return q.amin(0) if how == "min" else q.mean(0)


def learn(variant: str, seed: int, updates: int) -> dict[str, Any]:
    """Train one ensemble and say what it believes and what its policy gets."""
    members, how, scale, oracle = VARIANTS[variant]
    ensemble = Ensemble(seed, members, scale)
    optimizer = Adam(ensemble.net, 1e-3)
    rng = np.random.default_rng(seed)
    trained: set[int] = set()
    replay = [np.zeros(0)] * 4
    for number in range(updates):
        if number % 100 == 0:  # fresh rollouts of the current policy; the last five lots are kept
            with torch.no_grad():
                policy = joined(ensemble.values(ensemble.net), how).argmax(-1).numpy()
            fresh = rollouts(200, policy, rng)
            size = 5 * 200 * LENGTH
            replay = [np.concatenate([old, new])[-size:] for old, new in zip(replay, fresh, strict=True)]
            trained |= set(fresh[0].tolist())
        rows = rng.integers(len(replay[0]), size=BATCH)
        cell, action, after = (torch.from_numpy(replay[i][rows].astype(np.int64)) for i in (0, 1, 3))
        reward = torch.from_numpy(replay[2][rows].astype(np.float32))
        with torch.no_grad():
            following = joined(ensemble.values(ensemble.target), how).amax(-1)  # (cells,)
            if oracle:
                following[EDGE] = TRAP / (1 - DISCOUNT)
            y = td_target(reward, torch.ones(BATCH), following[after], DISCOUNT)
        q = ensemble.values(ensemble.net)[:, cell, action]  # (N, B)
        optimizer.descend((q - y).square().mean(1).sum())
        update_target(ensemble.target, ensemble.net, TARGET_RATE)
    assert EDGE not in trained, "the edge must never be trained on"
    with torch.no_grad():
        q = ensemble.values(ensemble.net)
    policy = joined(q, how).argmax(-1).numpy()
    value, spread = joined(q, how).amax(-1), q.std(0).mean(-1)
    return {
        "max_q_in_reach": round(float(value[:EDGE].max()), 2),
        "q_at_edge": round(float(value[EDGE]), 2),
        "true_return": round(true_return(policy), 2),
        "spread_at_edge_over_reach": round(float(spread[EDGE] / spread[:EDGE].mean()), 2),
    }


def verdict(figures: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """The criteria, one by one."""
    top, value = best()
    trapped = {name: all(run["true_return"] < 0 for run in runs) for name, runs in figures.items()}
    over = {name: all(run["max_q_in_reach"] >= 1.25 * value for run in runs) for name, runs in figures.items()}
    good = {name: all(run["true_return"] >= 0.7 * top for run in runs) for name, runs in figures.items()}
    strong = figures["min of 10, strong priors (x20)"]
    return {
        "base overestimates by 25 %": over["base, N 2"],
        "base ends in the trap": trapped["base, N 2"],
        "mean overestimates by 25 %": over["mean of 10"],
        "mean ends in the trap": trapped["mean of 10"],
        "oracle reaches 70 %": good["N 2, true value at the edge"],
        "diverse minimum reaches 70 %": good["min of 10, strong priors (x20)"],
        "spread at the edge is twice that in reach": all(run["spread_at_edge_over_reach"] >= 2 for run in strong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    top, value = best()
    start = time.process_time()
    figures = {name: [learn(name, seed, arguments.updates) for seed in range(arguments.seeds)] for name in VARIANTS}
    results = {
        "best_return": round(top, 2),
        "true_value_in_reach": round(value, 2),
        "variants": figures,
        "criteria": verdict(figures),
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    write_result("trap_chain", results)


if __name__ == "__main__":
    main()
