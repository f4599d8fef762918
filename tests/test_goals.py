import dataclasses

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, StoreError
from embodied.datasets.goals import GoalSampler


@dataclasses.dataclass
class Episodes:
    episode_start: np.ndarray
    episode_length: np.ndarray


LENGTH = np.array([5, 1, 20, 12])
START = np.array([0, 5, 6, 26])
STORE = Episodes(START, LENGTH)
EPISODE = np.repeat(np.arange(4), LENGTH)


def test_every_step_has_its_own_batch_and_repeats_it():
    sampler = GoalSampler(STORE, seed=7)
    first, second = sampler.sample(3, 64), GoalSampler(STORE, seed=7).sample(3, 64)
    sampler.sample(4, 64)
    for key in ("frame", "next_frame", "goal", "intent"):
        assert first[key].dtype == np.int64
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_array_equal(first[key], sampler.sample(3, 64)[key])
    assert (first["frame"] != sampler.sample(4, 64)["frame"]).any()
    assert (first["frame"] != GoalSampler(STORE, seed=8).sample(3, 64)["frame"]).any()


def test_frames_have_successors_in_their_episode():
    batch = GoalSampler(STORE).sample(0, 20_000)
    assert (batch["next_frame"] == batch["frame"] + 1).all()
    assert (EPISODE[batch["next_frame"]] == EPISODE[batch["frame"]]).all()
    assert set(batch["frame"].tolist()) == set(range(38)) - {4, 5, 25, 37}


def test_trajectory_goals_lie_between_this_frame_and_the_last():
    batch = GoalSampler(STORE, p_current=0, p_trajectory=1, p_random=0, p_same_goal=0).sample(0, 50_000)
    last = (START + LENGTH - 1)[EPISODE[batch["frame"]]]
    for key in ("goal", "intent"):
        assert (batch[key] >= batch["frame"]).all()
        assert (batch[key] <= last).all()
        assert (batch[key] == last).any()
    # From frame 0 of a 5-frame episode, rounding a uniform draw on [0, 4] halves the two ends: 1/8, 1/4, 1/4, 1/4, 1/8.
    goals = batch["goal"][batch["frame"] == 0]
    share = np.bincount(goals, minlength=5) / len(goals)
    np.testing.assert_allclose(share, [0.125, 0.25, 0.25, 0.25, 0.125], atol=0.05)


def test_probabilities_are_those_asked_for():
    one = Episodes(np.array([0]), np.array([100_000]))
    batch = GoalSampler(one, p_current=0.2, p_trajectory=0.5, p_random=0.3, p_same_goal=0.5).sample(0, 100_000)
    assert np.mean(batch["intent"] == batch["frame"]) == pytest.approx(0.2, abs=0.01)
    assert np.mean(batch["goal"] == batch["intent"]) == pytest.approx(0.5 + 0.5 * 0.04, abs=0.01)
    # Before this frame: only a random goal, and then half of the time.
    assert np.mean(batch["intent"] < batch["frame"]) == pytest.approx(0.15, abs=0.01)


def test_goal_follows_intent_and_not_the_reverse():
    batch = GoalSampler(STORE, p_same_goal=1.0).sample(0, 1000)
    np.testing.assert_array_equal(batch["goal"], batch["intent"])
    apart = GoalSampler(STORE, p_same_goal=0.0).sample(0, 1000)
    np.testing.assert_array_equal(batch["intent"], apart["intent"])
    assert (apart["goal"] != apart["intent"]).mean() > 0.5


def test_only_the_episodes_asked_for():
    batch = GoalSampler(STORE, episodes=[0, 3]).sample(0, 5000)
    for key in ("frame", "next_frame", "goal", "intent"):
        assert set(EPISODE[batch[key]].tolist()) == {0, 3}


def test_bad_settings():
    with pytest.raises(ConfigError, match="sum to 1"):
        GoalSampler(STORE, p_random=0.5)
    with pytest.raises(ConfigError, match=r"found -0.2, 0.9 and 0.3"):
        GoalSampler(STORE, p_current=-0.2, p_trajectory=0.9)
    with pytest.raises(ConfigError, match=r"p_same_goal must lie in \[0, 1\]; found 1.5"):
        GoalSampler(STORE, p_same_goal=1.5)
    with pytest.raises(StoreError, match="No frame has a successor"):
        GoalSampler(STORE, episodes=[1])
