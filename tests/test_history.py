"""Stacks and chunks: by hand at the ends of episodes and at gaps, and the same in training and in acting."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError
from embodied.datasets.transitions import TransitionIndex
from embodied.datasets.windows import Runs
from embodied.policies.contract import PolicyContract
from embodied.policies.history import History, chunk_actions, stack_observations
from embodied.progress import Progress
from embodied.train import learning_data

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import make_episode, write_store
from tiny_bundle import tiny_contract

# Two episodes: frames 0 to 3 and 4 to 6. The second frame of each episode's end begins no step.
EPISODES = Runs(np.array([0, 4]), np.array([4, 3]))
INDEX = TransitionIndex(
    frame=np.array([0, 1, 2, 4, 5]),
    next_frame=np.array([1, 2, 3, 5, 6]),
    masks=np.ones(5, np.float32),
    reward=np.zeros(5, np.float32),
    episode=np.array([0, 0, 0, 1, 1]),
)


def test_stacks_repeat_the_first_frame_and_stay_in_the_episode() -> None:
    x = np.arange(7, dtype=np.float32)[:, None]
    stacked = stack_observations(x, EPISODES, 3)
    wanted = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [4, 4, 4], [4, 4, 5], [4, 5, 6]]
    np.testing.assert_array_equal(stacked, wanted)
    assert stack_observations(x, EPISODES, 1) is x


def test_chunks_repeat_the_last_action_and_stay_in_the_episode() -> None:
    actions = np.stack([np.arange(7), 10.0 + np.arange(7)], 1).astype(np.float32)
    chunks = chunk_actions(actions, INDEX, 3).reshape(7, 3, 2)
    np.testing.assert_array_equal(
        chunks[..., 0], [[0, 1, 2], [1, 2, 2], [2, 2, 2], [0] * 3, [4, 5, 5], [5] * 3, [0] * 3]
    )
    np.testing.assert_array_equal(chunks[INDEX.frame, :, 1], chunks[INDEX.frame, :, 0] + 10)
    assert chunk_actions(actions, INDEX, 1) is actions


def test_a_chunk_does_not_cross_a_gap_in_a_recording() -> None:
    keep = np.array([0, 2, 3, 4])  # the step at frame 1 is not valid
    gap = TransitionIndex(**{name: getattr(INDEX, name)[keep] for name in INDEX.__dataclass_fields__})
    chunks = chunk_actions(np.arange(7, dtype=np.float32)[:, None], gap, 2)
    np.testing.assert_array_equal(chunks[gap.frame], [[0, 0], [2, 2], [4, 5], [5, 5]])


def test_acting_stacks_as_training_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 2)).astype(np.float32)
    trained = stack_observations(x, EPISODES, 4)
    for first, length in zip(EPISODES.episode_start, EPISODES.episode_length, strict=True):
        history = History(4)
        for frame in range(first, first + length):
            history.append(torch.from_numpy(x[frame : frame + 1]))
            np.testing.assert_array_equal(history.stacked()[0], trained[frame])


def test_windows_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 observation or more; found 0"):
        stack_observations(np.zeros((7, 1), np.float32), EPISODES, 0)
    with pytest.raises(ConfigError, match="1 action or more; found 0"):
        chunk_actions(np.zeros((7, 1), np.float32), INDEX, 0)


def test_training_data_of_a_store_are_stacked_and_chunked_within_episodes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [make_episode(i, steps=6 + i) for i in range(3)])
    plain, _ = learning_data(store, (), None, None, Progress())
    data, contract = learning_data(store, (), None, None, Progress(), stack=2, chunk=3, execute=2)
    assert (contract.stack, contract.chunk, contract.execute) == (2, 3, 2)
    assert PolicyContract.from_json(contract.to_json()).to_json() == contract.to_json()
    np.testing.assert_array_equal(data.frame, plain.frame)
    episode = np.repeat(np.arange(3), store.episode_length)
    first = store.episode_start[episode]
    for t in range(store.num_frames):
        before = max(t - 1, first[t])
        wanted = np.concatenate([plain.observations[before], plain.observations[t]])
        np.testing.assert_array_equal(data.observations[t], wanted)
    for t, own in zip(plain.frame, plain.episode, strict=True):
        last = plain.frame[plain.episode == own].max()
        wanted = np.concatenate([plain.actions[min(t + k, last)] for k in range(3)])
        np.testing.assert_array_equal(data.actions[t], wanted)


def test_contracts_without_windows_are_written_as_before() -> None:
    assert not {"stack", "chunk", "execute"} & set(tiny_contract().to_json())
