"""What MoveIt Servo does with joint jog and twist commands, in front of a position-controlled arm.

Rules of moveit_servo with its defaults: a command counts while now - stamp < 0.1 s, whenever it arrives, so that a
stamp of 0 is always stale and one of the future lasts longer; then the arm halts smoothly. An unknown joint, an unknown
frame or a value that is not finite is INVALID: nothing moves. Speeds are scaled down together to the joints' velocity
limits; near a joint's end all joints halt; near a singularity a twist slows down and stops.

Not as in Servo: the command type is fixed by the profile's adapter (there is no switch_command_type service, whose
type is in moveit_msgs), there is no collision check, and the smoothing filter is a first-order one.
"""

from collections.abc import Callable, Sequence

import numpy as np

from embodied.robot_bridge.command_messages import read_joint_jog, read_twist_stamped
from embodied.robot_bridge.controller import Moment, Reference
from embodied.robot_bridge.profile import Servo

COMMAND_TIMEOUT = 0.1  # incoming_command_timeout [s]
PERIOD = 0.01  # publish_period [s]
JOINT_MARGIN = 0.1  # joint_limit_margin [rad]
SINGULARITY_SLOW, SINGULARITY_STOP = 17.0, 30.0  # condition numbers of the Jacobian
_SMOOTHING = 0.02  # time constant of the output filter [s]
_STOPPED = 1e-4  # below this a joint stands [rad/s]


class ServoController:
    """Velocity commands in, positions out.

    Args:
        kind: `jog` or `twist`.
        low, high, velocity: (J,) joint limits [rad], [rad/s].
        jacobian: (J,) positions -> (6, J), linear over angular, in the base frame.
        rotations: frame -> (J,) positions -> (3, 3) rotation from that frame to the base; names the frames a twist may
            be given in.

    Attributes:
        status: what Servo would publish: "", stale, invalid, joint bound, singularity.
    """

    def __init__(
        self,
        names: Sequence[str],
        position: np.ndarray,
        kind: str,
        settings: Servo,
        limits: tuple[np.ndarray, np.ndarray, np.ndarray],
        jacobian: Callable[[np.ndarray], np.ndarray],
        rotations: dict[str, Callable[[np.ndarray], np.ndarray]],
    ) -> None:
        self.names, self._kind, self._settings = tuple(names), kind, settings
        self._low, self._high, self._limit = limits
        self._jacobian, self._rotations = jacobian, rotations
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        self._target = np.array(position, np.float64)
        self._velocity, self._wanted = np.zeros_like(self._target), np.zeros_like(self._target)
        self._command: tuple[int, str, tuple[str, ...], np.ndarray] | None = None
        self._elapsed, self.status = PERIOD, ""

    def receive(self, data: bytes, moment: Moment) -> str:
        if self._kind == "jog":
            jog = read_joint_jog(data)
            self._command = (jog.stamp_ns, jog.frame_id, jog.names, jog.velocity)
        else:
            twist = read_twist_stamped(data)
            self._command = (twist.stamp_ns, twist.frame_id, (), np.concatenate([twist.linear, twist.angular]))
        self._elapsed = PERIOD
        if moment.stamp_ns - self._command[0] >= COMMAND_TIMEOUT * 1e9:
            return "stale: now - stamp is 0.1 s or more"
        return self._invalid(*self._command[1:])

    def _invalid(self, frame: str, names: tuple[str, ...], values: np.ndarray) -> str:
        if not np.isfinite(values).all():
            return "invalid: a value is not finite"
        if self._kind == "jog":
            unknown = [name for name in names if name not in self.names]
            return f"invalid: no joint {unknown}" if unknown else ""
        if frame not in self._rotations:
            return f"invalid: frame '{frame}' is none of {', '.join(self._rotations)}"
        return ""

    def update(self, moment: Moment) -> Reference:
        self._elapsed += moment.dt
        if self._elapsed >= PERIOD - 1e-9:
            self._elapsed = 0.0
            self._wanted = self._wish(moment)
        share = 1 - np.exp(-moment.dt / _SMOOTHING)
        self._velocity = self._velocity + (self._wanted - self._velocity) * share
        if not self._wanted.any() and np.abs(self._velocity).max() < _STOPPED:
            self._velocity = np.zeros_like(self._velocity)
        self._target = self._target + self._velocity * moment.dt
        return Reference(self._target, self._velocity)

    def _wish(self, moment: Moment) -> np.ndarray:
        """Joint velocities (J,) that the newest command asks for, after all rules."""
        rest = np.zeros_like(self._target)
        if self._command is None:
            return rest
        stamp_ns, frame, names, values = self._command
        if moment.stamp_ns - stamp_ns >= COMMAND_TIMEOUT * 1e9:
            self.status = "stale"
            return rest
        if self._invalid(frame, names, values):
            self.status = "invalid"
            return rest
        self.status = ""
        wish = self._jog(names, values) if self._kind == "jog" else self._twist(frame, values)
        wish = wish / max(1.0, np.max(np.abs(wish) / self._limit))
        ahead = self._target + wish * PERIOD
        beyond = ((ahead < self._low + JOINT_MARGIN) & (wish < 0)) | ((ahead > self._high - JOINT_MARGIN) & (wish > 0))
        if beyond.any():
            self.status = "joint bound"
            return rest
        return wish

    def _jog(self, names: tuple[str, ...], values: np.ndarray) -> np.ndarray:
        wish = np.zeros_like(self._target)
        scale = self._settings.joint_scale if self._settings.unitless else 1.0
        for name, value in zip(names, values, strict=True):
            wish[self.names.index(name)] = value * scale
        return wish

    def _twist(self, frame: str, values: np.ndarray) -> np.ndarray:
        settings = self._settings
        scales = (settings.linear_scale, settings.angular_scale) if settings.unitless else (1.0, 1.0)
        rotation = self._rotations[frame](self._target)
        twist = np.concatenate([rotation @ values[:3] * scales[0], rotation @ values[3:] * scales[1]])
        jacobian = self._jacobian(self._target)
        wish = np.linalg.pinv(jacobian) @ twist
        condition = np.linalg.cond(jacobian)
        if condition > SINGULARITY_SLOW and np.linalg.cond(self._jacobian(self._target + wish * PERIOD)) > condition:
            self.status = "singularity"
            slower = 1 - (condition - SINGULARITY_SLOW) / (SINGULARITY_STOP - SINGULARITY_SLOW)
            return wish * max(0.0, slower)
        return wish
