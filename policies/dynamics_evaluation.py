"""How far dynamics can be believed: error per output and over k steps, and whether their doubt is calibrated."""

from typing import Any

import numpy as np
import torch

from embodied.datasets.draws import Stream, philox
from embodied.policies.dynamics import Dynamics
from embodied.policies.dynamics_training import DynamicsData
from embodied.policies.terminations import LEARNED, agreement, find_rule

LEVELS = {0.5: 0.6744898, 0.8: 1.2815516, 0.95: 1.959964}  # central interval of a Gaussian -> its half width in sigmas
ROWS = 4096
RESAMPLES = 1000


def evaluate_dynamics(
    dynamics: Dynamics, data: DynamicsData, horizon: int = 5, starts: int = 2000, names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Figures over transitions that were not trained on, in the dataset's units.

    Args:
        horizon: k of the open-loop error.
        starts: at most so many open-loop rollouts.
        names: of the observation's numbers; by default obs0, obs1, ...

    Returns:
        `outputs`: per output `rmse`, and `relative` to the spread of what it predicts (1: no better than its mean).
        `coverage`: level -> share of outputs inside the elites' central interval, and per output.
        `open_loop`: see `open_loop_error`. `termination`: counts of agreement with recorded ends, `learned` included.
    """
    names = names or tuple(f"obs{i}" for i in range(dynamics.observation_size))
    mean, std = mixture(dynamics, data)
    truth = data.targets()
    truth[:, :-1] += data.observations
    error = mean - truth
    spread = data.targets().std(0)
    rmse = np.sqrt((error**2).mean(0))
    coverage = {level: (np.abs(error) <= width * std).mean(0) for level, width in LEVELS.items()}
    outputs = {
        name: {
            "rmse": float(rmse[i]),
            "relative": float(rmse[i] / spread[i]) if spread[i] > 0 else None,
            **{f"coverage_{round(100 * level)}": float(coverage[level][i]) for level in LEVELS},
        }
        for i, name in enumerate((*names, "reward"))
    }
    return {
        "transitions": len(data),
        "outputs": outputs,
        "coverage": {str(level): float(value.mean()) for level, value in coverage.items()},
        "open_loop": open_loop_error(dynamics, data, horizon, starts),
        "termination": termination_agreement(dynamics, data),
    }


def mixture(dynamics: Dynamics, data: DynamicsData) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (N, D + 1) of the elites' equal mixture, for next observation and reward."""
    elites = list(dynamics.elites)
    means, stds = [], []
    for i in range(0, len(data), ROWS):
        s, a = (torch.from_numpy(x[i : i + ROWS]).to(dynamics.device) for x in (data.observations, data.actions))
        mean, std = (x[elites].double() for x in dynamics.predict(s, a))
        centre = mean.mean(0)
        means.append(centre.cpu().numpy())
        stds.append((std.square() + (mean - centre).square()).mean(0).sqrt().cpu().numpy())
    return np.concatenate(means), np.concatenate(stds)


def chains(data: DynamicsData, horizon: int) -> np.ndarray:
    """(n, horizon) rows of transitions that follow each other within one episode."""
    follows = (np.diff(data.frame) == 1) & (data.episode[1:] == data.episode[:-1]) & ~data.terminated[:-1]
    run = np.concatenate([[0], np.cumsum(~follows)])  # transitions of one number follow each other
    first = np.arange(max(0, len(data) - horizon + 1))
    first = first[run[first] == run[first + horizon - 1]]
    return first[:, None] + np.arange(horizon)


def open_loop_error(dynamics: Dynamics, data: DynamicsData, horizon: int, starts: int) -> dict[str, Any] | None:
    """Error of the elites' mean after 1 to `horizon` steps on the recorded actions, nothing observed in between.

    Root mean square over the observation's numbers, each in units of its spread in the data, with a 95 % interval from
    a bootstrap over episodes; beside it the error of saying that nothing changes. None where no episode is long enough.
    """
    rows = chains(data, horizon)
    if len(rows) == 0:
        return None
    draws = philox(0, horizon, Stream.DYNAMICS)
    if len(rows) > starts:
        rows = rows[np.sort(draws.choice(len(rows), starts, replace=False))]
    spread = data.observations.std(0)
    spread[spread == 0] = 1.0
    s = torch.from_numpy(data.observations[rows[:, 0]]).to(dynamics.device)
    start, episode = data.observations[rows[:, 0]], data.episode[rows[:, 0]]
    squares, still = [], []
    for step in range(horizon):
        mean, _ = dynamics.predict(s, torch.from_numpy(data.actions[rows[:, step]]).to(dynamics.device))
        s = mean[list(dynamics.elites)].mean(0)[:, :-1]
        truth = data.next_observations[rows[:, step]]
        squares.append((((s.cpu().numpy() - truth) / spread) ** 2).mean(1))
        still.append((((start - truth) / spread) ** 2).mean(1))
    error = np.stack(squares, 1)  # (n, horizon)
    episodes = np.unique(episode)
    sums = np.stack([error[episode == e].sum(0) for e in episodes])
    counts = np.array([(episode == e).sum() for e in episodes], float)
    picks = draws.integers(len(episodes), size=(RESAMPLES, len(episodes)))
    resampled = np.sqrt(sums[picks].sum(1) / counts[picks].sum(1)[:, None])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {
        "error": np.sqrt(error.mean(0)).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "no_change": np.sqrt(np.stack(still, 1).mean(0)).tolist(),
        "starts": len(rows),
        "episodes": len(episodes),
    }


def termination_agreement(dynamics: Dynamics, data: DynamicsData) -> dict[str, Any]:
    """Recorded ends against the rule's on recorded next observations, or against the elites' vote."""
    found: dict[str, Any] = {"rule": dynamics.termination}
    if dynamics.termination != LEARNED:
        rule = find_rule(dynamics.termination, dynamics.observation_size)
        return found | agreement(rule, data.next_observations, data.terminated)
    votes = []
    for i in range(0, len(data), ROWS):
        s, a = (torch.from_numpy(x[i : i + ROWS]).to(dynamics.device) for x in (data.observations, data.actions))
        logit = dynamics.network(dynamics.scales.inputs(s, a).expand(dynamics.network.members, -1, -1))[2]
        votes.append((logit[list(dynamics.elites)] > 0).float().mean(0).cpu().numpy() > 0.5)
    ended = np.concatenate(votes)
    return found | {
        "both": int((ended & data.terminated).sum()),
        "only_rule": int((ended & ~data.terminated).sum()),
        "only_recorded": int((~ended & data.terminated).sum()),
        "neither": int((~ended & ~data.terminated).sum()),
    }
