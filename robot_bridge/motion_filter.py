"""Turns a moving target into motion within velocity, acceleration and jerk limits, and plans how to stop.

A generator (ruckig towards a target, a closed form for braking) gives one state per tick. Its positions are the
control points of a uniform cubic B-spline, and that spline is what the robot is told. The spline's derivatives are
averages of the generator's, so it keeps every limit that the generator keeps, between the ticks as well as at them; and
it is cubic between ticks, so a controller that interpolates positions and velocities with cubics, as
joint_trajectory_controller does, executes exactly it. A cubic through sampled states of the generator itself would not
keep the limits: its acceleration jumps wherever the jerk changes between two samples.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from embodied.contracts.errors import MissingExtraError
from embodied.robot_bridge.chunk import Timeline
from embodied.robot_bridge.limits import Limits

_SLACK = 1.001
_NUDGES = (0.0, 1e-7, -1e-6, 1e-5)  # [rad]


@dataclasses.dataclass(frozen=True)
class Motion:
    """A commanded state: position [rad], velocity [rad/s], acceleration [rad/s²], each (J,)."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @property
    def at_rest(self) -> bool:
        return not (self.velocity.any() or self.acceleration.any())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A short trajectory from now that ends at rest: times (K,) [s] from now, positions and velocities (K, J).

    Attributes:
        prepared: what it was made of before its tick: the same, but its times count from `late` seconds before now.
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    prepared: "Plan | None" = None
    late: float = 0.0


@dataclasses.dataclass(frozen=True)
class Brake:
    """The shortest stop of each joint on its own: full jerk, full deceleration, full jerk back to rest.

    Attributes:
        begins: (3, J) when each phase begins [s].
        lasts: (3, J) and how long it lasts [s].
        position, velocity, acceleration, jerk: (3, J) at its beginning.
        duration: (J,) [s].
        stop: (J,) where each joint comes to rest [rad].
    """

    begins: np.ndarray
    lasts: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    duration: np.ndarray
    stop: np.ndarray

    def positions(self, times: np.ndarray) -> np.ndarray:
        """(K, J) at `times` (K,) [s]."""
        t = times[:, None, None] - self.begins
        np.minimum(np.maximum(t, 0.0, out=t), self.lasts, out=t)
        moved = t * (self.jerk / 6)
        for term in (self.acceleration / 2, self.velocity):
            moved += term
            moved *= t
        rows = moved.sum(axis=1)
        rows += self.position[0]
        np.copyto(rows, self.stop, where=times[:, None] >= self.duration)
        return rows

    def at(self, time: float) -> Motion:
        """The state at `time` [s]."""
        phase = np.maximum((self.begins <= time).sum(axis=0) - 1, 0)
        joint, over = np.arange(len(self.stop)), time >= self.duration
        begin = [x[phase, joint] for x in (self.position, self.velocity, self.acceleration, self.jerk)]
        position, velocity, acceleration = _cubic(*begin, t=time - self.begins[phase, joint])
        return Motion(np.where(over, self.stop, position), velocity * ~over, acceleration * ~over)


def _cubic(position: Any, velocity: Any, acceleration: Any, jerk: Any, t: np.ndarray) -> tuple[Any, Any, Any]:
    """Position, velocity and acceleration after `t` of constant jerk."""
    bend = jerk * t
    return (
        position + t * (velocity + t * (acceleration / 2 + bend / 6)),
        velocity + t * (acceleration + bend / 2),
        acceleration + bend,
    )


def brake(start: Motion, limits: Limits) -> Brake:
    """How `start` comes to rest soonest. Speed only falls, once the acceleration has been led to zero."""
    return _brake(
        start.position.tolist(),
        start.velocity.tolist(),
        start.acceleration.tolist(),
        limits.acceleration.tolist(),
        limits.jerk.tolist(),
    )


def _brake(
    position: list[float],
    velocity: list[float],
    acceleration: list[float],
    strongest: list[float],
    jerks: list[float],
) -> Brake:
    """`brake`, joint by joint: for a few joints, numbers are twice as fast as arrays of them."""
    rows = []
    for p0, v0, a0, limit, rate in zip(position, velocity, acceleration, strongest, jerks, strict=True):
        settled = v0 + a0 * abs(a0) / (2 * rate)
        if settled == 0:  # leading the acceleration to zero is all there is to do
            direction, peak = float((a0 > 0) - (a0 < 0)), abs(a0)
            along, loss = peak, 0.0
        else:
            direction = -1.0 if settled > 0 else 1.0
            along = direction * a0  # deceleration now, if positive
            loss = max(along * along / (2 * rate) - direction * v0, 0.0)  # of speed, 0 -> peak -> 0
            peak = min(limit, math.sqrt(loss * rate))
        hold = max(loss / max(peak, 1e-300) - peak / rate, 0.0)
        jerk = direction * rate
        first, last = max(peak - along, 0.0) / rate, peak / rate
        bend = jerk * first
        p1 = p0 + first * (v0 + first * (a0 / 2 + bend / 6))
        v1 = v0 + first * (a0 + bend / 2)
        a1 = a0 + bend
        p2, v2 = p1 + hold * (v1 + a1 * hold / 2), v1 + a1 * hold
        ends = first + hold
        stop = p2 + last * (v2 + last * (a1 / 2 - jerk * last / 6))
        times = (0.0, first, ends, first, hold, last)
        rows.append((*times, p0, p1, p2, v0, v1, v2, a0, a1, a1, jerk, 0.0, -jerk, ends + last, stop))
    table = np.array(rows).T.copy()
    return Brake(
        begins=table[0:3],
        lasts=table[3:6],
        position=table[6:9],
        velocity=table[9:12],
        acceleration=table[12:15],
        jerk=table[15:18],
        duration=table[18],
        stop=table[19],
    )


@dataclasses.dataclass(frozen=True)
class Path:
    """The generator's states, one row per tick: the previous tick, now, the next, and what is planned after it.

    Rows 0 to 2 are committed: they shape the spline up to now. The last row is at rest, and so is all after it.

    Attributes:
        position: (N, J), N >= 3.
        velocity, acceleration: (M, J), M <= N - 2, of row 2 and those after it up to the one where braking begins.
        stop: the way on from there.
        late: ticks since then, where the path has been followed beyond it.
    """

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    stop: Brake
    late: int = 0

    def advance(self, ticks: int) -> "Path":
        """The same path, `ticks` later."""
        last = len(self.position) - 1
        position = self.position[min(ticks, last) :]
        if len(position) < 3:
            position = np.concatenate([position, self.position[[-1] * (3 - len(position))]])
        known = min(ticks, len(self.velocity) - 1)
        return Path(position, self.velocity[known:], self.acceleration[known:], self.stop, self.late + ticks - known)

    def head(self, dt: float) -> Motion:
        """The state of row 2, the last that is committed."""
        if not self.late:
            return Motion(self.position[2], self.velocity[0], self.acceleration[0])
        state = self.stop.at(self.late * dt)
        return Motion(self.position[2], state.velocity, state.acceleration)

    @functools.cached_property
    def differences(self) -> tuple[np.ndarray, ...]:
        """Positions with two more rows of standing still, (N + 2, J), and their first, second and third differences.

        At last the three in one array (3, N + 1, J), filled up with zeros.
        """
        last = self.position[-1:]
        points = np.concatenate([self.position, last, last])
        every = np.zeros((3, len(points) - 1, points.shape[1]))
        first, second, third = every[0], every[1, :-1], every[2, :-2]
        np.subtract(points[1:], points[:-1], out=first)
        np.subtract(first[1:], first[:-1], out=second)
        np.subtract(second[1:], second[:-1], out=third)
        return points, first, second, third, every

    @property
    def at_rest(self) -> bool:
        """Nothing moves from the next tick on."""
        return bool((self.position[1:] == self.position[1]).all())


class MotionFilter:
    """Pure functions of a `Path`; the only state is ruckig's working memory.

    Each joint moves on its own fastest profile towards the target, where it would stop: a target that keeps moving is
    followed at a distance of `stopping_time` times its velocity, and nothing ever overshoots a target that stays.
    """

    def __init__(self, limits: Limits, dt: float) -> None:
        try:
            import ruckig
        except ImportError as error:
            raise MissingExtraError("ruckig", "ros", "the safety filter") from error
        self._ruckig, self.limits, self.dt = ruckig, limits, dt
        count = len(limits.names)
        self._generator = ruckig.Ruckig(count, dt)
        self._input, self._output = ruckig.InputParameter(count), ruckig.OutputParameter(count)
        self._input.synchronization = ruckig.Synchronization.No
        self._input.max_velocity, self._input.max_acceleration = limits.velocity.tolist(), limits.acceleration.tolist()
        self._input.max_jerk = limits.jerk.tolist()
        self._strongest, self._jerks = limits.acceleration.tolist(), limits.jerk.tolist()
        self._turn = limits.jerk * (1e-6 * dt**3)
        self._twice, self._ramp = 2 * limits.acceleration, limits.acceleration / (2 * limits.jerk)
        self._ticks = dt * np.arange(1, 201)
        # What the differences of neighbouring control points may come to, and how far rounding may take them.
        self._bounds = [
            ("velocity", limits.velocity * dt * _SLACK + 1e-10),
            ("acceleration", limits.acceleration * dt**2 * _SLACK + 1e-10),
            ("jerk", limits.jerk * dt**3 * _SLACK + 1e-10),
        ]
        self._bound = np.stack([bound for _, bound in self._bounds])[:, None]
        self._low, self._high = limits.low - 1e-6, limits.high + 1e-6

    def rest(self, position: np.ndarray) -> Path:
        """Standing at `position` (J,)."""
        rows = np.array([position] * 3, np.float64)
        still = np.zeros_like(rows)
        return Path(rows, still[:1], still[:1], brake(Motion(rows[0], still[0], still[0]), self.limits))

    def coasting(self, position: np.ndarray, velocity: np.ndarray) -> Path:
        """At `position` and moving at `velocity`, (J,) each, as far as the limits allow; the box is not left."""
        position = self.limits.clip_position(position)
        velocity = np.clip(velocity, -self.limits.velocity, self.limits.velocity)
        ahead = position + self.dt * velocity
        still = np.zeros_like(velocity)
        stop = brake(Motion(ahead, velocity, still), self.limits).stop
        velocity = np.where((stop < self.limits.low) | (stop > self.limits.high), 0.0, velocity)
        rows = position + self.dt * velocity * np.array([[-1.0], [0.0], [1.0]])
        end = brake(Motion(rows[2], velocity, still), self.limits)
        return self._ending(rows, velocity[None], still[None], end)

    def stopping_time(self, velocity: np.ndarray) -> np.ndarray:
        """Stopping distance from a steady `velocity` over that velocity [s]: how far following lags behind."""
        return np.abs(velocity) / self._twice + self._ramp

    def aim(self, timeline: Timeline, times: np.ndarray, look_ahead: float) -> np.ndarray:
        """Where the generator should be able to stop (F, J), so that it is on the timeline at `times` (F, 1).

        A generator that would stop at its target follows without lag if it is shown the timeline as much later as a
        stop takes, which is at most `look_ahead` seconds here.
        """
        speed = np.minimum(np.abs(timeline.velocity(times)), self.limits.velocity)
        return timeline.at(times + np.minimum(self.stopping_time(speed), look_ahead))

    def motion(self, path: Path) -> Motion:
        """What the robot is told for the next tick: the spline's state there."""
        before, here, after = path.position[1], path.position[2], path.position[min(3, len(path.position) - 1)]
        velocity = (after - before) / (2 * self.dt)
        return Motion((before + 4 * here + after) / 6, velocity, (after - 2 * here + before) / self.dt**2)

    def follow(self, path: Path, targets: np.ndarray) -> Path:
        """Keep what is committed; then aim at `targets` (F, J), one per tick, and after them brake to rest."""
        head = path.head(self.dt)
        rows = [(head.position.tolist(), head.velocity.tolist(), head.acceleration.tolist())]
        if len(targets):
            self._load(*rows[0])
            rows.extend(map(self._step, targets.tolist()))
        last, speed, bend = rows[-1]
        still = [abs(v) < 1e-9 and abs(a) < 1e-9 for v, a in zip(speed, bend, strict=True)]
        if any(still):
            speed = [0.0 if rests else v for v, rests in zip(speed, still, strict=True)]
            bend = [0.0 if rests else a for a, rests in zip(bend, still, strict=True)]
            rows[-1] = last, speed, bend
        position, velocity, acceleration = np.array(rows).transpose(1, 0, 2)
        end = _brake(last, speed, bend, self._strongest, self._jerks)
        return self._ending(np.concatenate([path.position[:2], position]), velocity, acceleration, end)

    def _ending(self, position: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray, end: Brake) -> Path:
        """The path through these rows and then to a stop."""
        ticks = math.ceil(float(end.duration.max()) / self.dt - 1e-9)
        if ticks:
            tail = end.positions(self._times(ticks))
            tail[-1] = end.stop
            position = np.concatenate([position, tail])
        return Path(position, velocity, acceleration, end)

    def _times(self, ticks: int) -> np.ndarray:
        """(ticks,) from one tick on [s]."""
        if ticks > len(self._ticks):
            self._ticks = self.dt * np.arange(1, 2 * ticks + 1)
        return self._ticks[:ticks]

    def _load(self, position: list[float], velocity: list[float], acceleration: list[float]) -> None:
        item = self._input
        item.current_position, item.current_velocity, item.current_acceleration = position, velocity, acceleration

    def _step(self, target: list[float]) -> tuple[list[float], list[float], list[float]]:
        """Position, velocity and acceleration one tick later than what ruckig holds, towards `target`.

        ruckig 0.19 finds no solution for states that lie exactly on a switching point of its profiles, about once in
        10^5 ticks; then it gets a target a hair beside, and at last the tick is one of braking.
        """
        item, out = self._input, self._output
        for nudge in _NUDGES:
            item.target_position = self.limits.clip_position(np.array(target) + nudge).tolist() if nudge else target
            try:
                self._generator.update(item, out)
            except self._ruckig.RuckigError:
                continue
            out.pass_to_input(item)
            return out.new_position, out.new_velocity, out.new_acceleration
        state = [np.array(x) for x in (item.current_position, item.current_velocity, item.current_acceleration)]
        after = brake(Motion(*state), self.limits).at(self.dt)
        row = after.position.tolist(), after.velocity.tolist(), after.acceleration.tolist()
        self._load(*row)
        return row

    def plan(self, path: Path, late: float = 0.0) -> Plan:
        """The spline as knots for a cubic interpolation, from the next tick on.

        Args:
            late: how long ago "now" of the path was [s].
        """
        points, _, second, jerk, _ = path.differences
        positions = points[2:-1] + second[1:] / 6
        velocities = (points[3:] - points[1:-2]) / (2 * self.dt)
        times = self._times(len(positions)) - late
        # Between two intervals of one jerk the knot says nothing.
        turns = np.abs(jerk[2:] - jerk[1:-1]) > self._turn
        keep = np.ones(len(positions), bool)
        keep[1:-1] = turns.any(axis=1)
        velocities[-1] = 0.0  # exactly: a trajectory controller rejects any other end
        return Plan(times[keep], positions[keep], velocities[keep])

    def violation(self, path: Path) -> str:
        """What the spline of `path` breaks; empty if nothing. Not empty means a bug in the filter."""
        limits, points = self.limits, path.position
        inside = ((points >= self._low) & (points <= self._high)).all()  # which nothing that is not finite is
        if inside and (np.abs(path.differences[-1]) <= self._bound).all():
            return ""
        if not np.isfinite(points).all():
            return "a command is not finite"
        outside = (points < limits.low - 1e-6) | (points > limits.high + 1e-6)
        if outside.any():
            return f"position limit of {limits.names[int(np.argmax(outside.any(axis=0)))]}"
        for (quantity, bound), difference in zip(self._bounds, path.differences[1:4], strict=True):
            over = np.abs(difference) > bound
            if over.any():
                return f"{quantity} limit of {limits.names[int(np.argmax(over.any(axis=0)))]}"
        return ""
