import numpy as np
import pytest

from embodied.contracts.errors import InputError, LabelError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import observation_matrix, split_episodes, transitions
from embodied.datasets.write_store import StoreWriter

# (steps, rows, terminated): truncated with final observation, terminal with, terminal without, cut without.
EPISODES = [(3, 4, False), (2, 3, True), (2, 2, True), (3, 3, False)]
FRAMES = 12


def make_store(path, episodes=EPISODES, has_reward=True) -> EpisodeStore:
    spec = DatasetSpec(
        observations={"a": ArraySpec((2,)), "b": ArraySpec(())},
        images={},
        action=ActionSpec((1,)),
        has_reward=has_reward,
    )
    writer = StoreWriter(path, spec, {"config": {}, "inputs": {}})
    first = 0
    for index, (steps, rows, ends) in enumerate(episodes):
        step_valid, terminated, truncated = end_flags(steps, rows, ends)
        frame = np.arange(first, first + rows, dtype=np.float32)
        first += rows
        writer.write_episode(
            index,
            Episode(
                observations={"a": np.stack([frame, -frame], 1), "b": frame * 10},
                images={},
                action=padded_last(np.ones((steps, 1), np.float32), rows),
                step_valid=step_valid,
                terminated=terminated,
                truncated=truncated,
                timestamp=np.arange(rows) * 0.1,
                reward=frame + 100 if has_reward else None,
            ),
        )
    return writer.finish(len(episodes))


def add_label(store, name, alignment="post"):
    keys = {"labeller": "t", "config": {}, "dataset_fingerprint": store.fingerprint, "code_version": "1"}
    writer = LabelWriter(store, name, keys, alignment=alignment)
    writer.write_block(0, np.arange(store.num_frames) * 1.0)
    writer.finish()


def test_no_transition_crosses_an_episode_and_only_termination_cuts_the_bootstrap(tmp_path):
    index = transitions(make_store(tmp_path / "s"), reward=None)
    assert index.frame.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert index.next_frame.tolist() == [1, 2, 3, 5, 6, 8, 8, 10, 11]
    assert index.masks.tolist() == [1, 1, 1, 1, 0, 1, 0, 1, 1]
    assert index.episode.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert not index.reward.any()
    assert index.masks.dtype == index.reward.dtype == np.float32


def test_label_is_paid_one_frame_later_and_the_source_reward_is_not_shifted(tmp_path):
    store = make_store(tmp_path / "s")
    add_label(store, "clip")
    add_label(store, "early", alignment="pre")
    assert transitions(store, "clip").reward.tolist() == [1, 2, 3, 5, 6, 8, 8, 10, 11]
    assert transitions(store, "clip", alignment="pre").reward.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert transitions(store, "early").reward.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert transitions(store, "source").reward.tolist() == [100, 101, 102, 104, 105, 107, 108, 109, 110]


def test_of_episodes_keeps_only_those(tmp_path):
    index = transitions(make_store(tmp_path / "s"), "source").of_episodes([1, 3])
    assert index.frame.tolist() == [4, 5, 9, 10]
    assert index.reward.tolist() == [104, 105, 109, 110]


def test_wrong_reward_names(tmp_path):
    store = make_store(tmp_path / "s", has_reward=False)
    with pytest.raises(InputError, match="no reward of its own"):
        transitions(store, "source")
    add_label(store, "clip")
    with pytest.raises(LabelError, match="Did you mean 'clip'"):
        transitions(store, "clipp")
    with pytest.raises(InputError, match="Valid: post, pre"):
        transitions(store, "clip", alignment="next")


def test_store_without_steps_is_refused(tmp_path):
    spec = DatasetSpec({"a": ArraySpec((1,))}, {}, None)
    writer = StoreWriter(tmp_path / "s", spec, {"config": {}, "inputs": {}})
    no = np.zeros(2, bool)
    writer.write_episode(0, Episode({"a": np.zeros((2, 1), np.float32)}, {}, None, no, no, no, np.zeros(2)))
    with pytest.raises(StoreError, match="no valid step"):
        transitions(writer.finish(1), None)


def test_observation_matrix_keeps_the_order_of_keys(tmp_path, monkeypatch):
    from embodied.datasets import transitions as module

    monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
    store = make_store(tmp_path / "s")
    frame = np.arange(FRAMES, dtype=np.float32)
    matrix = observation_matrix(store, ["b", "a"])
    np.testing.assert_array_equal(matrix, np.stack([frame * 10, frame, -frame], 1))
    assert matrix.dtype == np.float32
    with pytest.raises(InputError, match="no observation 'c'"):
        observation_matrix(store, ["a", "c"])


def test_split_is_by_episode_disjoint_and_repeatable(tmp_path):
    store = make_store(tmp_path / "s", episodes=[(2, 3, False)] * 20)
    train, holdout = split_episodes(store, 0.25, seed=3)
    assert (len(train), len(holdout)) == (15, 5)
    assert sorted([*train, *holdout]) == list(range(20))
    np.testing.assert_array_equal(holdout, split_episodes(store, 0.25, seed=3)[1])
    assert holdout.tolist() != split_episodes(store, 0.25, seed=4)[1].tolist()
    assert len(split_episodes(store, 0.0, seed=3)[1]) == 0
    with pytest.raises(InputError, match="holdout_fraction"):
        split_episodes(store, 1.0, seed=0)
