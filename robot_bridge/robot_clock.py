"""Whether a robot reads the clock that is read here: because it is one host, or two that are synchronised."""

import collections
import math

SKEW = 0.005  # two clocks that differ by less are one [s]
LATE = 0.03  # a joint state that took longer than others by so much tells where the arm was, not where it is [s]
_BLOCK, _BLOCKS, _ENOUGH = 100, 20, 20  # joint states: 10 s at 200 Hz


class RobotClock:
    """Hears when joint states were stamped and when they arrived: what took least tells how much the clocks differ."""

    def __init__(self) -> None:
        self._least = collections.deque[float](maxlen=_BLOCKS)  # of each block
        self.forget()

    def forget(self) -> None:
        """After a clock jumped."""
        self._least.clear()
        self._count, self._last, self._offset = 0, math.inf, math.inf

    def hear(self, stamped_ns: int, received_ns: int) -> None:
        """A joint state; both in ROS time [ns], the one as the robot reads it, the other as we do."""
        self._last = (received_ns - stamped_ns) * 1e-9
        if self._count % _BLOCK == 0:
            self._least.append(self._last)
            self._offset = min(self._least)
        elif self._last < self._least[-1]:
            self._least[-1] = self._last
            self._offset = min(self._offset, self._last)
        self._count += 1

    @property
    def agrees(self) -> bool:
        """A stamp of ours means the same to the robot. A clock that is set shows in the next joint state."""
        return self._count >= _ENOUGH and self._last < LATE and abs(self._offset) < SKEW

    @property
    def lateness(self) -> float:
        """How much longer the newest joint state took than others, if that is a good deal [s]."""
        more = self._last - self._offset
        return more if more > LATE else 0.0
