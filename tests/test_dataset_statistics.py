"""Statistics of datasets: equal to NumPy in float64, whatever the blocks, and precise far from zero."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets import statistics
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.statistics import (
    QUANTILES,
    RunningStatistics,
    Statistics,
    array_statistics,
    image_statistics,
    store_statistics,
)
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

PROBABILITIES = list(QUANTILES.values())


def assert_equal_to_numpy(found: Statistics, rows: np.ndarray, rtol: float = 1e-12) -> None:
    rows = rows.astype(np.float64)
    assert (found.count == len(rows)).all()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=rtol, atol=1e-300)
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-9, atol=1e-12 * np.abs(rows).max())
    np.testing.assert_array_equal(found.min, rows.min(0))
    np.testing.assert_array_equal(found.max, rows.max(0))
    quantiles = np.stack(list(found.quantiles.values()))
    np.testing.assert_allclose(quantiles, np.quantile(rows, PROBABILITIES, axis=0), rtol=rtol, atol=1e-300)
    assert found.exact_quantiles


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
    offset=st.sampled_from([0.0, -3.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_any_blocks_give_what_numpy_gives_of_the_whole(
    sizes: list[int], shape: tuple[int, ...], offset: float, seed: int
) -> None:
    rows = offset + np.random.default_rng(seed).normal(size=(sum(sizes), *shape))
    running = RunningStatistics(len(rows))
    for block in np.split(rows, np.cumsum(sizes)[:-1]):
        running.add(block)
    found = running.result()
    assert found.mean.shape == found.count.shape == found.quantiles["q50"].shape == shape
    assert_equal_to_numpy(found, rows)


def test_the_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    rows = rng.lognormal(size=(5000, 2)) * [1.0, 1e8]
    b = array_statistics(rows)
    for other in (rng.permutation(rows), np.sort(rows, 0), np.sort(rows, 0)[::-1]):
        a = _in_blocks(other, 7)
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-13)
        np.testing.assert_allclose(a.std, b.std, rtol=1e-12)
        np.testing.assert_array_equal(a.quantiles["q99"], b.quantiles["q99"])


def _in_blocks(rows: np.ndarray, size: int) -> Statistics:
    running = RunningStatistics(len(rows))
    for start in range(0, len(rows), size):
        running.add(rows[start : start + size])
    return running.result()


@pytest.mark.parametrize("size", [1, 3, 1000, 100_000])
def test_a_deviation_a_billion_times_smaller_than_the_offset(size: int) -> None:
    """One sum of squares would lose it: 1e6 squared has 12 digits more than the 1e-6 of the variance's size."""
    noise = np.random.default_rng(0).normal(size=100_000 if size > 1 else 2000) * 1e-3
    found = _in_blocks(1e6 + noise, size)
    assert float(found.mean) == pytest.approx(1e6 + noise.mean(), rel=1e-14)
    assert float(found.std) == pytest.approx(noise.std(), rel=1e-6)
    naive = np.mean((1e6 + noise) ** 2) - np.mean(1e6 + noise) ** 2
    assert abs(naive / noise.var() - 1) > 1e-3


def test_what_is_not_finite_is_left_out_and_shows_in_the_count() -> None:
    rows = np.array([[1.0, np.nan, np.nan], [2.0, 5.0, np.inf], [6.0, 7.0, -np.inf]])
    for size in (1, 3):
        found = _in_blocks(rows, size)
        assert found.count.tolist() == [3, 2, 0]
        assert found.mean[:2].tolist() == [3.0, 6.0]
        assert found.std[:2] == pytest.approx([np.std([1, 2, 6]), 1.0])
        assert found.min[:2].tolist() == [1.0, 5.0]
        assert found.max[:2].tolist() == [6.0, 7.0]
        assert found.quantiles["q50"][:2].tolist() == [2.0, 6.0]
        for value in (found.mean, found.std, found.min, found.max, found.quantiles["q01"]):
            assert np.isnan(value[2])


def test_no_rows_are_refused() -> None:
    for empty in (RunningStatistics(0).result, lambda: image_statistics([])):
        with pytest.raises(InputError, match="no frames"):
            empty()


def test_quantiles_of_many_rows_are_those_of_a_sample_within_the_stated_bound() -> None:
    n = 1_000_000
    uniform = np.random.default_rng(1).permutation(n) / n  # the exact quantile of p is p
    found = array_statistics(uniform)
    assert not found.exact_quantiles
    for name, p in QUANTILES.items():
        bound = 3.3 * np.sqrt(p * (1 - p) / statistics.EXACT_ROWS)
        assert 0 < abs(float(found.quantiles[name]) - p) < bound
    assert array_statistics(uniform).quantiles == found.quantiles
    assert float(found.mean) == pytest.approx((n - 1) / 2 / n, rel=1e-12)  # moments see every row


def test_the_sample_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "EXACT_ROWS", 50)
    rows = np.random.default_rng(0).normal(size=(300, 2))
    first = _in_blocks(rows, 300)
    assert not first.exact_quantiles
    for size in (1, 7, 128):
        found = _in_blocks(rows, size)
        for name in QUANTILES:
            np.testing.assert_array_equal(found.quantiles[name], first.quantiles[name])


def test_pictures_per_channel() -> None:
    pictures = np.random.default_rng(0).integers(0, 250, (9, 5, 7, 3), dtype=np.uint8)
    pictures[..., 1] //= 3
    pictures[..., 2] = 17
    found = image_statistics([pictures[:4], pictures[4:]])
    assert_equal_to_numpy(found, pictures.reshape(-1, 3))
    assert found.std[2] == 0
    assert found.quantiles["q99"][2] == 17


# (steps, rows, terminated): cut with final observation, terminal without, cut without.
EPISODES = [(3, 4, False), (2, 2, True), (3, 3, False)]


def make_store(path: Path) -> EpisodeStore:
    spec = DatasetSpec(
        {"a": ArraySpec((2,))}, {"side": ArraySpec((4, 4, 3), "uint8")}, ActionSpec((1,)), has_reward=True
    )
    writer = StoreWriter(path, spec, {"config": {}, "inputs": {}})
    first = 0
    for index, (steps, rows, ends) in enumerate(EPISODES):
        step_valid, terminated, truncated = end_flags(steps, rows, ends)
        frame = np.arange(first, first + rows, dtype=np.float32)
        first += rows
        pictures = np.broadcast_to(frame.astype(np.uint8)[:, None, None, None], (rows, 4, 4, 3)).copy()
        writer.write_episode(
            index,
            Episode(
                observations={"a": np.stack([frame, 1e6 - frame], 1)},
                images={"side": pictures} if index != 1 else {},  # no camera there: its frames are black
                action=padded_last(np.ones((steps, 1), np.float32) * index, rows),
                step_valid=step_valid,
                terminated=terminated,
                truncated=truncated,
                timestamp=np.arange(rows) * 0.1,
                reward=frame + 100,
            ),
        )
    return writer.finish(len(EPISODES))


def test_a_store_in_small_blocks_over_valid_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 2)
    store = make_store(tmp_path / "s")
    found = store_statistics(store)
    assert sorted(found) == ["action", "observation/a", "observation/images/side", "reward", "timestamp"]
    frame = np.arange(9)
    assert_equal_to_numpy(found["observation/a"], np.stack([frame, 1e6 - frame], 1).astype(np.float32))
    steps = np.array([0, 1, 2, 4, 5, 6, 7])  # frame 8 is the last of an episode that was cut: its successor is unknown
    assert_equal_to_numpy(found["action"], np.array([[0], [0], [0], [1], [1], [2], [2]]))
    assert_equal_to_numpy(found["reward"], steps + 100)
    seen = np.array([0, 1, 2, 3, 6, 7, 8])
    assert_equal_to_numpy(found["observation/images/side"], np.repeat(seen, 16)[:, None].repeat(3, 1))


def test_only_the_episodes_asked_for(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    found = store_statistics(store, ["reward", "observation/images/side"], episodes=[1])
    assert list(found) == ["reward"]  # no picture of episode 1
    assert_equal_to_numpy(found["reward"], np.array([104, 105]))
    both = store_statistics(store, ["observation/a"], episodes=np.array([2, 0]))["observation/a"]
    assert_equal_to_numpy(both, np.stack([r := np.array([0, 1, 2, 3, 6, 7, 8]), 1e6 - r], 1).astype(np.float32))
