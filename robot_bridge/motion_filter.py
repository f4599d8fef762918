"""Turns a moving target into motion within velocity, acceleration and jerk limits, and plans how to stop.

A generator (ruckig towards a target, a closed form for braking) gives one state per tick. Its positions are the
control points of a uniform cubic B-spline, and that spline is what the robot is told. The spline's derivatives are
averages of the generator's, so it keeps every limit that the generator keeps, between the ticks as well as at them; and
it is cubic between ticks, so a controller that interpolates positions and velocities with cubics, as
joint_trajectory_controller does, executes exactly it. A cubic through sampled states of the generator itself would not
keep the limits: its acceleration jumps wherever the jerk changes between two samples.
"""

import dataclasses
from typing import Any

import numpy as np

from embodied.contracts.errors import MissingExtraError
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
    """A short trajectory from now that ends at rest: times (K,) [s] from now, positions and velocities (K, J)."""

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Path:
    """The generator's states, one row per tick: the previous tick, now, the next, and what is planned after it.

    Rows 0 to 2 are committed: they shape the spline up to now. The last row is at rest, and for ever after.

    Attributes:
        position, velocity, acceleration: (N, J), N >= 3.
    """

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    def advance(self, ticks: int) -> "Path":
        """The same path, `ticks` later."""
        rows = np.minimum(np.arange(ticks, max(ticks + 3, len(self.position))), len(self.position) - 1)
        return Path(self.position[rows], self.velocity[rows], self.acceleration[rows])

    @property
    def at_rest(self) -> bool:
        """Nothing moves from now on."""
        return bool((self.position == self.position[0]).all())


@dataclasses.dataclass(frozen=True)
class Brake:
    """The shortest stop of each joint on its own: full jerk, full deceleration, full jerk back to rest.

    Attributes:
        phases: (3, J) durations [s].
        jerk: (J,) of the first phase; the second has none, the third the opposite [rad/s³].
        duration: (J,) [s].
        stop: (J,) where each joint comes to rest [rad].
    """

    start: Motion
    phases: np.ndarray
    jerk: np.ndarray
    duration: np.ndarray
    stop: np.ndarray

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, velocity and acceleration (K, J) at `times` (K,) [s] after the start."""
        elapsed = times[:, None]
        state = self.start.position, self.start.velocity, self.start.acceleration
        for duration, jerk in zip(self.phases, (self.jerk, 0.0, -self.jerk), strict=True):
            state = _cubic(*state, jerk, np.clip(elapsed, 0.0, duration))
            elapsed = elapsed - duration
        moving = times[:, None] < self.duration
        return np.where(moving, state[0], self.stop), state[1] * moving, state[2] * moving


def _cubic(position: Any, velocity: Any, acceleration: Any, jerk: Any, t: np.ndarray) -> tuple[Any, Any, Any]:
    """Position, velocity and acceleration after `t` of constant jerk."""
    bend = jerk * t
    return (
        position + t * (velocity + t * (acceleration / 2 + bend / 6)),
        velocity + t * (acceleration + bend / 2),
        acceleration + bend,
    )


def brake(start: Motion, limits: Limits) -> Brake:
    """How `start` comes to rest soonest. Velocity only falls, after the acceleration has been led to zero."""
    settled = start.velocity + start.acceleration * np.abs(start.acceleration) / (2 * limits.jerk)
    direction = -np.sign(settled)
    along = direction * start.acceleration  # deceleration now, if positive
    loss = np.maximum(-direction * start.velocity + along**2 / (2 * limits.jerk), 0.0)  # (deceleration 0 -> peak -> 0)
    peak = np.minimum(limits.acceleration, np.sqrt(loss * limits.jerk))
    # Where the jerk back to rest alone is left, the two signs of rounding must not give a first phase.
    only_release = settled == 0
    direction = np.where(only_release, np.sign(start.acceleration), direction)
    peak = np.where(only_release, np.abs(start.acceleration), peak)
    along = np.where(only_release, peak, along)
    hold = np.maximum(loss / np.where(peak > 0, peak, 1.0) - peak / limits.jerk, 0.0)
    phases = np.stack([np.maximum(peak - along, 0.0) / limits.jerk, hold * ~only_release, peak / limits.jerk])
    jerk = direction * limits.jerk
    state = start.position, start.velocity, start.acceleration
    for duration, value in zip(phases, (jerk, 0.0, -jerk), strict=True):
        state = _cubic(*state, value, duration)
    return Brake(start, phases, jerk, phases.sum(axis=0), np.asarray(state[0]))


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
        # What the differences of neighbouring control points may come to, and how far rounding may take them.
        self._differences = [
            ("velocity", limits.velocity * dt * _SLACK + 1e-10),
            ("acceleration", limits.acceleration * dt**2 * _SLACK + 1e-10),
            ("jerk", limits.jerk * dt**3 * _SLACK + 1e-10),
        ]

    def rest(self, position: np.ndarray) -> Path:
        """Standing at `position` (J,)."""
        rows = np.tile(np.asarray(position, np.float64), (3, 1))
        return Path(rows, np.zeros_like(rows), np.zeros_like(rows))

    def coasting(self, position: np.ndarray, velocity: np.ndarray) -> Path:
        """At `position` and moving at `velocity`, (J,) each, as far as the limits allow; the box is not left."""
        position = self.limits.clip_position(position)
        velocity = np.clip(velocity, -self.limits.velocity, self.limits.velocity)
        ahead = position + self.dt * velocity
        stop = brake(Motion(ahead, velocity, np.zeros_like(velocity)), self.limits).stop
        velocity = np.where((stop < self.limits.low) | (stop > self.limits.high), 0.0, velocity)
        rows = position + self.dt * velocity * np.array([[-1.0], [0.0], [1.0]])
        moving = Path(rows, np.tile(velocity, (3, 1)), np.zeros_like(rows))
        return self.follow(moving, np.zeros((0, len(position))))

    def stopping_time(self, velocity: np.ndarray) -> np.ndarray:
        """Stopping distance from a steady `velocity` over that velocity [s]: how far following lags behind."""
        limits = self.limits
        return np.abs(velocity) / (2 * limits.acceleration) + limits.acceleration / (2 * limits.jerk)

    def motion(self, path: Path) -> Motion:
        """What the robot is told for the next tick: the spline's state there."""
        before, here, after = path.position[1], path.position[2], path.position[min(3, len(path.position) - 1)]
        velocity = (after - before) / (2 * self.dt)
        return Motion((before + 4 * here + after) / 6, velocity, (after - 2 * here + before) / self.dt**2)

    def follow(self, path: Path, targets: np.ndarray) -> Path:
        """Keep what is committed; then aim at `targets` (F, J), one per tick, and after them brake to rest."""
        head = Motion(path.position[2], path.velocity[2], path.acceleration[2])
        heads = []
        if len(targets):
            self._load(head)
            for target in targets.tolist():
                head = self._step(head, target)
                heads.append(head)
        columns = [path.position[:3], path.velocity[:3], path.acceleration[:3]]
        if heads:
            later = ([getattr(state, field.name) for state in heads] for field in dataclasses.fields(Motion))
            columns = [np.concatenate(pair) for pair in zip(columns, later, strict=True)]
        if not head.at_rest:
            stop = brake(head, self.limits)
            ticks = max(1, int(np.ceil(stop.duration.max() / self.dt - 1e-9)))
            tail = stop.at(self.dt * np.arange(1, ticks + 1))
            tail[0][-1], tail[1][-1], tail[2][-1] = stop.stop, 0.0, 0.0
            columns = [np.concatenate(pair) for pair in zip(columns, tail, strict=True)]
        return Path(*columns)

    def _load(self, state: Motion) -> None:
        item = self._input
        item.current_position, item.current_velocity = state.position.tolist(), state.velocity.tolist()
        item.current_acceleration = state.acceleration.tolist()

    def _step(self, state: Motion, target: list[float]) -> Motion:
        """The state one tick after `state`, which ruckig holds, towards `target`.

        ruckig 0.19 finds no solution for states that lie exactly on a switching point of its profiles, about once in
        10^5 ticks; then it gets a target a hair beside, and at last the tick is one of braking.
        """
        limits, out = self.limits, self._output
        for nudge in _NUDGES:
            if nudge:
                target = np.clip(np.asarray(target) + nudge, limits.low, limits.high).tolist()
            self._input.target_position = target
            try:
                self._generator.update(self._input, out)
            except self._ruckig.RuckigError:
                continue
            out.pass_to_input(self._input)
            velocity, acceleration = np.array(out.new_velocity), np.array(out.new_acceleration)
            still = (np.abs(velocity) < 1e-9) & (np.abs(acceleration) < 1e-9)
            if still.any():
                velocity[still] = acceleration[still] = 0.0
            return Motion(np.array(out.new_position), velocity, acceleration)
        position, velocity, acceleration = brake(state, limits).at(np.array([self.dt]))
        state = Motion(position[0], velocity[0], acceleration[0])
        self._load(state)
        return state

    def plan(self, path: Path, late: float = 0.0) -> Plan:
        """The spline as knots for a cubic interpolation, from the next tick on.

        Args:
            late: how long ago "now" of the path was [s].
        """
        points = np.concatenate([path.position[1:], path.position[-1:], path.position[-1:]])
        jerk = np.diff(points, n=3, axis=0)  # of the intervals between knots, times dt³
        positions = (points[:-2] + 4 * points[1:-1] + points[2:]) / 6
        velocities = (points[2:] - points[:-2]) / (2 * self.dt)
        times = self.dt * np.arange(1, len(positions) + 1) - late
        # Between two intervals of one jerk the knot says nothing.
        turns = np.abs(np.diff(jerk, axis=0)) > self.limits.jerk * (1e-6 * self.dt**3)
        keep = np.ones(len(positions), bool)
        keep[1:-1] = turns.any(axis=1)
        velocities[-1] = 0.0  # exactly: a trajectory controller rejects any other end
        return Plan(times[keep], positions[keep], velocities[keep])

    def violation(self, path: Path) -> str:
        """What the spline of `path` breaks; empty if nothing. Not empty means a bug in the filter."""
        if not np.isfinite(path.position).all():
            return "a command is not finite"
        limits = self.limits
        outside = np.maximum(limits.low - path.position, path.position - limits.high) > 1e-6
        if outside.any():
            return f"position limit of {limits.names[int(np.argmax(outside.any(axis=0)))]}"
        difference = np.concatenate([path.position, path.position[-1:], path.position[-1:]])
        for quantity, bound in self._differences:
            difference = np.diff(difference, axis=0)
            over = (np.abs(difference) > bound).any(axis=0)
            if over.any():
                return f"{quantity} limit of {limits.names[int(np.argmax(over))]}"
        return ""
