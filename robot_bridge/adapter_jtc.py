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
from embodied.robot_bridge.adapter_topic import TopicAdapter
from embodied.robot_bridge.motion_filter import Plan
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick
from embodied.robot_bridge.tick_messages import TrajectoryWriter

MIN_POINTS = 3
# The first point lies this far ahead [s]. A trajectory that starts on arrival starts as late as it arrives; the way to
# the first point makes up for what the one before it was later, and the shorter that is, the faster. At 0.05, messages
# that take 0 to 20 ms have the controller ask for up to 1.5 times a velocity limit (at 0.002, 5 times), and it adds no
# lag: the point lies on the newest plan.
SOONEST = 0.05
_FROM_REST = 1.5  # peak over mean of the speed of a cubic from rest to rest
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


def unhurried(plan: Plan, told: np.ndarray, silence: float, velocity: np.ndarray, usual: float) -> Plan:
    """The plan, later if a robot that has hung since its joints were last heard would have to hurry to its first point.

    Such a robot takes up the newest message when it wakes, from where it was.

    Args:
        told: (J,) what the robot had been told when its joints were last heard.
        silence: how long ago that was [s].
        velocity: (J,) limits.
        usual: silence up to this is nothing unusual [s].
    """
    need = float((np.abs(plan.positions[0] - told) / velocity).max())
    if silence <= usual and need <= plan.times[0] + usual:
        return plan
    later = max(0.0, _FROM_REST * need - float(plan.times[0]))
    return Plan(plan.times + later, plan.positions, plan.velocities)


class JtcAdapter(TopicAdapter):
    """Sends `tick.plan` whenever there is one."""

    message_type = messages.JOINT_TRAJECTORY

    def __init__(self, profile: Profile, transport: Any) -> None:
        super().__init__(profile, transport)
        self._writer = TrajectoryWriter(self.names)
        self._usual = profile.safety.joint_timeout / 2
        limits, between = self.limits, (2 * profile.safety.command_every + 1) / profile.safety.rate_hz
        braking = limits.velocity / limits.acceleration + limits.acceleration / limits.jerk
        self.brake_time = max(HORIZON, between + float(braking.max()))

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        if tick.plan is None:
            return False
        plan, count = shaped(tick.plan), len(self.names)
        if tick.heard_at is not None:
            plan = unhurried(plan, tick.heard_at, tick.silence, self.limits.velocity, self._usual)
        positions, velocities = plan.positions[:, :count], plan.velocities[:, :count]
        rising = (np.diff(np.round(plan.times * 1e9)) > 0).all()
        if not (rising and np.isfinite(positions).all() and np.isfinite(velocities).all()):
            raise SafetyError("bug: a plan for the trajectory controller is not finite, or its times do not rise.")
        self.topic.write(self._writer.encode(0, "", plan.times, positions, velocities))
        return True
