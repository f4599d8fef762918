"""How far a robot is behind what it was told, beyond what its servos always are: because its commands came late."""

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion

_FASTER = 0.3  # share of the velocity limit above which a joint shows its lag
_STEADY = 0.1  # and share of the acceleration limit below which it does
_FIRST = 50  # joint states over which the first estimate is averaged
_RISE, _FALL = 1 / 2000, 1 / 100  # weights of one joint state afterwards: lateness comes and goes, and only adds
_LONGEST = 0.3  # a lag beyond this is none of the servos' [s]


class Lag:
    """Learns each joint's usual lag and says what exceeds it.

    Servos follow at a distance that grows with the speed: so many seconds of it. Before a joint has moved fast, its
    usual lag counts as none. A delay of commands that lasts for many seconds becomes usual.

    Attributes:
        usual: (J,) [s].
        excess: (J,) how far the command was ahead beyond that when joints were heard last, signed [rad].
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._told: np.ndarray | None = None
        self._count = np.zeros(len(limits.names))
        self.usual, self.excess = np.zeros(len(limits.names)), np.zeros(len(limits.names))

    def hear(self, told: np.ndarray, motion: Motion, measured: np.ndarray) -> None:
        """Joints (J,) that were just heard, what the robot was told then (J,), and with which motion."""
        if told is self._told:  # nothing new
            return
        self._told, behind, limits = told, told - measured, self._limits
        fast = np.abs(motion.velocity) > _FASTER * limits.velocity
        steady = fast & (np.abs(motion.acceleration) < _STEADY * limits.acceleration)
        lag = np.clip(behind / np.where(fast, motion.velocity, 1.0), 0.0, _LONGEST)
        later = np.where(lag > self.usual, _RISE, _FALL) * steady
        self.usual += np.where(self._count < _FIRST, fast / (self._count + 1), later) * (lag - self.usual)
        self._count += fast
        self.excess = behind - self.usual * motion.velocity
