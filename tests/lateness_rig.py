"""The failure rig with processes that are late: each has a period and a phase of its own, and can stand still.

Virtual time moves by a millisecond. A process that stands still hears nothing until it wakes; then it gets the newest
message of each topic of commands and the rest at once, as arriving at that moment, which is what DDS gives one that the
host did not schedule. Put this folder on `sys.path` to import it.
"""

import collections
from pathlib import Path
from typing import Any

import numpy as np
from bridge_fixtures import PROFILE
from failure_rig import Rig

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.robot_log import RobotRecord, read_robot_log
from embodied.robot_bridge.transport_memory import Fault

STEP = 0.001  # [s]
PERIOD = 0.005  # of robot and safety process [s]
VELOCITY, ACCELERATION, JERK = 0.7, 4.0, 100.0
BRAKING = VELOCITY / ACCELERATION + ACCELERATION / JERK  # from full speed to rest [s]
SERVO = 0.1  # how much later the simulated servos come to rest [s]
LIMIT = {"position": [-1.9, 1.9], "velocity": VELOCITY, "acceleration": ACCELERATION, "jerk": JERK, "max_step": 0.3}


class LateRig(Rig):
    """A slow arm, a policy that takes it to full speed, states and ticks at 200 Hz."""

    def __init__(
        self, folder: Path, safety: dict[str, Any] | None = None, joint: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        limit = joint or LIMIT
        limits = {**PROFILE["limits"], "shoulder": limit, "elbow": limit}  # type: ignore[dict-item]
        config = {"deadman_required": False, "tracking_error": 0.2, "rate_hz": 1 / PERIOD, **(safety or {})}
        rates = {"joint_states_hz": 1 / PERIOD, "cameras_hz": 10.0}
        super().__init__(folder, limits=limits, safety=config, simulation=rates, **changes)
        assert self.policy is not None
        self.policy.speed = 0.69
        self._until = {"robot": -np.inf, "safety": -np.inf}
        self._kept: dict[str, collections.deque[tuple[str, bytes, int]]] = {}
        self._milliseconds = 0

    def stand_still(self, process: str, seconds: float) -> None:
        """`robot` or `safety` is not scheduled from now on, for so long."""
        self._until[process] = self.now + seconds

    def late_commands(self, seconds: float, jitter: float = 0.0) -> None:
        """Commands take so long from now on, and up to `jitter` more."""
        self.bus.inject(self.profile.topics.command, Fault(delay_s=seconds, jitter_s=jitter))

    def run(self, seconds: float) -> None:
        assert self.policy is not None
        for _ in range(round(seconds / STEP)):
            self._milliseconds += 1
            self.clock.seconds += STEP
            self.bus.advance(self.clock.monotonic_ns())
            if self.deadman is not None and self._milliseconds % 50 == 0:
                self._deadman.write(m.boolean(self.deadman))
            if self._milliseconds % 5 == 0 and self._awake("robot"):
                self.robot.tick()
            if self._milliseconds % 5 == 2 and self._awake("safety") and self.safety is not None:
                self.safety.tick()
            self.policy.step()
            position, velocity = self.arm.joint_state()
            shoulder, elbow, finger = self.arm.data.ctrl[:3]
            self.rows.append((self.clock.seconds, position, velocity, np.array([shoulder, elbow, 2 * finger])))

    def _awake(self, process: str) -> bool:
        if self.now < self._until[process]:
            return False
        if self._until[process] == -np.inf:
            return True
        self._until[process] = -np.inf
        if process == "robot":
            self._wake_robot()
        elif self.safety is not None:
            self._wake_safety()
        return True

    def _wake_robot(self) -> None:
        newest = {topic: data for topic, data, _ in self.robot._inbox}
        self.robot._inbox.clear()
        self.robot._inbox.extend((topic, data, self.clock.monotonic_ns()) for topic, data in newest.items())

    def _wake_safety(self) -> None:
        assert self.safety is not None
        for box in self.safety._inboxes.values():
            waiting = [(topic, data, self.now) for topic, data, _ in box]
            box.clear()
            box.extend(waiting[-1:])

    def record(self) -> RobotRecord:
        """Every control step; the last thing a test does: it ends the robot."""
        self.robot.close()
        return read_robot_log(self._log)


def asked_speed(record: RobotRecord) -> np.ndarray:
    """(N - 1,) of the fastest arm joint, over its limit, in each control step."""
    return np.abs(np.diff(record.command[:, :2], axis=0) / np.diff(record.time)[:, None]).max(axis=1) / VELOCITY


def measured_speed(record: RobotRecord) -> np.ndarray:
    """(N,) of the fastest arm joint, over its limit."""
    return np.abs(record.velocity[:, :2]).max(axis=1) / VELOCITY


def asked_acceleration(record: RobotRecord, over: float = 0.1) -> np.ndarray:
    """Change of the mean speed over so many seconds between one such span and the next, over its limit."""
    steps = round(over / float(np.diff(record.time).mean()))
    mean = (record.command[steps:, :2] - record.command[:-steps, :2]) / over
    return np.abs(mean[steps:] - mean[:-steps]).max(axis=1) / over / ACCELERATION
