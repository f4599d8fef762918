"""How commands reach a robot: one adapter for the arm, and one for a gripper that the arm's does not drive."""

from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_forward_position import ForwardPositionAdapter
from embodied.robot_bridge.adapter_forward_velocity import ForwardVelocityAdapter
from embodied.robot_bridge.adapter_gripper import GRIPPERS, GripperAdapter
from embodied.robot_bridge.adapter_jtc import JtcAdapter
from embodied.robot_bridge.adapter_servo_jog import ServoJogAdapter
from embodied.robot_bridge.adapter_servo_twist import ServoTwistAdapter
from embodied.robot_bridge.adapter_topic import TopicAdapter
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Plan
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick

ADAPTERS: dict[str, type[TopicAdapter]] = {
    "jtc": JtcAdapter,
    "forward_position": ForwardPositionAdapter,
    "forward_velocity": ForwardVelocityAdapter,
    "servo_jog": ServoJogAdapter,
    "servo_twist": ServoTwistAdapter,
}


class Nobody:
    """The transport of shadow mode: adapters run as ever, and nothing leaves them."""

    services = True
    matched = 0

    def publisher(self, topic: str, message_type: str, qos: Any) -> "Nobody":
        return self

    def subscriber(self, topic: str, message_type: str, qos: Any, callback: Any) -> "Nobody":
        return self

    def write(self, data: bytes) -> None:
        """Nobody hears it."""

    def call(self, name: str, service_type: str, request: bytes, timeout_s: float) -> bytes:
        """Every goal is accepted, by nobody."""
        return messages.encode(messages.new(f"{service_type}_Response", True, messages.time(0)))


class RobotCommands:
    """Everything that commands the robot of a profile.

    Attributes:
        limits: what the safety filter has to keep, in its coordinates.
        gripper_fault: why the gripper is left alone at present; empty if it is not.
    """

    def __init__(self, profile: Profile, transport: Any) -> None:
        self._arm = ADAPTERS[profile.adapter](profile, transport)
        self._gripper: GripperAdapter | None = None
        if profile.gripper and profile.gripper.adapter in GRIPPERS:
            self._gripper = GRIPPERS[profile.gripper.adapter](profile, transport)
        self.limits: Limits = self._arm.limits
        self.coordinates = self._arm.coordinates
        self.brake_time, self.gripper_fault = self._arm.brake_time, ""

    @property
    def matched(self) -> int:
        """Subscriptions that the arm's commands reach."""
        return self._arm.topic.matched

    @property
    def topics(self) -> tuple[str, ...]:
        gripper = (self._gripper.gripper.topic,) if self._gripper else ()
        return (self._arm.topic.topic, *gripper)

    def prepare(self) -> None:
        """Find out what `obstacle` needs to know; call now and then before arming."""
        self._arm.prepare()

    def expect(self, plan: Plan) -> None:
        """As `TopicAdapter.expect`."""
        self._arm.expect(plan)

    def obstacle(self) -> str:
        """Why the robot could not be driven; empty if it can."""
        return self._arm.obstacle() or (self._gripper.obstacle() if self._gripper else "")

    def rival(self) -> str:
        """Who else commands the robot; empty if nobody does."""
        return self._arm.topic.rival() or (self._gripper.rival() if self._gripper else "")

    def send(
        self,
        tick: Tick,
        measured: np.ndarray,
        gripper_age: float,
        now: float,
        stamp_ns: int,
        clock_agrees: bool = False,
    ) -> bool:
        """Whether the arm was sent something. Arguments as `TopicAdapter.send` and `GripperAdapter.send`.

        Args:
            clock_agrees: `stamp_ns` means the same to the robot.
        """
        self._arm.clock_agrees = clock_agrees
        if self._gripper:
            self.gripper_fault = self._gripper.send(tick, gripper_age, now)
        return self._arm.send(tick, measured, now, stamp_ns)

    def leave(self, stamp_ns: int) -> None:
        """The last words before the process ends."""
        self._arm.leave(stamp_ns)
        if self._gripper:
            self._gripper.close()
