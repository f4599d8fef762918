"""Turns a moving target into motion within velocity, acceleration and jerk limits (ruckig), and plans how to stop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import MissingExtraError
from embodied.robot_bridge.limits import Limits

_BRAKE_POINTS = 4


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


class MotionFilter:
    """Pure functions of a `Motion`; the only state is ruckig's working memory.

    Each joint moves on its own fastest profile towards the target, where it would stop: a target that keeps moving is
    followed with a lag of about velocity / (2 * acceleration), and nothing ever overshoots a target that stays.
    """

    def __init__(self, limits: Limits, dt: float) -> None:
        try:
            import ruckig
        except ImportError as error:
            raise MissingExtraError("ruckig", "ros", "the safety filter") from error
        self._ruckig, self.limits, self.dt = ruckig, limits, dt
        count = len(limits.names)
        self._generator = ruckig.Ruckig(count, dt)
        self._output, self._trajectory = ruckig.OutputParameter(count), ruckig.Trajectory(count)
        self._inputs = {}
        for mode in (ruckig.ControlInterface.Position, ruckig.ControlInterface.Velocity):
            item = ruckig.InputParameter(count)
            item.control_interface, item.synchronization = mode, ruckig.Synchronization.No
            item.max_velocity, item.max_acceleration = limits.velocity.tolist(), limits.acceleration.tolist()
            item.max_jerk = limits.jerk.tolist()
            item.target_velocity = item.target_acceleration = [0.0] * count
            self._inputs[mode] = item

    def rest(self, position: np.ndarray) -> Motion:
        zero = np.zeros(len(self.limits.names))
        return Motion(np.array(position, np.float64), zero, zero)

    def _input(self, motion: Motion, target: np.ndarray | None) -> Any:
        modes = self._ruckig.ControlInterface
        item = self._inputs[modes.Velocity if target is None else modes.Position]
        item.current_position = motion.position.tolist()
        item.current_velocity = motion.velocity.tolist()
        item.current_acceleration = motion.acceleration.tolist()
        if target is not None:
            item.target_position = target.tolist()
        return item

    def _solve(self, motion: Motion, target: np.ndarray | None, compute: Callable[[Any], Any]) -> None:
        """Run ruckig; where it finds no solution, again a hair beside the input, and at last braking.

        ruckig 0.19 fails on states that lie exactly on a switching point of its profiles, about once in 10^5 ticks.
        """
        for nudge in (0.0, 1e-7, -1e-6, 1e-5):
            aim = None if target is None else target + nudge
            state = motion if target is not None else dataclasses.replace(motion, velocity=motion.velocity + nudge)
            try:
                compute(self._input(state, aim))
                return
            except self._ruckig.RuckigError as error:
                failure = error
        if target is None:
            raise failure
        self._solve(motion, None, compute)

    def step(self, motion: Motion, target: np.ndarray | None) -> Motion:
        """The state one tick later, moving towards `target` (J,), or braking where it is None."""
        if target is None and motion.at_rest:
            return motion
        self._solve(motion, target, lambda item: self._generator.update(item, self._output))
        out = self._output
        velocity, acceleration = np.array(out.new_velocity), np.array(out.new_acceleration)
        still = (np.abs(velocity) < 1e-9) & (np.abs(acceleration) < 1e-9)
        velocity[still] = acceleration[still] = 0.0
        return Motion(np.array(out.new_position), velocity, acceleration)

    def plan(self, motion: Motion, targets: Sequence[np.ndarray | None], every: int) -> Plan:
        """From `motion`, one tick from now: follow `targets`, one per tick (None brakes), then brake to rest.

        Args:
            every: a point of the plan is kept every so many ticks; the first stands at `every` ticks from now.
        """
        times, states = [], []
        tick = 1
        if tick % every == 0:
            times.append(tick * self.dt)
            states.append(motion)
        for target in targets:
            motion, tick = self.step(motion, target), tick + 1
            if tick % every == 0:
                times.append(tick * self.dt)
                states.append(motion)
        points = [(state.position, state.velocity) for state in states]
        if not motion.at_rest:
            self._solve(motion, None, lambda item: self._generator.calculate(item, self._trajectory))
            duration = self._trajectory.duration
            pieces = max(1, min(_BRAKE_POINTS, int(duration / 1e-3)))
            for k in range(1, pieces + 1):
                position, velocity, _ = self._trajectory.at_time(duration * k / pieces)
                times.append(tick * self.dt + duration * k / pieces)
                points.append((np.array(position), np.array(velocity)))
        elif not points:
            times, points = [every * self.dt], [(motion.position, motion.velocity)]
        positions, velocities = (np.stack(column) for column in zip(*points, strict=True))
        velocities[-1] = 0.0  # exactly: a trajectory controller rejects any other end
        return Plan(np.array(times), positions, velocities)

    def violation(self, before: Motion, after: Motion) -> str:
        """What the step from `before` to `after` breaks; empty if nothing. Not empty means a bug in the filter."""
        if not all(np.isfinite(x).all() for x in dataclasses.astuple(after)):
            return "a command is not finite"
        slack, limits = 1.001, self.limits
        checks = {
            "position": np.maximum(limits.low - after.position, after.position - limits.high) - 1e-6,
            "velocity": np.abs(after.position - before.position) / self.dt - limits.velocity * slack,
            "acceleration": np.abs(after.velocity - before.velocity) / self.dt - limits.acceleration * slack,
            "jerk": np.abs(after.acceleration - before.acceleration) / self.dt - limits.jerk * slack,
        }
        for quantity, excess in checks.items():
            if (excess > 1e-6).any():
                return f"{quantity} limit of {limits.names[int(np.argmax(excess))]}"
        return ""
