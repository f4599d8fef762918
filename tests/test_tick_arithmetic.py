"""The safety tick computes joint by joint what is written here for all joints at once; to the last bit."""

import numpy as np
import pytest

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Brake, Motion, MotionFilter, Path, brake


def some_limits(rng: np.random.Generator, count: int) -> Limits:
    names = tuple(f"joint{k}" for k in range(count))
    low = -rng.uniform(0.5, 3.0, count)
    fast, strong, abrupt = rng.uniform(0.1, 3, count), rng.uniform(0.5, 20, count), rng.uniform(5, 5000, count)
    return Limits(names, low, low + rng.uniform(1.0, 5.0, count), fast, strong, abrupt, np.full(count, 0.3))


def states(limits: Limits, rng: np.random.Generator, count: int) -> list[Motion]:
    """Among them some that stand, some that only have to lead their acceleration to zero, some beyond their limits."""
    found, joints = [], len(limits.names)
    for k in range(count):
        velocity = rng.uniform(-1.2, 1.2, joints) * limits.velocity
        acceleration = rng.uniform(-1.2, 1.2, joints) * limits.acceleration
        some = rng.random(joints) < 0.2
        if k % 3 == 0:
            velocity[some] = 0.0
        if k % 4 == 0:
            acceleration[some] = 0.0
        if k % 5 == 0:
            velocity[some] = (-acceleration * np.abs(acceleration) / (2 * limits.jerk))[some]
        found.append(Motion(rng.normal(size=joints), velocity, acceleration))
    return found


def after(position: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray, t: np.ndarray):
    bend = jerk * t
    moved = position + t * (velocity + t * (acceleration / 2 + bend / 6))
    return moved, velocity + t * (acceleration + bend / 2), acceleration + bend


def brake_of_all(start: Motion, limits: Limits) -> dict[str, np.ndarray]:
    v0, a0, rate = start.velocity, start.acceleration, limits.jerk
    settled = v0 + a0 * np.abs(a0) / (2 * rate)
    direction = -np.sign(settled)
    along = direction * a0
    loss = np.maximum(along**2 / (2 * rate) - direction * v0, 0.0)
    peak = np.minimum(limits.acceleration, np.sqrt(loss * rate))
    release = settled == 0
    direction = np.where(release, np.sign(a0), direction)
    peak = np.where(release, np.abs(a0), peak)
    along, loss = np.where(release, peak, along), np.where(release, 0.0, loss)
    hold = np.maximum(loss / np.maximum(peak, 1e-300) - peak / rate, 0.0)
    jerk, first, last = direction * rate, np.maximum(peak - along, 0.0) / rate, peak / rate
    p1, v1, a1 = after(start.position, v0, a0, jerk, first)
    p2, v2 = p1 + hold * (v1 + a1 * hold / 2), v1 + a1 * hold
    still, ends = np.zeros_like(jerk), first + hold
    return {
        "begins": np.array([still, first, ends]),
        "lasts": np.array([first, hold, last]),
        "position": np.array([start.position, p1, p2]),
        "velocity": np.array([v0, v1, v2]),
        "acceleration": np.array([a0, a1, a1]),
        "jerk": np.array([jerk, still, -jerk]),
        "duration": ends + last,
        "stop": p2 + last * (v2 + last * (a1 / 2 - jerk * last / 6)),
    }


def positions_of(stop: Brake, times: np.ndarray) -> np.ndarray:
    t = np.minimum(np.maximum(times[:, None, None] - stop.begins, 0.0), stop.lasts)
    moved = (t * (stop.velocity + t * (stop.acceleration / 2 + t * (stop.jerk / 6)))).sum(axis=1)
    return np.where(times[:, None] < stop.duration, stop.position[0] + moved, stop.stop)


@pytest.mark.parametrize("joints", [1, 3, 8])
def test_brakes_are_those_of_the_formula_for_all_joints(joints: int) -> None:
    rng = np.random.default_rng(joints)
    for _ in range(20):
        limits = some_limits(rng, joints)
        for start in states(limits, rng, 40):
            stop = brake(start, limits)
            for name, expected in brake_of_all(start, limits).items():
                np.testing.assert_array_equal(getattr(stop, name), expected, name)
            times = np.cumsum(rng.uniform(0.0, 0.02, 30))
            np.testing.assert_array_equal(stop.positions(times), positions_of(stop, times))


def test_a_path_is_found_in_order_only_if_every_quantity_is() -> None:
    """The quick look over all differences agrees with the slow one that names what is broken."""
    rng, dt, found = np.random.default_rng(5), 0.005, set()
    limits = some_limits(rng, 3)
    motion, still = MotionFilter(limits, dt), np.zeros((1, 3))
    for k in range(600):
        rows = np.repeat(((limits.low + limits.high) / 2)[None], 12, 0)
        kind, joint = k % 5, int(rng.integers(0, 3))
        size = rng.uniform(0.9, 1.1)
        if kind == 0:
            rows[:, joint] = limits.high[joint] + (size - 1.0)
        elif kind == 1:
            rows[:, joint] += size * limits.velocity[joint] * dt * np.arange(12)
        elif kind == 2:
            rows[:, joint] += size * limits.acceleration[joint] * dt**2 * np.arange(12) ** 2 / 2
        elif kind == 3:
            rows[:, joint] += size * limits.jerk[joint] * dt**3 * np.arange(12.0) ** 3 / 6
        elif k % 2:
            rows[int(rng.integers(0, 12)), joint] = rng.choice([np.nan, np.inf, -np.inf])
        path = Path(rows, still, still, brake(Motion(rows[-1], still[0], still[0]), limits))
        points = np.concatenate([rows, rows[-1:], rows[-1:]])
        with np.errstate(invalid="ignore"):
            sound = np.isfinite(rows).all() and ((rows >= limits.low - 1e-6) & (rows <= limits.high + 1e-6)).all()
            bounds = (limits.velocity * dt, limits.acceleration * dt**2, limits.jerk * dt**3)
            for order, bound in enumerate(bounds, start=1):
                sound = sound and (np.abs(np.diff(points, order, axis=0)) <= bound * 1.001 + 1e-10).all()
            assert (motion.violation(path) == "") == sound
        found.add(motion.violation(path).split(" limit")[0])
    assert {"", "a command is not finite", "position", "velocity"} <= found
