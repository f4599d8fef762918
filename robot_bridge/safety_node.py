"""The only process that commands the robot; `python -m embodied.robot_bridge.safety_node --profile NAME`.

in   /bridge/chunk           JointTrajectory   targets from the policy, stamped with the observation's stamp
in   <topics.joint_states>   JointState
in   /bridge/mode            String            arm | run | hold | stop | reset
in   /bridge/estop           Bool              true latches ESTOP
in   /bridge/deadman         Bool              true at >= 10 Hz while held (if safety.deadman_required)
out  <topics.command>        JointTrajectory   50 Hz; ends at rest within about 0.2 s: if this process dies,
                                               the robot's controller brings the arm to rest by itself
out  /bridge/command         JointTrajectory   one point: the command sent, at the time it is due; frame_id names
                                               the chunk behind it, or the state
out  /bridge/state           DiagnosticArray   10 Hz and at every change; latched
out  /bridge/event           String (JSON)     state changes and refusals; latched, 100 deep
"""

import argparse
import collections
import logging
import time
from collections.abc import Callable
from typing import Any

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.messages import Trajectory
from embodied.robot_bridge.node import EventLog, Rate, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, LATEST
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick

log = logging.getLogger("safety")

CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC = "/bridge/chunk", "/bridge/command", "/bridge/state"
MODE_TOPIC, ESTOP_TOPIC, DEADMAN_TOPIC = "/bridge/mode", "/bridge/estop", "/bridge/deadman"
STATE_HZ = 10.0
_LEVEL = {State.RUNNING: 0, State.ARMED: 0, State.INACTIVE: 0, State.HOLD: 1}


class SafetyNode:
    """The filter on a transport. Call `tick` at `safety.rate_hz`.

    Args:
        clock: monotonic seconds.
        stamp: ROS time [ns].
    """

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], int] = now_ns,
    ) -> None:
        self._profile, self._transport, self._clock, self._stamp = profile, transport, clock, stamp
        self.filter = SafetyFilter(profile.read_limits(), profile.safety)
        self._names, self._fingerprint = profile.all_joints, profile.fingerprint
        self._inbox: collections.deque[tuple[str, bytes, int]] = collections.deque()
        topics = profile.topics
        self._adapter = transport.publisher(topics.command, messages.JOINT_TRAJECTORY, COMMAND)
        self._command = transport.publisher(COMMAND_TOPIC, messages.JOINT_TRAJECTORY, DEFAULT)
        self._state = transport.publisher(STATE_TOPIC, messages.DIAGNOSTIC_ARRAY, LATCHED)
        self._events = EventLog(transport, "safety")
        # Receives nothing of use: it counts who else commands the robot.
        self._rivals = transport.subscriber(topics.command, messages.JOINT_TRAJECTORY, LATEST, lambda data, at: None)
        for topic, kind, qos in (
            (topics.joint_states, messages.JOINT_STATE, LATEST),
            (CHUNK_TOPIC, messages.JOINT_TRAJECTORY, COMMAND),
            (MODE_TOPIC, messages.STRING, DEFAULT),
            (ESTOP_TOPIC, messages.BOOL, COMMAND),
            (DEADMAN_TOPIC, messages.BOOL, COMMAND),
        ):
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._inbox.append((topic, data, at)))
        self._handlers: dict[str, Callable[[bytes, float], None]] = {
            topics.joint_states: self._on_joint_state,
            CHUNK_TOPIC: self._on_chunk,
            MODE_TOPIC: self._on_mode,
            ESTOP_TOPIC: lambda data, at: self.filter.set_estop(messages.read_bool(data)),
            DEADMAN_TOPIC: lambda data, at: self.filter.set_deadman(messages.read_bool(data), at),
        }
        self._ticks, self._shown, self.malformed = 0, "", 0
        self.rate: Rate | None = None

    def tick(self) -> Tick:
        """Take what arrived, decide, send."""
        self._take()
        now = self._clock()
        every_second = self._ticks % round(self._profile.safety.rate_hz) == 0
        if every_second and self.filter.state in (State.RUNNING, State.HOLD) and (rival := self._rival()):
            self.filter.request("stop", now)
            self._events.write("stopped", reason=rival)
        tick = self.filter.tick(now)
        if tick.plan is not None:
            self._send(tick)
        for text in tick.events:
            self._events.write("safety", text=text)
        if tick.events or self._ticks % round(self._profile.safety.rate_hz / STATE_HZ) == 0:
            self._publish_state(tick, now)
        self._ticks += 1
        return tick

    def _take(self) -> None:
        newest_state: tuple[str, bytes, int] | None = None
        for _ in range(len(self._inbox)):
            item = self._inbox.popleft()
            if item[0] == self._profile.topics.joint_states:
                newest_state = item  # a burst after a pause is decoded once
                continue
            self._handle(item)
        if newest_state is not None:
            self._handle(newest_state)

    def _handle(self, item: tuple[str, bytes, int]) -> None:
        topic, data, received_ns = item
        try:
            self._handlers[topic](data, received_ns * 1e-9)
        except InputError as error:
            self.malformed += 1
            if self.malformed <= 10:
                log.warning("%s: %s", topic, error)

    def _on_joint_state(self, data: bytes, received_at: float) -> None:
        self.filter.measure(*messages.read_joint_state(data).select(self._names), received_at)

    def _on_chunk(self, data: bytes, received_at: float) -> None:
        trajectory = messages.read_joint_trajectory(data)
        source, run, sequence = [*trajectory.frame_id.split(":"), "", ""][:3]
        if source != "policy" or not sequence.isdigit():
            raise InputError(f"a chunk with frame_id '{trajectory.frame_id}'; it must be policy:<run>:<sequence>")
        now = self._clock()
        observed_at = now - (self._stamp() - trajectory.stamp_ns) * 1e-9
        chunk = Chunk(
            run, int(sequence), observed_at, received_at, trajectory.names, trajectory.times, trajectory.positions
        )
        self.filter.offer(chunk, now)

    def _on_mode(self, data: bytes, received_at: float) -> None:
        mode = messages.read_string(data)
        self.filter.request(mode, self._clock(), self._obstacle() if mode == "arm" else "")

    def _rival(self) -> str:
        others = self._rivals.matched - 1
        return f"{others} other publishers on {self._adapter.topic}" if others > 0 else ""

    def _obstacle(self) -> str:
        """Why the robot could not be driven."""
        topic = self._adapter.topic
        mismatch = [line for line in self._transport.problems() if line.startswith(f"{topic}:")]
        # Its own `_rivals` subscription is one of the matched.
        if self._adapter.matched < 2:
            return "; ".join(mismatch) or f"nobody subscribes to {topic}"
        return self._rival()

    def _send(self, tick: Tick) -> None:
        plan = tick.plan
        assert plan is not None
        self._adapter.write(
            messages.joint_trajectory(Trajectory(0, "", self._names, plan.times, plan.positions, plan.velocities))
        )
        frame = f"policy:{tick.chunk[0]}:{tick.chunk[1]}" if tick.chunk else tick.state.lower()
        first = Trajectory(self._stamp(), frame, self._names, plan.times[:1], plan.positions[:1], plan.velocities[:1])
        self._command.write(messages.joint_trajectory(first))

    def _publish_state(self, tick: Tick, now: float) -> None:
        values: dict[str, Any] = {"state": tick.state, "reason": tick.reason, **self.filter.counts}
        values["profile"] = self._fingerprint
        values["malformed"] = self.malformed
        values["missed_deadlines"] = self.rate.missed_deadlines if self.rate else 0
        level = _LEVEL.get(tick.state, 2)
        self._state.write(messages.diagnostics(self._stamp(), "safety", level, tick.reason, values))

    def shut_down(self, rate: Rate, stop: Stop) -> None:
        """Decelerate and hold before leaving; a second at most."""
        del stop
        self.filter.request("stop", self._clock())
        for _ in range(round(self._profile.safety.rate_hz)):
            self.tick()
            if self.filter.motion is None or self.filter.motion.at_rest:
                break
            time.sleep(rate.period)


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    transport = open_transport("safety", options)
    node = SafetyNode(profile, transport)
    rate = node.rate = Rate(profile.safety.rate_hz)
    log.info("ready: %s, %g Hz", profile.name, profile.safety.rate_hz)
    try:
        while not rate.sleep(stop):
            node.tick()
        node.shut_down(rate, stop)
    finally:
        log.info("ended: %s, missed deadlines %d", node.filter.counts, rate.missed_deadlines)
        transport.close()


if __name__ == "__main__":
    run_process(main, arguments("The safety filter between policy and robot."))
