"""Terminations: rules against the environments' own ends, and what `auto` chooses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError
from embodied.policies.terminations import agreement, choose, find_rule

REPLAY = Path(__file__).parents[2] / "shared" / "data" / "hdf5-d4rl-hopper-sac-replay" / "hopper-replay.hdf5"


def test_rules_equal_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    for name in ("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Walker2d-v5", "Hopper-v5", "HalfCheetah-v5"):
        env = gymnasium.make(name)
        observation, _ = env.reset(seed=0)
        env.action_space.seed(0)
        rows, ends = [], []
        for _ in range(400):
            observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
            rows.append(observation)
            ends.append(terminated)
            if terminated or truncated:
                env.reset()
        rule = find_rule(choose(name, True), len(observation))
        found = agreement(rule, np.array(rows, np.float32), np.array(ends))
        assert found["only_rule"] == found["only_recorded"] == 0, (name, found)
        assert (found["both"] > 5) == (name != "HalfCheetah-v5")


def test_the_hopper_rule_equals_160_000_recorded_steps() -> None:
    if not REPLAY.exists():
        pytest.skip("the replay set of ../shared/data is not here")
    import h5py

    with h5py.File(REPLAY) as file:
        following, ends = np.asarray(file["next_observations"], np.float32), np.asarray(file["terminals"], bool)
    assert agreement(find_rule("hopper", 11), following, ends) == {
        "both": 1393,
        "only_rule": 0,
        "only_recorded": 0,
        "neither": 158607,
    }
    scaled = (following - following.mean(0)) / following.std(0)  # a normalised observation is none the rule can read
    assert agreement(find_rule("hopper", 11), scaled, ends)["only_rule"] > 100_000


def test_auto_takes_the_environments_rule_and_asks_the_data_otherwise() -> None:
    names = {"Hopper-v5": "hopper", "hopper-medium-v2": "hopper", "InvertedDoublePendulum-v5": "inverteddoublependulum"}
    for environment, rule in names.items():
        assert choose(environment, False) == rule
    assert choose("robosuite/Lift", False) == "none"
    assert choose("", True) == "learned"


def test_a_state_that_is_not_finite_ends_the_episode() -> None:
    rule = find_rule("hopper", 11)
    state = torch.zeros(3, 11)
    state[:, 0] = 1.2
    state[1, 5] = torch.nan
    state[2, 7] = 100.0
    assert rule(state).tolist() == [False, True, True]


def test_an_unknown_rule_or_a_short_observation_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean|hopper"):
        find_rule("hoper", 11)
    with pytest.raises(ConfigError, match="reads 17 numbers"):
        find_rule("walker2d", 11)
