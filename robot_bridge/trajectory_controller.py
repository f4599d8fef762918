"""What ros2_control's joint_trajectory_controller does with a message on its topic: accept, interpolate, hold.

Pure; times in seconds on the caller's clock. Rules as in ros2_controllers with its defaults, plus
`interpolate_from_desired_state`: a new trajectory starts from the state commanded at its arrival.
"""

from collections.abc import Sequence

import numpy as np

from embodied.robot_bridge.messages import Trajectory


class TrajectoryController:
    """Follows the newest accepted trajectory; after its end holds the last point for ever."""

    def __init__(self, names: Sequence[str], position: np.ndarray) -> None:
        self.names = tuple(names)
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        """Forget the trajectory and command `position` (J,)."""
        self._times = np.array([0.0])
        self._positions = np.array(position, np.float64)[None]
        self._velocities: np.ndarray | None = np.zeros_like(self._positions)

    def accept(self, trajectory: Trajectory, now: float, stamp_now_ns: int) -> str:
        """Replace the current trajectory. Returns why it is rejected as a whole; empty if accepted.

        Args:
            stamp_now_ns: the present on the clock of the message's stamp; stamp 0 means "start now".
        """
        if set(trajectory.names) != set(self.names) or len(trajectory.names) != len(self.names):
            return f"joints {sorted(set(trajectory.names) ^ set(self.names))} are missing, unknown or doubled"
        times, positions, velocities = trajectory.times, trajectory.positions, trajectory.velocities
        if not len(times):
            return "no points"
        if (np.diff(times) <= 0).any() or times[0] < 0:
            return "times from start do not strictly increase"
        if not np.isfinite(positions).all() or (velocities is not None and not np.isfinite(velocities).all()):
            return "not finite"
        if velocities is not None and np.abs(velocities[-1]).max() > 1e-9:
            return "the velocity of the last point is not zero"
        late = (stamp_now_ns - trajectory.stamp_ns) * 1e-9 if trajectory.stamp_ns else 0.0
        keep = times > late
        if not keep.any():
            if late > 0:
                return "the trajectory ended before it arrived"
            keep = times >= late  # a single point at time 0
        order = [trajectory.names.index(name) for name in self.names]
        start, start_velocity = self.sample(now)
        first = times[keep][0] - late
        has_start = first > 0  # a point at once replaces the start
        absolute = now + times[keep] - late
        self._times = np.concatenate([[now], absolute]) if has_start else absolute
        rows = positions[keep][:, order]
        self._positions = np.vstack([start, rows]) if has_start else rows
        self._velocities = None
        if velocities is not None:
            rows = velocities[keep][:, order]
            self._velocities = np.vstack([start_velocity, rows]) if has_start else rows
        return ""

    def sample(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Commanded position and velocity (J,): cubic between points with velocities, else linear."""
        k = int(np.searchsorted(self._times, now, side="right"))
        if k == 0 or k == len(self._times):
            position = self._positions[min(k, len(self._times) - 1)]
            return position, np.zeros_like(position)
        span = self._times[k] - self._times[k - 1]
        s = (now - self._times[k - 1]) / span
        p0, p1 = self._positions[k - 1], self._positions[k]
        if self._velocities is None:
            return p0 + s * (p1 - p0), (p1 - p0) / span
        v0, v1 = self._velocities[k - 1] * span, self._velocities[k] * span
        a, b = 2 * (p0 - p1) + v0 + v1, 3 * (p1 - p0) - 2 * v0 - v1
        return p0 + s * (v0 + s * (b + s * a)), (v0 + s * (2 * b + 3 * s * a)) / span
