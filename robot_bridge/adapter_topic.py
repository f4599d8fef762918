"""The topic on which a robot's controller takes commands, who else is there, and what every adapter has."""

from typing import Any

import numpy as np

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Plan
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, LATEST
from embodied.robot_bridge.safety import Tick


class CommandTopic:
    """One publisher, reliable and one deep, so that it matches every subscription and never waits for a hung one."""

    def __init__(self, transport: Any, topic: str, message_type: str) -> None:
        self.topic, self.message_type, self._transport = topic, message_type, transport
        self._publisher = transport.publisher(topic, message_type, COMMAND)
        # It counts who else commands the robot. To look at what comes, our own commands, would hold every tick up.
        self._rivals = transport.subscriber(topic, message_type, LATEST, None)

    def write(self, data: bytes) -> None:
        self._publisher.write(data)

    @property
    def matched(self) -> int:
        """Subscriptions that commands reach, our own not counted."""
        return max(0, self._publisher.matched - 1)

    def rival(self) -> str:
        """Who else publishes here; empty if nobody does."""
        others = self._rivals.matched - 1
        return f"{others} other publisher{'s' * (others > 1)} on {self.topic}" if others > 0 else ""

    def obstacle(self) -> str:
        """Why commands would not arrive, or would not be the only ones; empty if nothing is wrong."""
        if self.matched:
            return self.rival()
        mismatches = [line for line in self._transport.problems() if line.startswith(f"{self.topic}:")]
        return "; ".join(mismatches) or f"nobody subscribes to {self.topic}"


class TopicAdapter:
    """Turns what the safety filter decided into a controller's commands on one topic.

    Attributes:
        limits: what the filter has to keep, in the coordinates in which it works; joints, unless an adapter says other.
        names: the joints that this adapter's controller drives, in its order.
        brake_time: how long the arm moves on after the last command at most [s]; inf where nothing ends the motion.
        clock_agrees: what we stamp means the same to the robot; the caller says so before it sends.
    """

    message_type: str
    brake_time = 0.0
    clock_agrees = False

    def __init__(self, profile: Profile, transport: Any) -> None:
        self.limits: Limits = profile.read_limits()
        own_gripper = profile.gripper is not None and profile.gripper.adapter != "joint"
        self.names = profile.joints if own_gripper else profile.all_joints
        self.topic = CommandTopic(transport, profile.topics.command, self.message_type)

    def coordinates(self, position: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Measured joints (J,) of the profile in the filter's coordinates, the columns of `limits`."""
        return position, velocity

    def prepare(self) -> None:
        """Called now and then before arming: find out what `obstacle` needs to know."""

    def obstacle(self) -> str:
        """Why the robot could not be driven; empty if it can."""
        return self.topic.obstacle()

    def expect(self, plan: Plan) -> None:
        """Shortly before a tick that will send this plan, unless something changes: do what can be done now."""

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        """Send what the tick decided; whether anything went out.

        Args:
            measured: (J,) in the filter's coordinates.
            now: monotonic [s].
            stamp_ns: ROS time [ns].

        Raises:
            SafetyError: the command would not be what the controller takes: a bug. Nothing was sent.
        """
        raise NotImplementedError

    def leave(self, stamp_ns: int) -> None:
        """The last words before the process ends; the arm is at rest, if it could be brought to rest."""


def checked(command: np.ndarray, count: int) -> np.ndarray:
    """The command (count,) itself. SafetyError if it is not finite or has another length."""
    if command.shape != (count,) or not np.isfinite(command).all():
        raise SafetyError(f"bug: a command of {command.tolist()} for {count} joints; nothing was sent.")
    return command
