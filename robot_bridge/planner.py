"""Plans of the safety filter: where the policy wants to go, within the limits, and the path that leads there.

Nothing here changes anything, so what a tick will need can be worked out before it is due.
"""

import dataclasses
from typing import Protocol

import numpy as np

from embodied.robot_bridge.chunk import Timeline
from embodied.robot_bridge.motion_filter import Motion, MotionFilter, Path, Plan
from embodied.robot_bridge.profile import Safety


class Box(Protocol):
    """Where the arm may be (`kinematics.Workspace`)."""

    def outside(self, q: np.ndarray) -> str:
        """Empty, or which frame leaves the box and by how much."""
        ...


@dataclasses.dataclass(frozen=True)
class Targets:
    """Where ticks to come are led.

    Attributes:
        rows: (F, J), one per tick; none where the arm is to brake.
        clamped, boxed: whether the first was limited by `max_step`, and by the position box.
    """

    rows: np.ndarray
    clamped: bool = False
    boxed: bool = False


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a tick plans if nothing that it depends on changes until then.

    Attributes:
        timeline, measured: what it depends on: where the policy leads, and where the joints were.
        wanted: (F, J) where the policy wants the ticks to come to go, without limits.
        targets: the same within them.
        followed, outside, fault, plan: the path that leads there, where it leaves the workspace, what it breaks, and
            the plan made of it.
    """

    timeline: Timeline
    measured: np.ndarray
    wanted: np.ndarray
    targets: Targets
    followed: Path
    outside: str
    fault: str
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The next tick.

    Attributes:
        before, path: the path as it was, and one tick later.
        grid: when the latter's present row is due [s].
        planned: None if it is none of those that plan.
        ends, motion: the path that it ends with, and what the robot is told then.
    """

    before: Path
    path: Path
    grid: float
    planned: Planned | None
    ends: Path
    motion: Motion


class Planner:
    """Pure functions of a path, a timeline and the measured joints.

    Args:
        watched: the joints that have to be led within limits without being held back.

    Attributes:
        reach: how many ticks a plan leads before it brakes: it outlasts the next one.
        nowhere: targets of an arm that is to brake.
    """

    def __init__(self, motion: MotionFilter, config: Safety, workspace: Box | None, watched: slice) -> None:
        self._filter, self._limits, self._workspace, self._watched = motion, motion.limits, workspace, watched
        self._look_ahead, self.reach = config.look_ahead, config.command_every + 3
        self._coming = motion.dt * (2 + np.arange(self.reach))  # when the targets are for, from now on
        self.nowhere = Targets(np.zeros((0, len(motion.limits.names))))

    def wanted(self, timeline: Timeline, grid: float) -> np.ndarray:
        """Where the policy wants the ticks after the one due at `grid` to go, (F, J); none where its chunks end."""
        times = grid + self._coming
        times = times[times <= timeline.end + self._filter.dt][:, None]
        return self._filter.aim(timeline, times, self._look_ahead) if len(times) else self.nowhere.rows

    def within(self, wanted: np.ndarray, measured: np.ndarray, here: np.ndarray) -> Targets:
        """`wanted` within `max_step` of the measured joints and in the position box.

        A joint that jumps away in the measurement must not pull the command along: it may stop it, no more.
        """
        if not len(wanted):
            return self.nowhere
        limits = self._limits
        low = np.minimum(measured - limits.max_step, here)
        high = np.maximum(measured + limits.max_step, here)
        near = np.minimum(np.maximum(wanted, low), high)
        rows = np.minimum(np.maximum(near, limits.low), limits.high)
        first, limited, inside = [each[0, self._watched].tolist() for each in (wanted, near, rows)]
        return Targets(rows, limited != first, inside != limited)

    def leaves(self, path: Path) -> str:
        """Where a path leaves the workspace: looked at where it ends, at rest, and at points on the way."""
        if self._workspace is None:
            return ""
        last = len(path.position) - 1
        for row in sorted({last, min(3, last), min(2 + self.reach, last), (3 + last) // 2}, reverse=True):
            if where := self._workspace.outside(path.position[row]):
                return where
        return ""

    def plan(self, path: Path, grid: float, timeline: Timeline, measured: np.ndarray) -> Planned:
        """What the tick due at `grid` plans."""
        wanted = self.wanted(timeline, grid)
        targets = self.within(wanted, measured, path.position[2])
        followed = self._filter.follow(path, targets.rows)
        outside, fault = self.leaves(followed) if len(wanted) else "", self._filter.violation(followed)
        return Planned(timeline, measured, wanted, targets, followed, outside, fault, self._filter.plan(followed))


def later(plan: Plan, late: float) -> Plan:
    """A plan that was made before its tick, seen `late` seconds later."""
    return Plan(plan.times - late, plan.positions, plan.velocities, plan, late)
