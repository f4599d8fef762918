"""One robot's joints from all the JointState topics of a bag: by name, each joint with the time of its own sample.

As the bridge does it: a gripper may have a driver of its own, on the arm's topic or another; a sample that is not
finite counts as none; where a robot sends no velocities they are zero.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.bag import Bag


@dataclasses.dataclass(frozen=True)
class Joints:
    """M moments of J joints; each moment is a message, from the first at which every joint is known.

    Attributes:
        names: J joints.
        stamp_ns: (M,) of the messages, never decreasing [ns].
        oldest_ns: (M,) stamp of the joint that was heard of longest ago [ns].
        position, velocity: (M, J) [rad, m], [rad/s, m/s].
    """

    names: tuple[str, ...]
    stamp_ns: np.ndarray
    oldest_ns: np.ndarray
    position: np.ndarray
    velocity: np.ndarray

    def last_not_after(self, stamp_ns: int) -> int:
        """Index of the newest moment whose stamp is at most `stamp_ns`; -1 when there is none."""
        return int(np.searchsorted(self.stamp_ns, stamp_ns, side="right")) - 1


def joints_of(bag: Bag, names: Sequence[str]) -> Joints:
    """The joints `names`. Raises InputError where the bag never tells of one of them."""
    rows = [
        (int(stamp), value)
        for series in bag.joint_states.values()
        for stamp, value in zip(series.stamp_ns, series.values, strict=True)
    ]
    rows.sort(key=lambda row: row[0])
    index = {name: j for j, name in enumerate(names)}
    position, velocity = np.full(len(names), np.nan), np.zeros(len(names))
    heard = np.zeros(len(names), np.int64)
    stamps, oldest, positions, velocities = [], [], [], []
    for stamp, (found, q, qd) in rows:
        if len(q) != len(found):
            continue
        qd = qd if len(qd) == len(q) else np.zeros(len(q))
        ours = [(i, index[n]) for i, n in enumerate(found) if n in index and np.isfinite(q[i]) and np.isfinite(qd[i])]
        for i, j in ours:
            position[j], velocity[j], heard[j] = q[i], qd[i], stamp
        if ours and not np.isnan(position).any():
            stamps.append(stamp)
            oldest.append(int(heard.min()))
            positions.append(position.copy())
            velocities.append(velocity.copy())
    if not stamps:
        missing = [name for name, value in zip(names, position, strict=True) if np.isnan(value)]
        raise InputError(f"Episode '{bag.path.name}': no joint states tell of {', '.join(missing)}.")
    return Joints(tuple(names), np.array(stamps), np.array(oldest), np.stack(positions), np.stack(velocities))
