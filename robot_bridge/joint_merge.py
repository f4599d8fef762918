"""One robot's joints from any number of JointState messages: by name, each joint with the time it was last heard of.

A gripper often has a driver of its own, which publishes its joint by itself and more slowly, on the arm's topic or on
another.
"""

from collections.abc import Sequence

import numpy as np

from embodied.robot_bridge.messages import JointSample


class JointMerge:
    """The newest of every joint.

    Attributes:
        names: J joints.
        position, velocity: (J,) [rad, m], [rad/s, m/s]; position is NaN before the first.
        heard_at: (J,) when each joint was last received with a finite position [s]; -inf before.
        stamp_ns: newest header stamp.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._orders: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
        self.forget()

    def forget(self) -> None:
        """As before the first message, for instance after the clock jumped."""
        count = len(self.names)
        self.position, self.velocity = np.full(count, np.nan), np.zeros(count)
        self.heard_at, self.stamp_ns = np.full(count, -np.inf), 0
        self._complete = False  # every joint was heard

    def update(self, sample: JointSample, received_at: float) -> bool:
        """Take what is ours of a message; whether anything was. A joint whose position is not finite is left stale."""
        if sample.names == self.names:  # the usual message: all of ours and no other
            total = float(sample.position.sum() + sample.velocity.sum())
            if total - total == 0.0:  # a sum is not finite if one of its terms is not
                self.position[:], self.velocity[:], self.heard_at[:] = sample.position, sample.velocity, received_at
                self.stamp_ns, self._complete = max(self.stamp_ns, sample.stamp_ns), True
                return True
        if sample.names not in self._orders:
            if len(self._orders) > 100:  # a peer that names joints at random
                self._orders.clear()
            shared = [name for name in self.names if name in sample.names]
            source = np.array([sample.names.index(name) for name in shared], int)
            self._orders[sample.names] = source, np.array([self.names.index(name) for name in shared], int)
        source, target = self._orders[sample.names]
        position, velocity = sample.position[source], sample.velocity[source]
        good = np.isfinite(position) & np.isfinite(velocity)
        if not good.all():
            target, position, velocity = target[good], position[good], velocity[good]
        if not len(target):
            return False
        self.position[target], self.velocity[target], self.heard_at[target] = position, velocity, received_at
        self.stamp_ns = max(self.stamp_ns, sample.stamp_ns)
        return True

    def missing(self) -> tuple[str, ...]:
        """Joints never heard of."""
        if self._complete:
            return ()
        return tuple(name for name, at in zip(self.names, self.heard_at, strict=True) if at == -np.inf)

    def oldest(self, count: int) -> float:
        """When the one of the first `count` joints that is silent for longest was heard [s]; -inf if one never was."""
        return float(self.heard_at[:count].min())
