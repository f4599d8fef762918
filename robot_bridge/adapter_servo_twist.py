"""Tool velocities for MoveIt Servo (TwistStamped on `~/delta_twist_cmds`), for policies of end-effector deltas.

The safety filter then works on six axes instead of joints: x, y, z are the tool's position in the base frame, by
forward kinematics of the measured joints; rx, ry, rz count what was turned about the base's axes since arming, open
loop. So axis speeds, accelerations and the workspace box hold as they do for joints. What does not hold: limits of
single joints. Servo solves for them and keeps its own; near a singularity it slows down or halts. A weaker guarantee
than the other adapters give.
"""

from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_servo_jog import SERVO_TIMEOUT, servo_frame
from embodied.robot_bridge.adapter_velocity import VelocityAdapter
from embodied.robot_bridge.command_messages import Twist, twist_stamped
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick

AXES = ("x", "y", "z", "rx", "ry", "rz")
FULL_SPEED_AFTER = 0.2  # an axis takes this long from rest to its largest speed [s]
FULL_ACCELERATION_AFTER = 0.02  # and so long to the acceleration for that [s]
MAX_LEAD = 0.25  # a command may be ahead of the measured tool by so many seconds of full speed
_FAR = 100.0  # no bound [m, rad]


def axis_limits(profile: Profile) -> Limits:
    """Limits of the six axes, and of the gripper's joint after them; positions in the base frame."""
    servo, box = profile.servo, profile.workspace
    speed = np.repeat([servo.linear, servo.angular], 3)
    low, high = np.full(6, -_FAR), np.full(6, _FAR)
    if box and profile.description.tool in box.frames:
        low[:3], high[:3] = np.array(box.low) + box.margin, np.array(box.high) - box.margin
    acceleration = speed / FULL_SPEED_AFTER
    axes = Limits(AXES, low, high, speed, acceleration, acceleration / FULL_ACCELERATION_AFTER, MAX_LEAD * speed)
    if not profile.gripper:
        return axes
    finger = profile.read_limits()
    return Limits(
        (*AXES, profile.gripper.joint),
        np.append(axes.low, finger.low[-1]),
        np.append(axes.high, finger.high[-1]),
        np.append(axes.velocity, finger.velocity[-1]),
        np.append(axes.acceleration, finger.acceleration[-1]),
        np.append(axes.jerk, finger.jerk[-1]),
        np.append(axes.max_step, finger.max_step[-1]),
    )


class ServoTwistAdapter(VelocityAdapter):
    """A TwistStamped in the base frame, in [-1, 1] where Servo is unitless."""

    message_type = messages.TWIST_STAMPED

    def __init__(self, profile: Profile, transport: Any) -> None:
        self._frame, servo = servo_frame(profile), profile.servo
        if self._frame != profile.description.base or not profile.description.tool:
            raise ConfigError(
                f"profile {profile.name}: servo_twist needs description.urdf, base and tool; servo.frame: the base:\n"
                "the filter knows where the tool is in the base frame only."
            )
        super().__init__(profile, transport, axis_limits(profile))
        self.names, self._count, self._arm = AXES, len(AXES), len(profile.joints)
        self._kinematics = profile.read_kinematics([profile.description.tool])
        scales = (servo.linear_scale, servo.angular_scale) if servo.unitless else (1.0, 1.0)
        self._scale = np.repeat(scales, 3)
        self._turned = np.zeros(3)
        self.brake_time = SERVO_TIMEOUT + FULL_SPEED_AFTER

    def coordinates(self, position: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arm, small = self._arm, 1e-3
        here = self._kinematics.positions(position[:arm])[0]
        speed = (self._kinematics.positions(position[:arm] + small * velocity[:arm])[0] - here) / small
        still = np.zeros(3)  # the turn is not measured; a turning tool is a moving joint, and arming looks at those
        return np.concatenate([here, self._turned, position[arm:]]), np.concatenate([speed, still, velocity[arm:]])

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        self._turned = tick.motion.position[3:6] if tick.motion else np.zeros(3)
        return super().send(tick, measured, now, stamp_ns)

    def encode(self, velocity: np.ndarray, stamp_ns: int) -> bytes:
        twist = velocity / self._scale
        return twist_stamped(Twist(stamp_ns, self._frame, twist[:3], twist[3:]))
