"""Windows, pairs and segments over random episode layouts: nothing crosses an end, nothing valid is out of reach."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import InputError, StoreError
from embodied.datasets.transitions import TransitionIndex
from embodied.datasets.windows import Runs, SegmentSampler, Starts, step_runs, window_rows

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def laid_out(length: list[int]) -> Runs:
    """Episodes one after another."""
    return Runs(np.cumsum([0, *length[:-1]]), np.array(length))


def episode_of(runs: Runs, rows: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(runs.episode_length)), runs.episode_length)[rows]


def valid_starts(length: list[int], window: int) -> list[int]:
    """By trying each row."""
    episode = np.repeat(np.arange(len(length)), length)
    rows = range(len(episode) - window + 1)
    return [row for row in rows if len(set(episode[row : row + window])) == 1]


@given(length=lengths, window=st.integers(1, 10))
@settings(max_examples=300, deadline=None)
def test_starts_are_exactly_the_rows_whose_window_stays_in_its_episode(length: list[int], window: int) -> None:
    starts = Starts(laid_out(length), window)
    expected = valid_starts(length, window)
    assert len(starts) == len(expected)
    rows, which = starts.rows(np.arange(len(starts)))
    assert rows.tolist() == expected
    np.testing.assert_array_equal(starts.episode[which], episode_of(laid_out(length), rows))
    assert starts.skipped == sum(n < window for n in length)


@given(length=lengths, window=st.integers(1, 4), data=st.data())
@settings(max_examples=200, deadline=None)
def test_segments_are_whole_reach_every_valid_row_and_only_chosen_episodes(
    length: list[int], window: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(length) - 1), min_size=1, unique=True))
    expected = [r for r in valid_starts(length, window) if episode_of(laid_out(length), np.array(r)) in chosen]
    if not expected:
        with pytest.raises(StoreError, match=f"No episode has the {window} rows"):
            SegmentSampler(laid_out(length), window, chosen=chosen)
        return
    sampler = SegmentSampler(laid_out(length), window, seed=1, chosen=chosen)
    assert sampler.starts.skipped == sum(length[i] < window for i in chosen)
    drawn = sampler.sample(0, 40 * len(expected))
    assert set(drawn.tolist()) == set(expected)  # misses one with a probability below 1e-15
    assert set(sampler.stratified(0, 40 * len(expected)).tolist()) <= set(expected)


@given(length=lengths, batch=st.integers(1, 60), step=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_stratified_segments_are_spread_over_episodes_and_time(length: list[int], batch: int, step: int) -> None:
    sampler = SegmentSampler(laid_out(length), 3, seed=2) if max(length) >= 3 else None
    if sampler is None:
        return
    rows = sampler.stratified(step, batch)
    assert len(rows) == batch
    starts = sampler.starts
    episode = episode_of(laid_out(length), rows)
    per_episode = np.array([(episode == e).sum() for e in starts.episode])
    assert per_episode.max() - per_episode.min() <= 1
    for first, count, e in zip(starts.first, starts.count, starts.episode, strict=True):
        position = np.sort(rows[episode == e] - first)
        if m := len(position):  # one in each m-th of the valid rows
            turn = np.arange(m)
            assert (position >= np.floor(turn / m * count)).all()
            assert (position <= np.floor((turn + 1) / m * count)).all()


def test_one_stratified_segment_per_episode_still_covers_early_and_late() -> None:
    sampler = SegmentSampler(laid_out([110] * 50), 11, seed=0)
    position = sampler.stratified(0, 50) % 110
    assert np.bincount(position // 10, minlength=10).tolist() == [5] * 10


@pytest.mark.parametrize("batch", [2, 3])  # with three, one of the two episodes gives two
def test_each_stratified_draw_alone_is_uniform(batch: int) -> None:
    sampler = SegmentSampler(laid_out([7, 1, 4]), 2, seed=0)
    rows = np.concatenate([sampler.stratified(step, batch) for step in range(6000)])
    assert len(rows) == 6000 * batch
    share = np.bincount(rows, minlength=12) / len(rows)
    np.testing.assert_allclose(share, [1 / 12] * 6 + [0, 0] + [1 / 6] * 3 + [0], atol=0.01)


def test_segments_are_a_function_of_seed_and_step() -> None:
    runs = laid_out([50, 60])
    sampler = SegmentSampler(runs, 5, seed=3)
    for draw in (sampler.sample, sampler.stratified):
        first = draw(4, 32)
        draw(5, 32)
        np.testing.assert_array_equal(first, draw(4, 32))
        assert (first != draw(5, 32)).any()
    assert (SegmentSampler(runs, 5, seed=4).sample(4, 32) != sampler.sample(4, 32)).any()


def test_a_stack_repeats_the_first_frame_of_its_own_episode() -> None:
    runs = laid_out([3, 1, 4])
    rows, is_pad = window_rows(runs, np.array([0, 2, 3, 5, 7]), range(-3, 1))
    assert rows.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [3, 3, 3, 3], [4, 4, 4, 5], [4, 5, 6, 7]]
    assert is_pad.sum(1).tolist() == [3, 1, 3, 2, 0]
    assert not is_pad[:, -1].any()


@given(length=lengths, offsets=st.lists(st.integers(-12, 12), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_windows_stay_in_their_episode_and_say_where_they_repeat(length: list[int], offsets: list[int]) -> None:
    runs = laid_out(length)
    frame = np.arange(sum(length))
    rows, is_pad = window_rows(runs, frame, offsets)
    episode = episode_of(runs, frame)
    np.testing.assert_array_equal(episode_of(runs, rows), np.repeat(episode[:, None], len(offsets), 1))
    wanted = frame[:, None] + np.array(offsets)
    inside = (wanted >= 0) & (wanted < len(frame))
    inside[inside] = (episode[wanted.clip(0, len(frame) - 1)] == episode[:, None])[inside]
    np.testing.assert_array_equal(is_pad, ~inside)
    np.testing.assert_array_equal(rows[inside], wanted[inside])


def index_of(frame: list[int], next_frame: list[int], masks: list[float], episode: list[int]) -> TransitionIndex:
    return TransitionIndex(
        np.array(frame), np.array(next_frame), np.array(masks, np.float32), np.ones(len(frame), np.float32),
        np.array(episode),
    )  # fmt: skip


# Frames 0-3 of an episode that was cut (3 is its final observation); 4, 5 terminal without one; 6-10 with a gap at 8.
INDEX = index_of(
    [0, 1, 2, 4, 5, 6, 7, 9], [1, 2, 3, 5, 5, 7, 8, 10], [1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, 2]
)


def test_action_chunks_end_at_the_last_step_and_at_a_gap() -> None:
    runs = step_runs(INDEX)
    assert runs.episode_start.tolist() == [0, 4, 6, 9]
    assert runs.episode_length.tolist() == [3, 2, 2, 1]
    rows, is_pad = window_rows(runs, INDEX.frame, range(3))
    assert rows.tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [4, 5, 5], [5, 5, 5], [6, 7, 7], [7, 7, 7], [9, 9, 9]]
    assert (~is_pad).sum(1).tolist() == [3, 2, 1, 2, 1, 2, 1, 1]
    assert step_runs(INDEX.of_episodes([1])).episode_start.tolist() == [4]


def test_two_episodes_whose_rows_touch_are_two_runs() -> None:
    """The first was cut without a final observation and lost its last row: 1 leads to 2, and 3 is another's first."""
    runs = step_runs(index_of([0, 1, 3], [1, 2, 4], [1, 1, 1], [0, 0, 1]))
    assert runs.episode_length.tolist() == [2, 1]
    touching = index_of([0, 1, 2], [1, 2, 3], [1, 0, 1], [0, 0, 0])  # a termination ends a run, whatever follows it
    assert step_runs(touching).episode_length.tolist() == [2, 1]
    other = dataclasses.replace(touching, masks=np.ones(3, np.float32), episode=np.array([0, 0, 1]))
    assert step_runs(other).episode_length.tolist() == [2, 1]


def test_what_cannot_be_asked_for() -> None:
    runs = step_runs(INDEX)
    for frame in (3, 8, 11, -1):  # a final observation, a gap, beyond the end, before the start
        with pytest.raises(InputError, match=f"Frame {frame} lies in none of the 4 episodes"):
            window_rows(runs, np.array([0, frame]), range(2))
    with pytest.raises(InputError, match="at least one row"):
        Starts(runs, 0)
    with pytest.raises(StoreError, match=r"4 rows of a segment: the longest of all has 3"):
        SegmentSampler(runs, 4)
    with pytest.raises(InputError, match="no episode"):
        window_rows(Runs(np.empty(0, np.int64), np.empty(0, np.int64)), np.array([0]), range(2))
