"""The simulated joint_trajectory_controller accepts, refuses and interpolates as ros2_controllers' does."""

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.controller import Moment
from embodied.robot_bridge.trajectory_controller import Goal, TrajectoryController, read_goal

NAMES = ("a", "b")
NOW, STAMP = 100.0, 5_000_000_000
EPSILON = float(np.finfo(np.float32).eps)


def moment(now: float = NOW, stamp_ns: int = STAMP, position=(0.0, 0.0), velocity=(0.0, 0.0)) -> Moment:
    return Moment(now, stamp_ns, 0.004, np.array(position, float), np.array(velocity, float))


def goal(times, positions, velocities=None, accelerations=None, names=NAMES, stamp_ns=0, effort=False) -> Goal:
    rows = np.array(positions, float).reshape(len(times), len(names))
    absent = np.full_like(rows, np.nan)
    speeds = absent if velocities is None else np.array(velocities, float).reshape(rows.shape)
    rates = absent if accelerations is None else np.array(accelerations, float).reshape(rows.shape)
    return Goal(stamp_ns, tuple(names), np.array(times, float), rows, speeds, rates, effort)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (goal([0.1], [[1.0]], names=("a",)), "'b'"),
        (goal([0.1], [[1.0, 1.0]], names=("a", "c")), "'b', 'c'"),
        (goal([0.1], [[1.0, 1.0]], names=("a", "a")), "'b'"),
        (goal([0.1], [[1.0, 1.0, 1.0]], names=("a", "b", "b")), "named twice"),
        (goal([0.1], [[1.0, 1.0, 1.0]], names=("a", "b", "c")), "'c'"),
        (goal([], np.zeros((0, 2))), "no points"),
        (goal([0.1, 0.1], [[1, 1], [2, 2]]), "strictly increase"),
        (goal([0.2, 0.1], [[1, 1], [2, 2]]), "strictly increase"),
        (goal([-0.1, 0.1], [[1, 1], [2, 2]]), "strictly increase"),
        (goal([0.1], [[np.nan, 1]]), "not finite"),
        (goal([0.1], [[np.inf, 1]]), "not finite"),
        (goal([0.1, 0.2], [[1, 1], [1, 1]], [[np.inf, 1], [0, 0]]), "not finite"),
        (goal([0.1], [[1, 1]], [[0.1, 0]]), "last point"),
        (goal([0.1], [[1, 1]], [[0, -2 * EPSILON]]), "last point"),
        (goal([0.1], [[1, 1]], effort=True), "effort"),
        (goal([0.1], [[1, 1]], None, [[0, 0]]), "accelerations without velocities"),
        (goal([0.1], [[1, 1]], stamp_ns=STAMP - 100_000_001), "ended before"),
    ],
)
def test_a_whole_message_is_refused_and_the_arm_stays(message: Goal, reason: str) -> None:
    controller = TrajectoryController(NAMES, np.array([0.5, 0.6]))
    assert reason in controller.accept(message, moment())
    np.testing.assert_array_equal(controller.sample(NOW + 1).position, [0.5, 0.6])


@pytest.mark.parametrize(
    "message",
    [
        goal([0.1], [[1, 1]], [[0, EPSILON / 2]]),  # below the source's threshold
        goal([0.1], [[1, 1]], stamp_ns=STAMP - 100_000_000),  # ends this very moment
        goal([0.0], [[1, 1]]),
        goal([0.1], [[1, 1]], stamp_ns=STAMP + 10**9),  # starts in the future
    ],
)
def test_what_the_real_controller_accepts_at_the_edge(message: Goal) -> None:
    assert TrajectoryController(NAMES, np.zeros(2)).accept(message, moment()) == ""


def test_positions_are_interpolated_linearly_then_held_and_joints_mapped_by_name() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    assert controller.accept(goal([0.1, 0.2], [[2, 1], [2, 3]], names=("b", "a")), moment()) == ""
    for seconds, expected in ((0.0, [0, 0]), (0.05, [0.5, 1.0]), (0.1, [1, 2]), (0.15, [2, 2]), (9.0, [3, 2])):
        np.testing.assert_allclose(controller.sample(NOW + seconds).position, expected, atol=1e-9)
    np.testing.assert_allclose(controller.sample(NOW + 0.05).velocity, [10.0, 20.0], atol=1e-6)
    np.testing.assert_array_equal(controller.sample(NOW + 9).velocity, 0.0)


def test_a_cubic_equals_its_closed_form() -> None:
    controller = TrajectoryController(NAMES, np.array([0.2, -0.1]))
    controller.accept(goal([0.4, 0.8], [[1, 2], [0, 0]], [[0.5, -1], [0, 0]]), moment())
    for t in np.linspace(0.41, 0.79, 7):
        s = (t - 0.4) / 0.4
        p0, v0, p1, v1 = np.array([1.0, 2.0]), np.array([0.5, -1.0]) * 0.4, np.zeros(2), np.zeros(2)
        basis = (2 * s**3 - 3 * s**2 + 1, s**3 - 2 * s**2 + s, -2 * s**3 + 3 * s**2, s**3 - s**2)
        expected = basis[0] * p0 + basis[1] * v0 + basis[2] * p1 + basis[3] * v1
        np.testing.assert_allclose(controller.sample(NOW + t).position, expected, atol=1e-6)
    # from rest to rest the peak speed is 1.5 of the mean
    controller = TrajectoryController(NAMES, np.zeros(2))
    controller.accept(goal([1.0], [[1, 1]], [[0, 0]]), moment())
    np.testing.assert_allclose(controller.sample(NOW + 0.5).velocity, 1.5)


def test_a_quintic_equals_its_closed_form_and_minimum_jerk() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    controller.accept(goal([2.0], [[1, -1]], [[0, 0]], [[0, 0]]), moment())
    for s in (0.1, 0.5, 0.9):
        state = controller.sample(NOW + 2 * s)
        np.testing.assert_allclose(state.position, np.array([1, -1]) * (10 * s**3 - 15 * s**4 + 6 * s**5), atol=1e-9)
        np.testing.assert_allclose(state.velocity, np.array([1, -1]) * 15 * s**2 * (1 - s) ** 2, atol=1e-9)
    # between two points with everything given: a polynomial of degree five is met exactly
    c = np.array([0.3, -0.2, 0.4, 0.1, -0.5, 0.2])
    at = [np.polynomial.Polynomial(c).deriv(k) for k in range(3)]
    rows = [[[f(t)] * 2 for t in (0.1, 0.6)] for f in at]
    first = goal([0.1, 0.6, 0.7], [*rows[0], [0, 0]], [*rows[1], [0, 0]], [*rows[2], [0, 0]])
    controller.accept(first, moment())
    for t in (0.2, 0.35, 0.55):
        state = controller.sample(NOW + t)
        np.testing.assert_allclose(state.position, at[0](t), atol=1e-6)
        np.testing.assert_allclose(state.velocity, at[1](t), atol=1e-5)
        assert state.acceleration is not None
        np.testing.assert_allclose(state.acceleration, at[2](t), atol=1e-4)


def test_a_segment_is_as_smooth_as_the_poorer_of_its_ends() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    nan = [np.nan, np.nan]
    mixed = goal([0.2, 0.4], [[1, 1], [2, 2]], [nan, [0, 0]])
    assert controller.accept(mixed, moment()) == ""
    np.testing.assert_allclose(controller.sample(NOW + 0.3).position, 1.5, atol=1e-6)
    np.testing.assert_allclose(controller.sample(NOW + 0.25).position, 1.25, atol=1e-6)


def test_replanning_starts_from_the_desired_state_or_from_the_measured_one() -> None:
    desired = TrajectoryController(NAMES, np.zeros(2))
    desired.accept(goal([1.0], [[1, 1]], [[0, 0]]), moment())
    later = moment(NOW + 0.5, STAMP, position=(0.4, 0.4), velocity=(1.0, 1.0))
    desired.accept(goal([0.5], [[2, 2]], [[0, 0]]), later)
    before, after = (desired.sample(NOW + 0.5 + dt) for dt in (0.0, 1e-4))
    np.testing.assert_allclose(before.position, 0.5)
    np.testing.assert_allclose(before.velocity, 1.5)
    np.testing.assert_allclose(after.position, 0.5 + 1.5e-4, atol=1e-6)
    measured = TrajectoryController(NAMES, np.zeros(2), from_desired=False)
    measured.accept(goal([1.0], [[1, 1]], [[0, 0]]), moment())
    measured.accept(goal([0.5], [[2, 2]], [[0, 0]]), later)
    np.testing.assert_allclose(measured.sample(NOW + 0.5).position, 0.4)
    np.testing.assert_allclose(measured.sample(NOW + 0.5).velocity, 1.0)


def test_points_of_a_stamped_trajectory_that_have_passed_are_not_visited() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    late = goal([0.1, 0.5], [[9, 9], [1, 1]], stamp_ns=STAMP - 200_000_000)
    assert controller.accept(late, moment()) == ""
    # 0.2 s late: the command is on the segment from 9 to 1 at once, a quarter of the way
    np.testing.assert_allclose(controller.sample(NOW).position, 7.0, atol=1e-6)
    np.testing.assert_allclose(controller.sample(NOW + 0.1).position, 5.0, atol=1e-6)
    np.testing.assert_allclose(controller.sample(NOW + 0.31).position, 1.0)


def test_stamp_zero_starts_now_and_a_future_stamp_moves_at_once_towards_its_first_point() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    controller.accept(goal([0.1], [[1, 1]], stamp_ns=0), moment())
    np.testing.assert_allclose(controller.sample(NOW + 0.05).position, 0.5, atol=1e-6)
    controller = TrajectoryController(NAMES, np.zeros(2))
    controller.accept(goal([0.1], [[1, 1]], stamp_ns=STAMP + 900_000_000), moment())
    np.testing.assert_allclose(controller.sample(NOW + 0.5).position, 0.5, atol=1e-6)
    np.testing.assert_allclose(controller.sample(NOW + 5).position, 1.0)


def test_hold_forgets_the_trajectory() -> None:
    controller = TrajectoryController(NAMES, np.zeros(2))
    controller.accept(goal([1.0], [[1, 1]]), moment())
    controller.hold(np.array([0.3, 0.4]))
    np.testing.assert_array_equal(controller.sample(NOW + 2).position, [0.3, 0.4])


def test_bytes_are_read_point_by_point() -> None:
    rows = np.arange(4.0).reshape(2, 2)
    data = m.joint_trajectory(m.Trajectory(7, "", NAMES, np.array([0.1, 0.25]), rows, rows * 2, rows * 3))
    read = read_goal(data)
    assert (read.stamp_ns, read.names, read.effort) == (7, NAMES, False)
    np.testing.assert_allclose(read.times, [0.1, 0.25])
    np.testing.assert_array_equal(read.accelerations, rows * 3)
    plain = read_goal(m.joint_trajectory(m.Trajectory(7, "", NAMES, np.array([0.1, 0.25]), rows)))
    assert np.isnan(plain.velocities).all()
    message = m.decode(data, m.JOINT_TRAJECTORY)
    message.points[1].effort = np.zeros(2)
    assert read_goal(m.encode(message)).effort
    message.points[1].positions = np.zeros(3)
    with pytest.raises(InputError, match="2 joint names but 3 positions at point 1"):
        read_goal(m.encode(message))
