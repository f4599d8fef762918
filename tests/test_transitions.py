from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import ConfigError, InputError, LabelError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import TransitionIndex, n_step, observation_matrix, split_episodes, transitions
from embodied.datasets.windows import SegmentSampler, step_runs, window_rows
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


def test_n_step_by_hand(tmp_path):
    """Rewards 100 + frame, discount 0.5. Episodes: 0-3 cut, 4-6 terminal at 5, 7-8 terminal at 8, 9-11 cut."""
    index = transitions(make_store(tmp_path / "s"), "source")
    three = n_step(index, 3, 0.5)
    assert three.frame.tolist() == index.frame.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert three.reward.tolist() == [
        100 + 0.5 * 101 + 0.25 * 102,
        101 + 0.5 * 102,
        102,
        104 + 0.5 * 105,
        105,
        107 + 0.5 * 108,
        108,
        109 + 0.5 * 110,
        110,
    ]
    # Cut by time: from the last known frame, whose value is discounted k times, once by the learner itself.
    assert three.next_frame.tolist() == [3, 3, 3, 6, 6, 8, 8, 11, 11]
    assert three.masks.tolist() == [0.25, 0.5, 1, 0, 0, 0, 0, 0.5, 1]
    two = n_step(index, 2, 0.5)
    assert two.next_frame.tolist() == [2, 3, 3, 6, 6, 8, 8, 11, 11]
    assert two.masks.tolist() == [0.5, 0.5, 1, 0, 0, 0, 0, 0.5, 1]
    one = n_step(index, 1, 0.5)
    for name in ("frame", "next_frame", "masks", "reward", "episode"):
        np.testing.assert_array_equal(getattr(one, name), getattr(index, name))


def test_n_step_stops_at_a_gap_and_at_other_episodes():
    index = TransitionIndex(
        frame=np.array([0, 1, 3, 4, 5]),  # frame 2 is no step: a gap in the recording
        next_frame=np.array([1, 2, 4, 5, 6]),
        masks=np.ones(5, np.float32),
        reward=np.ones(5, np.float32),
        episode=np.array([0, 0, 0, 0, 1]),
    )
    found = n_step(index, 10, 0.5)
    assert found.reward.tolist() == [1.5, 1, 1.5, 1, 1]
    assert found.next_frame.tolist() == [2, 2, 5, 5, 6]
    assert found.masks.tolist() == [0.5, 1, 0.5, 1, 1]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 7), st.booleans(), st.booleans()), min_size=1, max_size=8),
    n=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_n_step_equals_a_walk_from_step_to_step(lengths, n, seed):
    frame, following, masks, episode, first = [], [], [], [], 0
    for number, (steps, terminal, final) in enumerate(lengths):
        rows = first + np.arange(steps)
        frame += rows.tolist()
        following += [*(rows[:-1] + 1).tolist(), rows[-1] if terminal and not final else rows[-1] + 1]
        masks += [*[1.0] * (steps - 1), 0.0 if terminal else 1.0]
        episode += [number] * steps
        first += steps + (0 if terminal and not final else 1)
    reward = np.random.default_rng(seed).normal(size=len(frame)).astype(np.float32)
    index = TransitionIndex(
        np.array(frame), np.array(following), np.array(masks, np.float32), reward, np.array(episode)
    )
    found = n_step(index, n, 0.9)
    for row in range(len(index)):
        total, k = 0.0, 0
        while k < n and row + k < len(index) and episode[row + k] == episode[row]:
            total += 0.9**k * float(reward[row + k])
            k += 1
        assert found.reward[row] == pytest.approx(total, rel=1e-5, abs=1e-6)
        assert found.next_frame[row] == following[row + k - 1]
        assert found.masks[row] == pytest.approx(masks[row + k - 1] * 0.9 ** (k - 1), rel=1e-6)


def test_n_step_settings_out_of_range(tmp_path):
    index = transitions(make_store(tmp_path / "s"), None)
    for n, discount in ((0, 0.9), (2, 1.5), (2, -0.1)):
        with pytest.raises(ConfigError, match="n of at least 1"):
            n_step(index, n, discount)


def test_pairs_stacks_and_runs_of_a_store(tmp_path: Path):
    store = make_store(tmp_path / "s")  # episodes of 4, 3, 2 and 3 frames; "b" is ten times the frame's number
    first = SegmentSampler(store, 3, seed=0).sample(0, 200)  # pairs (t, t + 2)
    assert set(first.tolist()) == {0, 1, 4, 9}
    rows, _ = window_rows(store, np.array([9, 1]), range(-1, 1))
    assert store.read_rows("observation/b", rows.reshape(-1)).tolist() == [90, 90, 0, 10]
    assert step_runs(transitions(store, None)).episode_length.tolist() == [3, 2, 2, 2]
