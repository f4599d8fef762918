"""What goals change about a training run: rewards, the range of values, what the probe compares."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.datasets.goals import Goals, Hindsight, last_frames
from embodied.policies.hl_gauss import return_support


def settle(learner: str, data: Any, config: Any, rolls_out: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Data and configuration as they are trained on, and what the rewards are, for the provenance.

    Rewards are -1 and 0, made for each goal, and never normalised. The draw of later goals takes the learner's discount
    unless it has one of its own; a histogram's support is that of -1 for ever to 0.

    Args:
        data: `TransitionData` with goals.
        rolls_out: the learner imagines steps, which have no goals.

    Raises:
        ConfigError: such a learner, or a discount of 1.
    """
    goals: Goals = data.goals
    hindsight: Hindsight = goals.hindsight
    if rolls_out:
        raise ConfigError(f"{learner} learns from imagined steps, which have no goals. Train iql, td3bc, ... instead.")
    record = {"method": "hindsight", **dataclasses.asdict(hindsight)}
    if not hasattr(config, "discount"):
        return data, config, {**record, "rewards": "unused"}
    if not config.discount < 1:
        raise ConfigError(
            f"{learner} with goals needs a discount below 1: a goal that is never reached pays -1 for ever."
        )
    if hindsight.discount is None:
        hindsight = dataclasses.replace(hindsight, discount=config.discount)
        data = dataclasses.replace(data, goals=dataclasses.replace(goals, hindsight=hindsight))
    config = dataclasses.replace(config, reward_normalization="none")
    if getattr(config, "value_head", "mse") == "hl_gauss" and not config.value_support:
        support = return_support(np.array([-1 / (1 - config.discount), 0.0]), config.value_bins, config.value_sigma)
        config = dataclasses.replace(config, value_support=(support.low, support.high))
    return data, config, {**record, "discount": hindsight.discount, "rewards": "0 where reached, else -1"}


def towards_the_end(data: Any, discount: float) -> tuple[Any, np.ndarray]:
    """For `Probe`: the data as if each run had been after what it ended in, and the rewards (N,) of that."""
    goals: Goals = data.goals
    last = last_frames(data.frame, data.next_frame)
    reached = goals.reached(goals.values[data.next_frame], goals.values[last]) & (data.next_frame != data.frame)
    rewards = np.where(reached, 0.0, np.where(data.masks == 0, -1.0 / (1.0 - discount), -1.0)).astype(np.float32)
    last_of_frame = np.zeros(len(data.observations), np.int64)
    last_of_frame[data.frame] = last
    view = SimpleNamespace(
        observations=_WithGoals(data.observations, goals.values, last_of_frame),
        actions=data.actions,
        frame=data.frame,
        next_frame=data.next_frame,
        masks=data.masks * ~reached,
        episode=data.episode,
    )
    return view, rewards


@dataclasses.dataclass(frozen=True)
class _WithGoals:
    """Rows (B,) -> (B, D + G): made where asked for, since all of them would double the data."""

    observations: np.ndarray
    values: np.ndarray
    goal: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([self.observations[rows], self.values[self.goal[rows]]], 1)
