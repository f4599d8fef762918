"""MBRCSL's maze in six cells: which learner joins two recorded halves into the short way, and what luck is worth.

    python benchmarks/mbrcsl_maze.py

The map of the paper's point maze (Zhou et al. 2023), rows `#..###` and `#....#` between walls. Start in the upper row,
second cell; goal at the right end of the lower row; 16 steps; a step pays exp(-distance to the goal) of where it leads.
Recorded: 500 episodes go down from the start and stay, 250 go by the two cells at the left to the goal and stay, 250 do
the same and then move at random; with probability `noise` an action is random, and recorded as executed. The short way
is in no episode but by much luck: down, then right as those do that came from the left. It pays 14.50, the best there
is; the way by the left pays 12.60.

The learners are those of `embodied train`; actions are two numbers of which the larger says where to. MBRCSL's model is
the maze itself (`exact`), or what the recorded steps say of it with noise of 0.2 in each reward (`noisy rewards`: a
return chosen for its height is then chosen for its luck). Evaluated in the maze without noise, 3 seeds, data of each.

Criteria, set before the run, means over seeds with 2 % noise: MBRCSL on the exact model > best recorded episode >=
return-conditioned policy on the recorded episodes alone >= cloning of the best 10 %, and that > 2 x cloning of all.
Three figures are no criterion, and told: the share of rollouts accepted, everything at 10 % noise, the noisy model.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result
from torch import Tensor

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.bundle import PolicyContract, load_policy
from embodied.policies.loop import read_metrics
from embodied.policies.train import TransitionData, make_config, train

CELLS = np.array([(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 4)])  # row, column
START, GOAL, HORIZON = 1, 5, 16
MOVES = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])  # stay, down, up, right, left
STAY, DOWN, UP, RIGHT, LEFT = range(5)
REWARD = np.exp(-np.linalg.norm(CELLS - CELLS[GOAL], axis=1))  # of being led into a cell
SIZE, JITTER = 0.8, 0.05  # of an action's larger number, and the spread of both
SETTINGS: dict[str, Any] = {"hidden_sizes": (64, 64), "batch_size": 128}
STEPS, BC_STEPS = 2000, 1000


def _next_cells() -> np.ndarray:
    """(6, 5) where each move leads; into a wall is to stay."""
    number = {tuple(cell): i for i, cell in enumerate(CELLS.tolist())}
    return np.array([[number.get(tuple(cell + move), i) for move in MOVES] for i, cell in enumerate(CELLS)])


NEXT = _next_cells()


def _towards() -> np.ndarray:
    """(6, 6) the move that shortens the way from a cell to another; to stay where it is reached."""
    steps = np.where(np.eye(6, dtype=bool), 0, 99)
    for _ in range(6):
        steps = np.minimum(steps, 1 + steps[NEXT].min(1))
    return np.where(np.eye(6, dtype=bool), STAY, steps[NEXT].argmin(1))


TOWARDS = _towards()


def moves_of(actions: np.ndarray) -> np.ndarray:
    """(n, 2) -> (n,) numbers of moves: the sign of the larger number, or to stay where both are below 0.4."""
    larger = np.abs(actions).argmax(1)
    sign = np.take_along_axis(actions, larger[:, None], 1)[:, 0]
    chosen = np.where(larger == 0, np.where(sign > 0, DOWN, UP), np.where(sign > 0, RIGHT, LEFT))
    return np.where(np.abs(sign) < SIZE / 2, STAY, chosen)


def record(seed: int, noise: float) -> tuple[TransitionData, np.ndarray]:
    """The 1000 episodes, one-hot cells as observations, and their returns (1000,)."""
    rng = np.random.default_rng(seed)
    cells, stage = np.full(1000, START), np.zeros(1000, np.int64)
    ways = np.repeat([[3, 3, 3], [0, 2, GOAL], [0, 2, GOAL]], [500, 250, 250], axis=0)  # where each goes, in order
    wanders, lost = np.repeat([False, True], [750, 250]), np.zeros(1000, bool)
    seen, done = [cells], []
    for _ in range(HORIZON):
        stage = np.where((cells == ways[np.arange(1000), stage]) & (stage < 2), stage + 1, stage)
        lost |= wanders & (cells == GOAL)
        move = TOWARDS[cells, ways[np.arange(1000), stage]]
        move = np.where((rng.random(1000) < noise) | lost, rng.integers(5, size=1000), move)
        cells = NEXT[cells, move]
        done.append(move)
        seen.append(cells)
    states, moves = np.stack(seen, 1), np.stack(done, 1)  # (1000, 17), (1000, 16)
    frames = np.arange(1000 * (HORIZON + 1)).reshape(1000, -1)
    actions = np.zeros((1000, HORIZON + 1, 2), np.float32)
    actions[:, :-1] = SIZE * MOVES[moves] + rng.normal(0, JITTER, (1000, HORIZON, 2))
    reward = REWARD[states[:, 1:]].astype(np.float32)
    data = TransitionData(
        np.eye(6, dtype=np.float32)[states.ravel()],
        actions.reshape(-1, 2),
        frames[:, :-1].ravel(),
        frames[:, 1:].ravel(),
        reward.ravel(),
        np.ones(reward.size, np.float32),
        np.repeat(np.arange(1000), HORIZON),
    )
    return data, reward.sum(1)


def best_share(data: TransitionData, returns: np.ndarray, share: float) -> TransitionData:
    """The transitions of the best episodes."""
    best = np.argsort(-returns, kind="stable")[: round(share * len(returns))]
    assert data.episode is not None
    rows = np.isin(data.episode, best)
    names = ("frame", "next_frame", "reward", "masks", "episode")
    return dataclasses.replace(data, **{name: getattr(data, name)[rows] for name in names})


class Maze:
    """The maze as a `Model`: exact, or the recorded frequencies of each move with noise in the rewards."""

    def __init__(self, data: TransitionData | None = None, reward_noise: float = 0.0) -> None:
        self.fingerprint, self._noise = f"maze {data is None} {reward_noise}", reward_noise
        self._chances = np.eye(6)[NEXT]
        if data is not None:
            counts = np.zeros((6, 5, 6))
            before, after = (data.observations[rows].argmax(1) for rows in (data.frame, data.next_frame))
            np.add.at(counts, (before, moves_of(data.actions[data.frame]), after), 1)
            total = counts.sum(-1, keepdims=True)  # a move never seen leads nowhere
            self._chances = np.where(total > 0, counts / np.maximum(total, 1), np.eye(6)[:, None])

    def step(
        self, observations: Tensor, actions: Tensor, rng: np.random.Generator, penalty: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        chance = self._chances[observations.argmax(1).numpy(), moves_of(actions.numpy())].cumsum(-1)
        cells = (chance < rng.random((len(chance), 1))).sum(-1).clip(max=5)
        reward = REWARD[cells] + self._noise * rng.standard_normal(len(cells))
        ended = torch.zeros(len(cells), dtype=torch.bool)
        return torch.eye(6)[cells], torch.from_numpy(reward.astype(np.float32)), ended, None


def contract() -> PolicyContract:
    """What a policy of this maze takes and gives."""
    same = {"cell": {"mean": np.zeros(6, np.float32), "std": np.ones(6, np.float32)}}
    return PolicyContract({"cell": ArraySpec((6,))}, {}, ActionSpec((2,), names=("down", "right")), 1.0, same)


def play(policy: Any) -> float:
    """True return of an episode of a loaded bundle; it is not told what it is paid."""
    cell, total = START, 0.0
    policy.reset()
    for _ in range(HORIZON):
        action = policy.act({"cell": np.eye(6, dtype=np.float32)[cell]})
        cell = int(NEXT[cell, moves_of(action)[0]])
        total += float(REWARD[cell])
    return round(total, 3)


def learn(
    name: str, data: TransitionData, seed: int, steps: int = BC_STEPS, model: Any = None, **changes: Any
) -> dict[str, Any]:
    """Train one learner of `embodied train`, and play its bundle."""
    config = make_config(name, overrides=SETTINGS | {"observation_normalization": "none"} | changes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(name, data, config, [seed], steps, folder, contract(), model=model, log_every=steps // 10)
        except InputError as error:
            return {"return": None, "refused": str(error).splitlines()[0]}
        last = read_metrics(Path(folder))[-1]
        found: dict[str, Any] = {"return": play(load_policy(Path(folder) / f"seed_{seed:03d}"))}
    if name == "mbrcsl":
        found |= {k: last[k][0] for k in ("accepted_share", "rollouts", "kept", "target_return")}
    return found


def figures(seed: int, noise: float) -> dict[str, Any]:
    """Every learner on one seed's data."""
    data, returns = record(seed, noise)
    flat = {"behaviour_hidden_sizes": (64, 64), "selection": "above_data"}
    return {
        "best recorded episode": {"return": round(float(returns.max()), 3)},
        "cloning": learn("bc", data, seed),
        "cloning of the best 10 %": learn("bc", best_share(data, returns, 0.1), seed),
        "return-conditioned, recorded": learn("mbrcsl", data, seed, STEPS, **(flat | {"selection": "recorded"})),
        "MBRCSL, exact model": learn("mbrcsl", data, seed, STEPS, Maze(), **flat),
        "MBRCSL, noisy rewards": learn("mbrcsl", data, seed, STEPS, Maze(data, 0.2), clip_rewards=False, **flat),
        "MBRCSL, noisy rewards, clipped": learn("mbrcsl", data, seed, STEPS, Maze(data, 0.2), **flat),
    }


def means(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean return of each learner over seeds; None where a seed was refused."""
    found = {name: [run[name]["return"] for run in runs] for name in runs[0]}
    return {name: None if None in values else round(float(np.mean(values)), 3) for name, values in found.items()}


def verdict(mean: dict[str, float | None]) -> dict[str, bool]:
    """The criteria, one by one."""
    names = ("MBRCSL, exact model", "best recorded episode", "return-conditioned, recorded")
    values = [mean[name] for name in (*names, "cloning of the best 10 %", "cloning")]
    ours, best, plain, tenth, clone = (-np.inf if value is None else value for value in values)
    return {
        "MBRCSL beats the best recorded episode": ours > best,
        "which is no worse than return-conditioning on recorded episodes": best >= plain - 1e-3,
        "which is no worse than cloning the best 10 %": plain >= tenth - 1e-3,
        "which is above twice cloning all": tenth > 2 * clone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    results: dict[str, Any] = {"best_return": round(float(REWARD[3] + REWARD[4] + 14), 3)}
    for noise in (0.02, 0.1):
        runs = [figures(seed, noise) for seed in range(arguments.seeds)]
        results[f"noise {noise}"] = {"mean_return": means(runs), "runs": runs}
    results["criteria"] = verdict(results["noise 0.02"]["mean_return"])
    results["cpu_seconds"] = round(time.process_time() - start, 1)
    write_result("mbrcsl_maze", results)


if __name__ == "__main__":
    main()
