"""What the robot is told keeps its limits between the ticks too, and stops as soon as it can."""

import numpy as np
import pytest

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion, MotionFilter, Path, Plan, brake

DT = 0.01
LIMITS = Limits(
    ("a", "b"),
    low=np.array([-1.0, -2.0]),
    high=np.array([1.0, 2.0]),
    velocity=np.array([2.0, 1.0]),
    acceleration=np.array([10.0, 5.0]),
    jerk=np.array([500.0, 400.0]),
    max_step=np.array([0.3, 0.3]),
)
BRAKE = np.zeros((0, 2))


def any_limits(rng: np.random.Generator, joints: int) -> Limits:
    """From a heavy arm at 30 % to a simulated gripper."""
    velocity = 10 ** rng.uniform(-1, 0.7, joints)
    acceleration = 10 ** rng.uniform(-0.3, 1.8, joints)
    jerk = 10 ** rng.uniform(1.0, 4.3, joints)
    low = rng.uniform(-2, -0.2, joints)
    width = rng.uniform(0.3, 3, joints)
    names = tuple(f"j{k}" for k in range(joints))
    return Limits(names, low, low + width, velocity, acceleration, jerk, np.full(joints, 0.3))


def cubic(times: np.ndarray, positions: np.ndarray, velocities: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(N, J) what a trajectory controller makes of knots: cubics through positions and velocities."""
    k = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    h = (times[k + 1] - times[k])[:, None]
    s = ((at - times[k])[:, None]) / h
    p0, p1, v0, v1 = positions[k], positions[k + 1], velocities[k] * h, velocities[k + 1] * h
    return p0 + s * (v0 + s * (3 * (p1 - p0) - 2 * v0 - v1 + s * (2 * (p0 - p1) + v0 + v1)))


def executed(start: Motion, plan: Plan, every: float) -> np.ndarray:
    """(N, J) a plan as the controller samples it every so many seconds, from `start` at time 0 on."""
    times = np.concatenate([[0.0], plan.times])
    positions = np.vstack([start.position, plan.positions])
    velocities = np.vstack([start.velocity, plan.velocities])
    return cubic(times, positions, velocities, np.arange(0.0, times[-1], every))


def worst_share(samples: np.ndarray, every: float, limits: Limits) -> np.ndarray:
    """(3,) the largest velocity, acceleration and jerk of samples, as shares of the limits."""
    bounds = (limits.velocity, limits.acceleration, limits.jerk)
    return np.array(
        [
            (np.abs(np.diff(samples, order, axis=0)) / every**order / bound).max(initial=0.0)
            for order, bound in enumerate(bounds, start=1)
        ]
    )


def test_a_stop_takes_the_time_that_the_limits_allow() -> None:
    still = np.zeros(2)
    stop = brake(Motion(still, np.array([1.5, -0.02]), still), LIMITS)
    # a: jerk to 10 rad/s² in 0.02 s, hold, back; b: too slow to reach its deceleration.
    np.testing.assert_allclose(stop.duration, [1.5 / 10 + 10 / 500, 2 * np.sqrt(0.02 / 400)])
    np.testing.assert_allclose(stop.stop[0], 1.5**2 / 20 + 1.5 * 10 / 1000)
    np.testing.assert_allclose(stop.stop[1], -0.02 * np.sqrt(0.02 / 400))


def test_every_stop_keeps_the_limits_and_ends_at_rest() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        limits = any_limits(rng, 8)
        velocity = rng.uniform(-1, 1, 8) * limits.velocity * rng.integers(0, 2, 8)
        room = np.sqrt(2 * limits.jerk * (limits.velocity - np.abs(velocity)))
        acceleration = np.clip(rng.uniform(-1, 1, 8) * rng.integers(0, 2, 8) * limits.acceleration, -room, room)
        stop = brake(Motion(np.zeros(8), velocity, acceleration), limits)
        assert (stop.duration <= limits.velocity / limits.acceleration + 2 * limits.acceleration / limits.jerk).all()
        times = np.linspace(0, stop.duration.max(), 300)
        states = [stop.at(time) for time in times]
        position, speed, bend = (
            np.array([getattr(s, n) for s in states]) for n in ("position", "velocity", "acceleration")
        )
        np.testing.assert_allclose(stop.positions(times), position, atol=1e-12)
        assert (np.abs(speed) <= limits.velocity * (1 + 1e-9)).all()
        assert (np.abs(bend) <= limits.acceleration * (1 + 1e-9)).all()
        step = times[1]
        mean = (speed[1:] + speed[:-1]) / 2
        assert (np.abs(np.diff(position, axis=0) / step - mean) <= limits.acceleration * step).all()
        before_end = stop.at(stop.duration.max() - 1e-7)
        np.testing.assert_allclose(before_end.position, stop.stop, atol=1e-7)
        np.testing.assert_allclose(before_end.velocity, 0.0, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_keeps_the_limits_however_finely_its_controller_samples_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits, dt = any_limits(rng, 3), float(rng.choice([0.002, 0.005, 0.01, 0.02]))
    motion = MotionFilter(limits, dt)
    path = motion.rest(rng.uniform(limits.low, limits.high))
    every = dt / 7  # beside the grid
    for _ in range(40):
        targets = np.repeat(rng.uniform(limits.low, limits.high)[None], 5, axis=0)
        path = motion.follow(path, limits.clip_position(targets + 0.01 * rng.standard_normal(targets.shape)))
        assert motion.violation(path) == ""
        here = motion.motion(path.advance(0))
        plan = motion.plan(path)
        # The knots alone: from the first, which the robot reaches on the plan before.
        samples = executed(here, Plan(plan.times[1:] - plan.times[0], plan.positions[1:], plan.velocities[1:]), every)
        np.testing.assert_allclose(plan.positions[0], here.position, atol=1e-12)
        assert (worst_share(samples, every, limits) <= 1.001).all()
        assert (samples >= limits.low - 1e-6).all()
        assert (samples <= limits.high + 1e-6).all()
        path = path.advance(int(rng.integers(1, 5)))


def test_a_knot_that_says_nothing_is_left_out_and_changes_nothing() -> None:
    motion = MotionFilter(LIMITS, DT)
    path = motion.rest(np.zeros(2))
    for _ in range(25):
        path = motion.follow(path.advance(1), np.array([[0.9, 1.5]]))
    plan = motion.plan(motion.follow(path, BRAKE))
    rows = motion.follow(path, BRAKE).position
    points = np.vstack([rows[1:], rows[-1:], rows[-1:]])
    every = (points[:-2] + 4 * points[1:-1] + points[2:]) / 6
    assert len(plan.times) < len(every) / 1.5
    at = DT * np.arange(1, len(every))
    np.testing.assert_allclose(cubic(plan.times, plan.positions, plan.velocities, at), every[:-1], atol=1e-9)


def test_a_plan_ends_at_rest_by_itself_soon() -> None:
    motion = MotionFilter(LIMITS, DT)
    path = motion.rest(np.zeros(2))
    for _ in range(40):
        path = motion.follow(path.advance(1), np.array([[0.9, 1.5]] * 3))
    speed = np.abs(motion.motion(path).velocity)
    assert speed.max() > 0.9
    plan = motion.plan(path)
    assert plan.times[0] == pytest.approx(DT)
    assert plan.times[-1] < 6 * DT + (speed / LIMITS.acceleration + 2 * LIMITS.acceleration / LIMITS.jerk).max()
    assert not plan.velocities[-1].any()
    assert (np.diff(plan.times) > 0).all()
    still = motion.plan(motion.rest(np.ones(2)))
    np.testing.assert_array_equal(still.positions, np.ones((2, 2)))
    np.testing.assert_array_equal(still.velocities, np.zeros((2, 2)))
    assert motion.plan(path, late=0.004).times[0] == pytest.approx(DT - 0.004)


def test_advancing_along_a_path_past_its_end_is_standing_there() -> None:
    motion = MotionFilter(LIMITS, DT)
    path = motion.follow(motion.rest(np.zeros(2)), np.array([[0.5, 0.5]] * 8))
    np.testing.assert_array_equal(path.advance(3).advance(2).position, path.advance(5).position)
    end = path.advance(10**9)
    assert end.at_rest
    np.testing.assert_array_equal(end.position[0], path.position[-1])
    assert not motion.motion(end).velocity.any()


def test_coasting_starts_at_what_is_measured_and_stays_in_the_box() -> None:
    motion = MotionFilter(LIMITS, DT)
    path = motion.coasting(np.array([0.2, 1.99]), np.array([9.0, 0.9]))
    np.testing.assert_allclose(path.position[1], [0.2, 1.99])
    np.testing.assert_allclose(motion.motion(path).velocity, [2.0, 0.0], atol=0.3)
    assert motion.violation(path) == ""
    assert motion.violation(motion.coasting(np.array([5.0, -5.0]), np.array([1.0, -1.0]))) == ""


def test_the_check_sees_each_kind_of_violation() -> None:
    motion = MotionFilter(LIMITS, DT)
    rest = motion.rest(np.zeros(2))
    for rows, word in (
        ([[0.0, 0.0], [0.0, 0.0], [0.03, 0.0], [0.06, 0.0]], "velocity limit of a"),
        ([[1.5, 0.0]] * 3, "position limit of a"),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.001]], "acceleration limit of b"),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.00045]], "jerk limit of b"),
        ([[0.0, 0.0], [np.nan, 0.0], [0.0, 0.0]], "not finite"),
    ):
        path = Path(np.array(rows), rest.velocity, rest.acceleration, rest.stop)
        assert word in motion.violation(path)
    assert motion.violation(rest) == ""


def test_a_state_on_which_ruckig_fails_is_survived() -> None:
    """Found in simulation: ruckig 0.19 has no solution for exactly these numbers."""
    low, high, velocity, acceleration, jerk, step = (np.array([x]) for x in (0.0, 0.08, 0.5, 20.0, 2000.0, 0.2))
    limits = Limits(("g",), low, high, velocity, acceleration, jerk, step)
    motion = MotionFilter(limits, 0.01)
    position, speed, bend = 0.04108333333333333, -0.1999999999999998, 20.0
    before = position - 0.01 * speed + 0.5e-4 * bend
    rows = np.array([[before + (before - position) + 1e-4 * bend], [before], [position]])
    state = Motion(rows[2], np.array([speed]), np.array([bend]))
    path = Path(rows, np.full((1, 1), speed), np.full((1, 1), bend), brake(state, limits))
    after = motion.follow(path, np.array([[0.032]]))
    assert motion.violation(after) == ""
    assert after.position[3, 0] == pytest.approx(0.03975, abs=1e-5)
