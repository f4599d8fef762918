"""Whether a robot reads the clock that is read here: because it is one host, or two that are synchronised."""

import collections

SKEW = 0.005  # two clocks that differ by less are one [s]
_LATE = 0.03  # a joint state this late tells nothing [s]
_WINDOW, _ENOUGH = 100, 20  # joint states


class RobotClock:
    """Hears when joint states were stamped and when they arrived: what took least tells how much the clocks differ."""

    def __init__(self) -> None:
        self._delays = collections.deque[float](maxlen=_WINDOW)

    def hear(self, stamped_ns: int, received_ns: int) -> None:
        """A joint state; both in ROS time [ns], the one as the robot reads it, the other as we do."""
        self._delays.append((received_ns - stamped_ns) * 1e-9)

    def forget(self) -> None:
        """After a clock jumped."""
        self._delays.clear()

    @property
    def agrees(self) -> bool:
        """A stamp of ours means the same to the robot. A clock that is set shows in the next joint state."""
        delays = self._delays
        return len(delays) >= _ENOUGH and delays[-1] < _LATE and abs(min(delays)) < SKEW
