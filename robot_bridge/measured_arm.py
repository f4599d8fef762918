"""What a robot's measured joints say: where the arm is, whether it follows, and how far it had got when last heard."""

import math

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion
from embodied.robot_bridge.profile import Safety

_QUIET = 0.5  # the arm brakes while its joints were not heard for longer than this share of joint_timeout
_LEFT_BEHIND = 0.02  # an arm that fell behind by so many seconds of its way while unheard has not moved [s]
_SLOWEST = 0.1  # of full speed, that way is counted as
_OUTSIDE = 0.01  # a joint may stand this far outside its box when arming [rad, m]


class MeasuredArm:
    """The newest joint state against what the robot was told.

    Args:
        watched: the joints that have to follow.

    Attributes:
        position: (J,) [rad, m]; None before the first.
        velocity: (J,) [rad/s, m/s].
        heard_at: when that was received [s].
        told: (J,) what the robot had been told when its joints were last heard; a robot that hangs has got no further.
            None before.
    """

    def __init__(self, limits: Limits, config: Safety, watched: slice) -> None:
        self._limits, self._config, self._watched = limits, config, watched
        count = len(limits.names)
        self.position: np.ndarray | None = None
        self.velocity, self.heard_at = np.zeros(count), -np.inf
        self._behind, self._told_speed = np.zeros(count), np.zeros(count)  # behind what was told, and how fast that was
        self.forget()

    def forget(self) -> None:
        """What the robot was told, as before it was armed."""
        self.told: np.ndarray | None = None
        self._told_at, self._unheard, self._error_since = -np.inf, False, np.inf

    def clock_jumped(self, now: float) -> None:
        """Nothing that was stamped before counts any more; joint states have to come again within their timeout."""
        self.heard_at, self._told_at, self._error_since = now, -np.inf, np.inf

    def measure(self, position: np.ndarray, velocity: np.ndarray, received_at: float) -> None:
        """As `SafetyFilter.measure`."""
        try:
            position, velocity = np.array(position, np.float64), np.array(velocity, np.float64)
        except (TypeError, ValueError):
            return
        if position.shape != self._limits.low.shape or not _finite(position) or not math.isfinite(received_at):
            return
        if velocity.shape != position.shape:
            velocity = np.zeros_like(position)
        elif not _finite(velocity):
            velocity = np.where(np.isfinite(velocity), velocity, 0.0)
        self.position, self.velocity, self.heard_at = position, velocity, received_at

    def quiet(self, now: float) -> bool:
        """Its joints have not been heard for so long that it should brake."""
        return not now - self.heard_at <= _QUIET * self._config.joint_timeout

    def standing(self) -> str:
        """Why the arm cannot be armed as it stands."""
        if self.position is None:
            return "joint states are stale"
        names, position = self._limits.names, self.position
        fastest = int(np.argmax(np.abs(self.velocity)))
        if np.abs(self.velocity[fastest]) > self._config.arm_max_velocity:
            return f"{names[fastest]} moves at {self.velocity[fastest]:.3f} rad/s"
        outside = np.abs(position - self._limits.clip_position(position))
        worst = int(np.argmax(outside))
        if outside[worst] > _OUTSIDE:
            return f"{names[worst]} stands at {position[worst]:.3f}, outside its limits"
        return ""

    def tracking(self, now: float, motion: Motion) -> str:
        """Which joint has been away from its command for too long. Call it at every tick of an active arm."""
        if self.position is None:
            return ""
        error = [abs(away) for away in (motion.position - self.position)[self._watched].tolist()]
        worst = error.index(max(error))
        if error[worst] <= self._config.tracking_error:
            self._error_since = np.inf
        elif self._error_since == np.inf:
            self._error_since = now
        elif now - self._error_since > self._config.tracking_time:
            return f"{self._limits.names[worst]} does not follow: {error[worst]:.3f} rad off"
        return ""

    def heard(self, now: float, motion: Motion | None) -> bool:
        """Whether there is a joint state since the last that was noted."""
        if not abs(now - self.heard_at) <= self._config.joint_timeout:
            self._unheard = True
            return False
        return not (self.heard_at == self._told_at or motion is None or self.position is None)

    @property
    def returns(self) -> bool:
        """It is heard again after a gap, through which it was told to move."""
        return self._unheard and self.told is not None

    def elsewhere(self, motion: Motion) -> bool:
        """An arm that `returns` is where it could not have been led: it restarted, or has another zero."""
        assert self.position is not None
        assert self.told is not None
        told = self.told, motion.position
        away = self.position - np.clip(self.position, np.minimum(*told), np.maximum(*told))
        return bool((np.abs(away) > self._limits.max_step + self._behind).any())

    def left_behind(self, motion: Motion) -> bool:
        """An arm that `returns` is farther from what it was told than before: it did not follow blindly, it hung."""
        assert self.position is not None
        way = np.maximum(self._told_speed, _SLOWEST * self._limits.velocity)
        return bool((np.abs(motion.position - self.position) - self._behind > _LEFT_BEHIND * way).any())

    def note(self, motion: Motion | None) -> None:
        """The robot has been told so much by the newest joint state."""
        self._unheard, self._told_at = False, self.heard_at
        self.told = motion.position if motion else None
        if motion is not None and self.position is not None:
            self._behind = np.abs(motion.position - self.position)
            self._told_speed = np.abs(motion.velocity)


def _finite(values: np.ndarray) -> bool:
    """Whether all of a few values are: a sum is not finite if one of its terms is not."""
    total = sum(values.tolist())
    return total - total == 0.0 or bool(np.isfinite(values).all())
