"""Commands for ros2_control's joint_trajectory_controller: short trajectories that end at rest.

Every trajectory is its own dead-man: if the bridge falls silent the controller finishes the last one, which comes to
rest within its horizon, and holds. The controller rejects a whole message, without a word on the wire, if a joint is
missing or unknown, times do not rise, or the last velocity is not zero; so each of these is ensured here.

Where the robot reads our clock a trajectory bears its time. One that is late is then joined where it has got to: its
first point lies ahead of what transit takes, so that nothing jumps, and lateness that comes or goes is not made up for
in a hurry. Stamp 0, "start on arrival", is for a clock of its own: a stamp would be refused or jump.
"""

import math
from typing import Any

import numpy as np

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_topic import TopicAdapter
from embodied.robot_bridge.controller import Reference
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion, Plan
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick
from embodied.robot_bridge.tick_messages import TrajectoryWriter
from embodied.robot_bridge.trajectory_controller import interpolate

MIN_POINTS = 3
# The first point lies this far ahead [s], on the newest plan: that adds no lag. A stamped trajectory that takes longer
# steps onto its plan. One that starts on arrival starts as late as it arrives; the way to the first point makes up for
# what the one before it was later, and the shorter that is, the faster. At 0.05, messages that take 0 to 20 ms have the
# controller ask for up to 1.5 times a velocity limit (at 0.002, 5 times).
SOONEST = 0.05
_FROM_REST = 1.5  # peak over mean of the speed of a cubic from rest to rest
_HURRY = 1.1  # times the velocity limit: no more is asked of a robot that wakes
_WAY = np.linspace(0.0, 1.0, 21)[:, None]  # shares of the time of a cubic
_PAST = 0.01  # which may shoot past its end by so much [rad, m]
_NEVER = (np.inf, np.inf)
_STEP = 0.002  # between points where the robot stands still [s]
_ON_TIME = 0.001  # a tick that is further off its time does not send what was made ready for it [s]
HORIZON = 0.15  # a trajectory lasts at least this long, so that one lost message does not end it [s]


def shaped(plan: Plan) -> Plan:
    """The plan as a trajectory controller takes it: 3 points or more, HORIZON or longer, at rest where the plan ends.

    From SOONEST on the plan's points stay as they are: between them it is cubic, and a point less would break a limit.
    Where there is none near SOONEST its state there becomes one: a cubic from the robot's state to a point much later
    would leave the plan, and for a joint that comes to rest before that, shoot past its end.
    """
    first = min(int(np.searchsorted(plan.times, SOONEST)), len(plan.times) - 1)
    times, positions, velocities = (rows[first:].copy() for rows in (plan.times, plan.positions, plan.velocities))
    if first and times[0] >= SOONEST + _STEP:
        before, after = (Reference(plan.positions[k], plan.velocities[k]) for k in (first - 1, first))
        begin = float(plan.times[first - 1])
        there = interpolate(before, after, float(times[0]) - begin, SOONEST - begin)
        times = np.append(SOONEST, times)
        positions, velocities = np.vstack([there.position, positions]), np.vstack([there.velocity, velocities])
    times[0] = max(times[0], SOONEST)
    velocities[-1] = 0.0
    missing = max(MIN_POINTS - len(times), int(times[-1] < HORIZON))
    if missing:
        step = max((HORIZON - times[-1]) / missing, _STEP)
        times = np.append(times, times[-1] + step * np.arange(1, missing + 1))
        positions = np.vstack([positions, np.repeat(positions[-1:], missing, 0)])
        velocities = np.vstack([velocities, np.zeros((missing, positions.shape[1]))])
    return Plan(times, positions, velocities)


def unhurried(plan: Plan, told: np.ndarray, velocity: np.ndarray, usual: float) -> Plan:
    """The plan, later if its first point is out of reach within the velocity limits (J,) from what was `told` (J,).

    Args:
        usual: a way that is longer by so much is nothing unusual [s].
    """
    need = float((np.abs(plan.positions[0] - told) / velocity).max())
    if need <= plan.times[0] + usual:
        return plan
    later = max(0.0, _FROM_REST * need - float(plan.times[0]))
    return Plan(plan.times + later, plan.positions, plan.velocities)


def resting(plan: Plan, told: np.ndarray, motion: Motion, limits: Limits) -> Plan:
    """The end of a plan that brakes, without the way there: for a robot whose joints are not heard.

    It follows blindly, or it hangs where it was told to be then, and takes up this message when it wakes. Points on the
    way would be a brake for the one and a race for the other. A single cubic to the end is a brake for both: for the
    other it takes as long as its limits need, if the one does not shoot past the end by more than a hair meanwhile, nor
    leave its box at all. Where it would, the plan stays as it is.

    Args:
        told: (J,) what the robot had been told when its joints were last heard.
        motion: of a robot that follows, now.
    """
    end, soonest = plan.positions[-1], float(plan.times[-1])
    need = _FROM_REST / _HURRY * float((np.abs(end - told) / limits.velocity).max())
    way = end - motion.position
    for time in np.linspace(max(need, soonest), soonest, 8):
        moved = way * (3 - 2 * _WAY) * _WAY**2 + motion.velocity * time * _WAY * (1 - _WAY) ** 2
        past = np.maximum(np.minimum(way, 0.0) - moved, moved - np.maximum(way, 0.0)).max()
        there = motion.position + moved
        if past <= _PAST and ((there >= limits.low) & (there <= limits.high)).all():
            return Plan(np.array([time]), end[None], np.zeros((1, len(end))))
    return plan


class JtcAdapter(TopicAdapter):
    """Sends `tick.plan` whenever there is one."""

    message_type = messages.JOINT_TRAJECTORY

    def __init__(self, profile: Profile, transport: Any) -> None:
        super().__init__(profile, transport)
        self._writer = TrajectoryWriter(self.names)
        self._usual = profile.safety.joint_timeout / 2
        # A plan that is expected, as a trajectory and as a message.
        self._ready: tuple[Plan, Plan, bytes] | None = None
        self._resting = _NEVER  # when a robot that is not heard was told to rest, and when it will [s]
        limits, between = self.limits, (2 * profile.safety.command_every + 1) / profile.safety.rate_hz
        braking = limits.velocity / limits.acceleration + limits.acceleration / limits.jerk
        self.brake_time = max(HORIZON, between + float(braking.max()))

    def expect(self, plan: Plan) -> None:
        made = shaped(plan)
        self._ready = plan, made, self._encode(0, made)

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        ready, self._ready = self._ready, None
        if tick.plan is None:
            return False
        if ready is not None and self._sent_ready(tick, *ready, stamp_ns):
            return True
        stamp = 0
        if tick.heard_at is not None and tick.motion is not None and tick.silence > self._usual:
            began, ends = self._resting
            if began <= now < ends:  # it brakes: to be told anew would only take it longer
                return False
            plan = shaped(resting(tick.plan, tick.heard_at, tick.motion, self.limits))
            if now < began:
                self._resting = now, now + float(plan.times[-1])
        else:
            plan = shaped(tick.plan)
            if tick.heard_at is not None and tick.motion is not None:
                on_time, self._resting = plan, _NEVER
                plan = unhurried(plan, tick.heard_at, self.limits.velocity, self._usual)
                stamp = stamp_ns if self.clock_agrees and plan is on_time else 0
        self.topic.write(self._encode(stamp, plan))
        return True

    def _sent_ready(self, tick: Tick, expected: Plan, made: Plan, message: bytes, stamp_ns: int) -> bool:
        """Whether what was made ready would do, and was sent: its stamp says when its times count from."""
        plan, heard_at = tick.plan, tick.heard_at
        if plan is None or plan.prepared is not expected.prepared or heard_at is None:
            return False
        late = plan.late - expected.late
        if not (self.clock_agrees and tick.silence <= self._usual and abs(late) <= _ON_TIME):
            return False
        if unhurried(made, heard_at, self.limits.velocity, self._usual - late) is not made:
            return False
        self._resting = _NEVER
        self.topic.write(self._writer.stamped(message, stamp_ns - round(late * 1e9)))
        return True

    def _encode(self, stamp_ns: int, plan: Plan) -> bytes:
        count = len(self.names)
        positions, velocities = plan.positions[:, :count], plan.velocities[:, :count]
        nanoseconds = np.rint(plan.times * 1e9)
        rising = (nanoseconds[1:] > nanoseconds[:-1]).all()
        if not (rising and math.isfinite(positions.sum() + velocities.sum())):  # one that is not spoils the sum
            raise SafetyError("bug: a plan for the trajectory controller is not finite, or its times do not rise.")
        return self._writer.encode(stamp_ns, "", plan.times, positions, velocities)
