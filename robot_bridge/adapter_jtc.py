"""Commands for ros2_control's joint_trajectory_controller: short trajectories that end at rest.

Every trajectory is its own dead-man: if the bridge falls silent the controller finishes the last one, which comes to
rest within its horizon, and holds. The controller rejects a whole message, without a word on the wire, if a joint is
missing or unknown, times do not rise, or the last velocity is not zero; so each of these is ensured here. Stamp 0 means
"start on arrival": a stamped trajectory would lose the transit time and jump.
"""

from typing import Any

import numpy as np

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_lag import Lag
from embodied.robot_bridge.adapter_topic import TopicAdapter
from embodied.robot_bridge.motion_filter import Motion, Plan
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick
from embodied.robot_bridge.tick_messages import TrajectoryWriter

MIN_POINTS = 3
# The first point lies this far ahead [s]. A trajectory that starts on arrival starts as late as it arrives; the way to
# the first point makes up for what the one before it was later, and the shorter that is, the faster. At 0.05, messages
# that take 0 to 20 ms have the controller ask for up to 1.5 times a velocity limit (at 0.002, 5 times), and it adds no
# lag: the point lies on the newest plan.
SOONEST = 0.05
UNNOTICED = 0.015  # a controller that may be this far behind is not waited for; less is how long messages take [s]
_SLOW = 0.02  # share of the velocity limit below which a controller counts as standing
_FRESH = 0.02  # joints heard so recently show how far the robot is behind what it is told now [s]
_STEP = 0.002  # between points where the robot stands still [s]
HORIZON = 0.15  # a trajectory lasts at least this long, so that one lost message does not end it [s]


def shaped(plan: Plan) -> Plan:
    """The plan as a trajectory controller takes it: 3 points or more, HORIZON or longer, at rest where the plan ends.

    From SOONEST on the plan's points stay as they are: between them it is cubic, and a point less would break a limit.
    """
    keep = plan.times >= SOONEST
    keep[-1] = True
    times, positions, velocities = np.maximum(plan.times[keep], SOONEST), plan.positions[keep], plan.velocities[keep]
    velocities[-1] = 0.0
    missing = max(MIN_POINTS - len(times), int(times[-1] < HORIZON))
    if missing:
        step = max((HORIZON - times[-1]) / missing, _STEP)
        times = np.append(times, times[-1] + step * np.arange(1, missing + 1))
        positions = np.vstack([positions, np.repeat(positions[-1:], missing, 0)])
        velocities = np.vstack([velocities, np.zeros((missing, positions.shape[1]))])
    return Plan(times, positions, velocities)


def unhurried(plan: Plan, on_time: np.ndarray, speed: np.ndarray, behind: np.ndarray, velocity: np.ndarray) -> Plan:
    """The plan, so much later that the way to its first point keeps the velocity limits, but for UNNOTICED.

    Not so late that a controller that is on time would shoot past that point: a cubic from position p and speed v to
    rest at distance d overshoots where it takes longer than 3 d / v.

    Args:
        on_time, speed: (J,) the controller's state when it starts, if messages come at once.
        behind: (J,) where it is if they came late.
        velocity: (J,) limits.
    """
    first = float(plan.times[0])
    way = plan.positions[0] - on_time
    sure, maybe = (float((np.abs(x) / velocity).max()) for x in (way, plan.positions[0] - behind))
    moving = np.abs(speed) > _SLOW * velocity
    longest = (3 * np.maximum(way * np.sign(speed), 0.0) / np.where(moving, np.abs(speed), 1.0))[moving]
    start = max(sure, min(maybe - UNNOTICED, float(longest.min(initial=np.inf))), first)
    return Plan(plan.times + (start - first), plan.positions, plan.velocities) if start > first else plan


def passed(plan: Plan, position: np.ndarray, velocity: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity (J,) of a controller that took up the plan with these, `time` seconds later."""
    after = int(plan.times.searchsorted(time))
    if after == len(plan.times):
        return plan.positions[-1], plan.velocities[-1]
    begin = 0.0
    if after:
        begin, position, velocity = plan.times[after - 1], plan.positions[after - 1], plan.velocities[after - 1]
    span = plan.times[after] - begin
    share, way = (time - begin) / span, plan.positions[after] - position
    first, last = velocity * span, plan.velocities[after] * span
    square, cube = 3 * way - 2 * first - last, first + last - 2 * way
    where = position + share * (first + share * (square + share * cube))
    return where, (first + share * (2 * square + 3 * share * cube)) / span


class JtcAdapter(TopicAdapter):
    """Sends `tick.plan` whenever there is one."""

    message_type = messages.JOINT_TRAJECTORY

    def __init__(self, profile: Profile, transport: Any) -> None:
        super().__init__(profile, transport)
        self._writer = TrajectoryWriter(self.names)
        self._lag = Lag(self.limits)
        self._sent: tuple[float, Plan, np.ndarray, np.ndarray] | None = None  # when, what, from which state
        limits, between = self.limits, (2 * profile.safety.command_every + 1) / profile.safety.rate_hz
        braking = limits.velocity / limits.acceleration + limits.acceleration / limits.jerk
        self.brake_time = max(HORIZON, between + float(braking.max()))

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        if tick.plan is None:
            return False
        plan, count = shaped(tick.plan), len(self.names)
        if tick.heard_at is not None and tick.motion is not None:
            plan = self._unhurried(plan, tick.motion, tick.heard_at, tick.silence, measured, now)
        positions, velocities = plan.positions[:, :count], plan.velocities[:, :count]
        rising = (np.diff(np.round(plan.times * 1e9)) > 0).all()
        if not (rising and np.isfinite(positions).all() and np.isfinite(velocities).all()):
            raise SafetyError("bug: a plan for the trajectory controller is not finite, or its times do not rise.")
        self.topic.write(self._writer.encode(0, "", plan.times, positions, velocities))
        return True

    def _unhurried(
        self, plan: Plan, motion: Motion, told: np.ndarray, silence: float, measured: np.ndarray, now: float
    ) -> Plan:
        """The plan for a controller that went on with the last one, or is behind: late, or hung since it was heard."""
        if silence <= _FRESH:
            self._lag.hear(told, motion, measured)
        behind = motion.position - self._lag.excess - motion.velocity * silence
        on_time, speed = motion.position, motion.velocity
        if self._sent is not None and now >= self._sent[0]:  # else the clock jumped back
            on_time, speed = passed(self._sent[1], *self._sent[2:], now - self._sent[0])
        plan = unhurried(plan, on_time, speed, behind, self.limits.velocity)
        self._sent = (now, plan, on_time, speed)
        return plan
