"""Which controllers the simulated robot runs: those that the profile's adapters speak to."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.controller import Controller, Moment, Reference
from embodied.robot_bridge.forward_controller import ForwardController
from embodied.robot_bridge.gripper_controller import GripperActionController
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.servo_controller import ServoController
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.trajectory_controller import TrajectoryController

log = logging.getLogger("mujoco_robot")

MESSAGE_TYPES = {
    "jtc": messages.JOINT_TRAJECTORY,
    "forward_position": messages.FLOAT_ARRAY,
    "forward_velocity": messages.FLOAT_ARRAY,
    "servo_jog": messages.JOINT_JOG,
    "servo_twist": messages.TWIST_STAMPED,
}


@dataclasses.dataclass
class Mounted:
    """A controller on the robot.

    Attributes:
        columns: its joints among the arm's `names`.
        topic, message_type: of its commands; "" where it takes none by topic.
        reference: what it wanted last.
    """

    controller: Controller
    columns: list[int]
    topic: str
    message_type: str
    reference: Reference

    def hold(self, target: np.ndarray) -> None:
        """Forget commands; stay at the arm's `target` (J,)."""
        position = target[self.columns]
        self.controller.hold(position)
        self.reference = Reference(position, np.zeros_like(position))

    def moment(self, now: float, stamp_ns: int, dt: float, position: np.ndarray, velocity: np.ndarray) -> Moment:
        """The controller's part of the arm's measured state (J,)."""
        return Moment(now, stamp_ns, dt, position[self.columns], velocity[self.columns])


def mount_controllers(
    profile: Profile, arm: SimulatedArm, transport: Any, stamp: Callable[[], int], from_desired: bool
) -> list[Mounted]:
    """The arm's controller, and the gripper's where it has its own."""
    gripper, servo = profile.gripper, profile.adapter.startswith("servo")
    own_gripper = gripper is not None and gripper.adapter != "joint"
    names = profile.joints if own_gripper or servo else profile.all_joints
    if servo and gripper and not own_gripper:
        log.warning("MoveIt Servo does not move the gripper %s; nothing does", gripper.joint)
    columns = [arm.names.index(name) for name in names]
    start = arm.target[columns]
    controller: Controller
    if profile.adapter == "jtc":
        controller = TrajectoryController(names, start, from_desired)
    elif servo:
        controller = _servo(profile, arm, columns, start)
    else:
        controller = ForwardController(names, start, profile.adapter.removeprefix("forward_"))
    rest = Reference(start, np.zeros_like(start))
    mounted = [Mounted(controller, columns, profile.topics.command, MESSAGE_TYPES[profile.adapter], rest)]
    if own_gripper:
        mounted.append(_gripper(profile, arm, transport, stamp))
    return mounted


def _servo(profile: Profile, arm: SimulatedArm, columns: list[int], start: np.ndarray) -> ServoController:
    velocity = profile.read_limits().velocity[: len(profile.joints)] / profile.limit_scale
    limits = (arm.low[columns], arm.high[columns], velocity)
    base, tool = profile.description.base, profile.description.tool
    # The profile's joints are the scene's first, perhaps in another order.
    order = np.argsort(columns)

    def jacobian(position: np.ndarray) -> np.ndarray:
        return arm.jacobian(position[order])[:, columns]

    rotations = {base: lambda position: np.eye(3), tool: lambda position: arm.tool_rotation(position[order])}
    kind = profile.adapter.removeprefix("servo_")
    return ServoController(profile.joints, start, kind, profile.servo, limits, jacobian, rotations)


def _gripper(profile: Profile, arm: SimulatedArm, transport: Any, stamp: Callable[[], int]) -> Mounted:
    gripper = profile.gripper
    assert gripper is not None
    columns = [arm.names.index(gripper.joint)]
    start = arm.target[columns]
    rest = Reference(start, np.zeros(1))
    if gripper.adapter == "forward_position":
        controller = ForwardController([gripper.joint], start, "position")
        return Mounted(controller, columns, gripper.topic, messages.FLOAT_ARRAY, rest)
    action = GripperActionController(gripper.joint, start, transport, gripper.topic, stamp)
    return Mounted(action, columns, "", "", rest)
