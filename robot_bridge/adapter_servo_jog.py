"""Joint velocities for MoveIt Servo (JointJog on `~/delta_joint_cmds`).

Servo discards a command whose stamp is 0.1 s old or unset, then halts smoothly; so the stamp is now, and an arm whose
bridge dies stops. Servo adds its own collision and singularity slow-down: the arm may do less than it was asked to.
"""

from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_velocity import VelocityAdapter
from embodied.robot_bridge.command_messages import Jog, joint_jog
from embodied.robot_bridge.profile import Profile

SERVO_TIMEOUT = 0.1  # MoveIt Servo's incoming_command_timeout by default [s]


def servo_frame(profile: Profile) -> str:
    """frame_id of the commands.

    Raises:
        ConfigError: the profile names none, or leaves the gripper to Servo, which drives the arm's joints only.
    """
    frame = profile.servo.frame or profile.description.base
    if not frame:
        raise ConfigError(f"profile {profile.name}: adapter {profile.adapter} needs servo.frame, the arm's base link.")
    if profile.gripper and profile.gripper.adapter == "joint":
        raise ConfigError(
            f"profile {profile.name}: MoveIt Servo drives no gripper; set gripper.topic and gripper.adapter,\n"
            "forward_position or gripper_command."
        )
    return frame


class ServoJogAdapter(VelocityAdapter):
    """A JointJog of velocities, in [-1, 1] where Servo is unitless."""

    message_type = messages.JOINT_JOG

    def __init__(self, profile: Profile, transport: Any) -> None:
        self._frame = servo_frame(profile)
        super().__init__(profile, transport)
        self._scale = profile.servo.joint_scale if profile.servo.unitless else 1.0
        self.brake_time = SERVO_TIMEOUT + float((self.limits.velocity / self.limits.acceleration).max())

    def encode(self, velocity: np.ndarray, stamp_ns: int) -> bytes:
        return joint_jog(Jog(stamp_ns, self._frame, self.names, velocity / self._scale))
