"""What ros2_control's joint_trajectory_controller does with a message on its topic: accept, interpolate, hold.

Rules and polynomials are those of ros2_controllers' source with its default parameters. Two refusals are added, since
there the real controller would send the hardware something meaningless: values that are not finite, and accelerations
without velocities. Times in seconds on the caller's clock.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.controller import Moment, Reference

_REST = float(np.finfo(np.float32).eps)  # a final velocity below this counts as zero [rad/s]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A JointTrajectory as the controller reads it: K points of J joints.

    Attributes:
        stamp_ns: when its time 0 is; 0 means "when it arrives".
        times: (K,) from the start [s].
        positions: (K, J).
        velocities, accelerations: (K, J); a row of NaN where a point has none.
        effort: some point gives one.
    """

    stamp_ns: int
    names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray
    effort: bool = False


def read_goal(data: bytes) -> Goal:
    """A JointTrajectory's bytes; InputError if a point's length is not that of the names."""
    message = messages.decode(data, messages.JOINT_TRAJECTORY)
    names, points = tuple(message.joint_names), message.points

    def rows(field: str, required: bool) -> np.ndarray:
        table = np.full((len(points), len(names)), np.nan)
        for k, point in enumerate(points):
            values = getattr(point, field)
            if len(values) == len(names):
                table[k] = values
            elif len(values) or required:
                raise InputError(f"{len(names)} joint names but {len(values)} {field} at point {k}")
        return table

    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in points])
    positions, velocities = rows("positions", True), rows("velocities", False)
    effort = any(len(point.effort) for point in points)
    return Goal(messages.stamp_ns(message), names, times, positions, velocities, rows("accelerations", False), effort)


class TrajectoryController:
    """Follows the newest accepted trajectory; after its end holds the last point for ever.

    Args:
        from_desired: a new trajectory starts from the commanded state (`interpolate_from_desired_state`), else from
            the measured one, which is the real controller's default.
    """

    def __init__(self, names: Sequence[str], position: np.ndarray, from_desired: bool = True) -> None:
        self.names, self._from_desired = tuple(names), from_desired
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        position = np.array(position, np.float64)
        rest = np.zeros_like(position)
        self._start_time, self._start = -np.inf, Reference(position, rest, rest)
        self._times = np.array([-np.inf])
        self._positions, self._velocities, self._accelerations = position[None], rest[None], rest[None]
        self._end = self._start

    def receive(self, data: bytes, moment: Moment) -> str:
        return self.accept(read_goal(data), moment)

    def accept(self, goal: Goal, moment: Moment) -> str:
        """Replace the current trajectory. Returns why it is refused as a whole; "" if it is accepted."""
        if reason := self._refusal(goal, moment.stamp_ns):
            return reason
        late = (moment.stamp_ns - goal.stamp_ns) * 1e-9 if goal.stamp_ns else 0.0
        measured = Reference(moment.position, moment.velocity)
        start = self.sample(moment.now) if self._from_desired else measured
        order = [goal.names.index(name) for name in self.names]
        self._start_time, self._start = moment.now, start
        self._times = moment.now - late + goal.times
        self._positions = goal.positions[:, order]
        self._velocities, self._accelerations = goal.velocities[:, order], goal.accelerations[:, order]
        last = (np.nan_to_num(rows[-1], nan=0.0) for rows in (self._velocities, self._accelerations))
        self._end = Reference(self._positions[-1], *last)
        return ""

    def _refusal(self, goal: Goal, stamp_now_ns: int) -> str:
        if sorted(goal.names) != sorted(self.names):
            odd = sorted(set(goal.names) ^ set(self.names))
            return f"joints {odd} are missing or unknown" if odd else "a joint is named twice"
        times = goal.times
        known = np.logical_not(np.isnan(goal.velocities).any(axis=1))
        if not len(times):
            return "no points"
        if known[-1] and np.abs(goal.velocities[-1]).max() > _REST:
            return "the velocity of the last point is not zero"
        if goal.stamp_ns and goal.stamp_ns + round(times[-1] * 1e9) < stamp_now_ns:
            return "the trajectory ended before it arrived"
        if (np.diff(times) <= 0).any() or times[0] < 0:
            return "times from start do not strictly increase"
        if goal.effort:
            return "effort is given, but the controller commands positions"
        if not np.isfinite(goal.positions).all() or np.isinf(goal.velocities).any():
            return "not finite"
        accelerated = ~np.isnan(goal.accelerations).all(axis=1)
        return "accelerations without velocities" if (accelerated & ~known).any() else ""

    def update(self, moment: Moment) -> Reference:
        return self.sample(moment.now)

    def sample(self, now: float) -> Reference:
        """Linear between points of positions, cubic with velocities, quintic with accelerations too.

        Before the first point the start state is the other end. A point that has passed is not visited: the command
        steps onto the trajectory, as the real controller's does.
        """
        k = int(np.searchsorted(self._times, now, side="right"))
        if k == len(self._times):
            return self._end
        if k:
            a = Reference(self._positions[k - 1], self._velocities[k - 1], self._accelerations[k - 1])
            begin = float(self._times[k - 1])
        else:
            a, begin = self._start, self._start_time
        b = Reference(self._positions[k], self._velocities[k], self._accelerations[k])
        return interpolate(a, b, float(self._times[k]) - begin, now - begin)


def interpolate(a: Reference, b: Reference, span: float, t: float) -> Reference:
    """The state `t` seconds after `a`, `span` seconds before `b`'s end; NaN marks what a point does not give."""
    s, delta = t / span, b.position - a.position
    if np.isnan(a.velocity).any() or np.isnan(b.velocity).any():
        return Reference(a.position + s * delta, delta / span, np.zeros_like(delta))
    v0, v1 = a.velocity * span, b.velocity * span
    if a.acceleration is None or b.acceleration is None or np.isnan([a.acceleration, b.acceleration]).any():
        c = (a.position, v0, 3 * delta - 2 * v0 - v1, -2 * delta + v0 + v1)
    else:
        a0, a1 = a.acceleration * span**2, b.acceleration * span**2
        c3 = 10 * delta - 6 * v0 - 4 * v1 - 1.5 * a0 + 0.5 * a1
        c4 = -15 * delta + 8 * v0 + 7 * v1 + 1.5 * a0 - a1
        c = (a.position, v0, a0 / 2, c3, c4, 6 * delta - 3 * (v0 + v1) - 0.5 * (a0 - a1))
    position, velocity, acceleration = np.zeros_like(delta), np.zeros_like(delta), np.zeros_like(delta)
    for power, coefficient in enumerate(c):
        position = position + coefficient * s**power
        if power:
            velocity = velocity + power * coefficient * s ** (power - 1)
        if power > 1:
            acceleration = acceleration + power * (power - 1) * coefficient * s ** (power - 2)
    return Reference(position, velocity / span, acceleration / span**2)
