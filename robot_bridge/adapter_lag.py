"""How far a robot is behind what it was told, beyond what its servos always are: because its commands came late."""

import collections

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion

_FASTER = 0.3  # share of the velocity limit above which a joint shows its lag
_STEADY = 0.1  # and share of the acceleration limit below which it does
_FIRST = 50  # joint states over which the first estimate is averaged
_RISE, _FALL = 1 / 2000, 1 / 100  # weights of one joint state afterwards: lateness comes and goes, and only adds
_PAST = 30  # joint states: one that is where the arm was not told to be in so many is not late, but wrong or held
_NEAR = 0.02  # by more than so many seconds of full speed [s]
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
        self._told = collections.deque[np.ndarray](maxlen=_PAST)
        self._count = np.zeros(len(limits.names))
        self.usual, self.excess = np.zeros(len(limits.names)), np.zeros(len(limits.names))

    def hear(self, told: np.ndarray, motion: Motion, measured: np.ndarray) -> None:
        """Joints (J,) that were just heard, what the robot was told then (J,), and with which motion."""
        if self._told and told is self._told[-1]:  # nothing new
            return
        self._told.append(told)
        behind, limits = told - measured, self._limits
        fast = np.abs(motion.velocity) > _FASTER * limits.velocity
        steady = fast & (np.abs(motion.acceleration) < _STEADY * limits.acceleration)
        lag = np.clip(behind / np.where(fast, motion.velocity, 1.0), 0.0, _LONGEST)
        later = np.where(lag > self.usual, _RISE, _FALL) * steady
        self.usual += np.where(self._count < _FIRST, fast / (self._count + 1), later) * (lag - self.usual)
        self._count += fast
        usual, past, near = self.usual * motion.velocity, np.array(self._told), _NEAR * limits.velocity
        place = measured + usual
        late = (place > past.min(axis=0) - near) & (place < past.max(axis=0) + near)
        self.excess = np.where(late, behind - usual, 0.0)
