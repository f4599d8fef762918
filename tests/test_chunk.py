"""Chunks become one path: late points dropped, later ones blended in, nothing mended."""

import dataclasses

import numpy as np
import pytest

from embodied.robot_bridge.chunk import Chunk, Timeline, malformed, schedule, timeline, untimely
from embodied.robot_bridge.profile import Safety

NAMES = ("a", "b")
CONFIG = Safety(action_delay=0.0, chunk_horizon=0.4, chunk_blend=0.05)
HERE = np.array([5.0, -5.0])


def chunk(times: list[float], first: list[float], observed_at: float = 10.0, received_at: float = 10.0) -> Chunk:
    """Joint a as given, joint b its negative."""
    rows = np.array(first)[:, None] * np.array([1.0, -1.0])
    return Chunk("r", 1, observed_at, received_at, NAMES, np.array(times), rows)


def follow(item: Chunk, now: float, previous: Timeline | None = None, config: Safety = CONFIG) -> Timeline:
    return schedule(item, item.positions, now, HERE, previous, config)


def a(path: Timeline, *times: float) -> list[float]:
    return path.at(np.array(times)[:, None])[:, 0].tolist()


def test_a_timeline_is_linear_between_knots_and_goes_straight_on() -> None:
    path = timeline(np.array([1.0, 2.0, 4.0]), np.array([[0.0, 0.0], [1.0, -1.0], [2.0, -2.0]]))
    assert a(path, 0.0, 1.5, 2.0, 3.0, 5.0) == [0.0, 0.5, 1.0, 1.5, 2.5]
    assert path.velocity(np.array([[1.5], [2.0], [9.0]]))[:, 1].tolist() == [-1.0, -0.5, -0.5]
    np.testing.assert_array_equal(path.at(np.array([[1.5, 3.0]])), [[0.5, -1.5]])  # a time for each joint


def test_a_chunk_that_lies_ahead_is_reached_in_a_straight_line() -> None:
    path = follow(chunk([0.1, 0.2], [5.2, 5.4]), now=10.0)
    np.testing.assert_allclose(path.times, [10.0, 10.1, 10.2])
    np.testing.assert_allclose(a(path, 10.0, 10.05, 10.1, 10.15), [5.0, 5.1, 5.2, 5.3])
    after = follow(chunk([0.1], [6.0], observed_at=10.1), 10.15, path)
    np.testing.assert_allclose(a(after, 10.15, 10.2), [5.3, 6.0])  # from where the path is, not from HERE


def test_late_points_are_dropped_and_the_rest_keeps_its_time() -> None:
    path = follow(chunk([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]), now=10.25)
    assert path.times[0] == 10.25
    np.testing.assert_allclose(a(path, 10.3, 10.35, 10.4), [3.0, 3.5, 4.0])  # after the fade of 0.05 s
    assert path.end == pytest.approx(10.4)


def test_a_chunk_in_progress_is_faded_into() -> None:
    old = timeline(np.array([10.0, 10.5]), np.array([[0.0, 0.0], [0.5, -0.5]]))  # 1 rad/s
    new = chunk([0.1, 0.6], [1.1, 1.6])  # the same, one radian on
    path = follow(new, 10.2, old)
    np.testing.assert_allclose(a(path, 10.2, 10.225, 10.25, 10.3), [0.2, 0.225 + 0.5, 1.25, 1.3], atol=1e-9)
    at_once = follow(new, 10.2, old, dataclasses.replace(CONFIG, chunk_blend=0.0))
    np.testing.assert_allclose(a(at_once, 10.21), [1.21], atol=1e-9)


def test_a_chunk_is_cut_at_the_horizon_and_delayed_as_configured() -> None:
    path = follow(chunk([0.1, 1.1], [5.0, 6.0]), now=10.0)
    assert path.end == pytest.approx(10.4)
    assert a(path, 10.4)[0] == pytest.approx(5.3)
    later = follow(chunk([0.1, 0.2], [6.0, 7.0]), 10.0, config=dataclasses.replace(CONFIG, action_delay=0.03))
    np.testing.assert_allclose(later.times, [10.0, 10.13, 10.23])


@pytest.mark.parametrize(
    ("now", "observed_at", "reason"),
    [
        (10.19, 10.0, ""),
        (10.21, 10.0, "its last point passed"),
        (11.0, 10.0, "1.000 s old"),
        (10.0, 10.11, "in the future"),
        (10.0, 10.09, ""),
    ],
)
def test_what_is_untimely(now: float, observed_at: float, reason: str) -> None:
    found = untimely(chunk([0.1, 0.2], [0.0, 0.0], observed_at), now, CONFIG)
    assert (reason in found) if reason else (found == "")
    delayed = dataclasses.replace(CONFIG, action_delay=0.05)
    assert untimely(chunk([0.1, 0.2], [0.0, 0.0]), 10.24, delayed) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": np.array([[np.nan, 0.0]] * 2)}, "not finite"),
        ({"positions": np.array([[-np.inf, 0.0]] * 2)}, "not finite"),
        ({"times": np.array([0.1, np.nan])}, "not finite"),
        ({"observed_at": np.inf}, "not finite"),
        ({"positions": np.array([[0.0, 0.0], [0.0, -1e7]])}, "the target -1e+07"),
        ({"positions": np.zeros((2, 3))}, "shape"),
        ({"positions": np.zeros((3, 2))}, "shape"),
        ({"times": np.zeros(0), "positions": np.zeros((0, 2))}, "shape"),
        ({"times": np.array(0.1)}, "shape"),
        ({"names": ("a", "c")}, "joints are a, c"),
        ({"names": ("a", "b", "b")}, "joints are a, b, b"),
        ({"times": np.array([0.2, 0.1])}, "rise"),
        ({"times": np.array([-0.1, 0.1])}, "rise"),
        ({"times": np.arange(2000.0), "positions": np.zeros((2000, 2))}, "2000 points"),
    ],
)
def test_what_is_malformed(changes: dict, reason: str) -> None:
    sound = chunk([0.1, 0.2], [0.0, 0.0])
    assert malformed(sound, NAMES) == ""
    assert malformed(dataclasses.replace(sound, names=("b", "a")), NAMES) == ""
    assert reason in malformed(dataclasses.replace(sound, **changes), NAMES)
