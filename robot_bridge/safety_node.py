"""The only process that commands the robot; `python -m embodied.robot_bridge.safety_node --profile NAME`.

in   /bridge/chunk           JointTrajectory   targets from the policy, stamped with the observation's stamp
in   <topics.joint_states>   JointState        and <gripper.joint_states>, if the gripper's come by themselves
in   /bridge/mode            String            arm | run | hold | stop | reset; services ~/arm ... ~/reset do the same
in   /bridge/estop           Bool              true latches ESTOP; silence does too (if safety.estop_required)
in   <topics.deadman>        Bool or Joy       held, at >= 10 Hz (if safety.deadman_required)
out  <topics.command>        by the adapter    see adapters.py: what the arm does if this process dies
out  /bridge/command         JointTrajectory   one point: the command sent, at the time it is due; frame_id names
                                               the chunk behind it, or the state; shadow:... if nothing was sent
out  /bridge/state           DiagnosticArray   10 Hz and at every change; latched. /diagnostics: the same at 1 Hz
out  /bridge/event           String (JSON)     state changes and refusals; latched, 100 deep

This is software, not a rated safety function: it stands behind the robot's own limits and a physical stop.
"""

import argparse
import collections
import contextlib
import functools
import logging
import operator
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapters import Nobody, RobotCommands
from embodied.robot_bridge.command_messages import outcome, read_joy
from embodied.robot_bridge.joint_merge import JointMerge
from embodied.robot_bridge.machine import Cause
from embodied.robot_bridge.node import EventLog, Rate, RosTime, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, SENSOR_DATA
from embodied.robot_bridge.robot_clock import RobotClock
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick
from embodied.robot_bridge.safety_report import SafetyReport
from embodied.robot_bridge.scheduling import Collector, add_priority, raise_priority
from embodied.robot_bridge.tick_messages import ChunkReader, JointStateReader, TrajectoryWriter, read_flag

log = logging.getLogger("safety")

CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC = "/bridge/chunk", "/bridge/command", "/bridge/state"
MODE_TOPIC, ESTOP_TOPIC = "/bridge/mode", "/bridge/estop"
MODES = ("arm", "run", "hold", "stop", "reset")
SIM_POLLS = 4  # how often simulated time is looked at per tick
CLOCK_SILENCE = 1.0  # with sim time, /clock may stand still for so long on the wall clock [s]
BRAKING = 0.3  # ... and then so much time is taken to have passed [s]
LEAD = 0.001  # the next tick's plan is made so long before it is due [s]
SWITCH_INTERVAL = 0.0005  # a tick waits at most this for the thread that receives, not Python's usual 0.005 [s]
_BURST = 16  # joint states kept for a tick: after a pause the older ones of a burst are of no use
_QUEUE = 1000  # other messages kept for a tick, per topic
_RECEIVED_AT = operator.itemgetter(2)
_MALFORMED = (InputError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)


class SafetyNode:
    """The filter on a transport. Call `tick` at `safety.rate_hz`, when `due` says so.

    Args:
        clock: monotonic seconds; simulated ones with `sim_time`.
        stamp: ROS time [ns].
        shadow: run as ever, send nothing to the robot.
        sim_time: ages are on `clock`, also those of arrivals.
        wall: monotonic seconds, never simulated.
    """

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], int] = now_ns,
        shadow: bool = False,
        sim_time: bool = False,
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self._profile, self._transport, self._clock, self._stamp = profile, transport, clock, stamp
        self._shadow, self._sim_time, self._wall = shadow, sim_time, wall
        self._period, self._fingerprint = 1.0 / profile.safety.rate_hz, profile.fingerprint
        self.commands = RobotCommands(profile, Nobody() if shadow else transport)
        limits, joint_space = self.commands.limits, profile.adapter != "servo_twist"
        workspace, streaming = profile.read_workspace(), profile.adapter != "jtc"
        self.filter = SafetyFilter(
            limits,
            profile.safety,
            workspace if joint_space else None,
            shadow,
            streaming,
            gripper=profile.gripper is not None,
        )
        self._watched = workspace if not joint_space else None
        self._joints, self._arm = JointMerge(profile.all_joints), len(profile.joints)
        self._robot_clock = RobotClock()
        self._measured = np.full(len(limits.names), np.nan)  # in the filter's coordinates
        own_state = profile.gripper is not None and profile.gripper.adapter != "joint"
        self._group = self._arm if own_state else len(profile.all_joints)  # joints whose age is the arm's
        self._reader, self._writer, self._chunks = JointStateReader(), TrajectoryWriter(limits.names), ChunkReader()
        self._command = transport.publisher(COMMAND_TOPIC, messages.JOINT_TRAJECTORY, DEFAULT)
        self._events = EventLog(transport, "safety", stamp)
        self._report = SafetyReport(transport, STATE_TOPIC, profile.safety.rate_hz)
        self._lock = threading.RLock()
        # One per topic, so that a flood of joint states after a pause pushes no e-stop out.
        self._inboxes: dict[str, collections.deque[tuple[str, Any, float]]] = {}
        self._handlers = self._subscribe()
        self._serve()
        self._ticks, self._now, self._prepared = 0, clock(), False
        self._heard, self._moved_at, self._last_tick, self._fault = self._now, wall(), -np.inf, ""
        self._chunk: tuple[str, int, float] | None = None  # run, sequence, observed_at of the newest
        self._shown: tuple[str, str] = ("", "")
        self._untold: list[Callable[[], None]] = []
        self.malformed = collections.Counter[str]()
        self.rate: Rate | None = None

    # ---- what arrives: queued on the transport's thread, read in the tick

    def _subscribe(self) -> dict[str, Callable[[Any, float], Any]]:
        profile, safety = self._profile, self._profile.safety
        topics = {
            profile.topics.joint_states: (messages.JOINT_STATE, SENSOR_DATA, self._on_joint_state),
            CHUNK_TOPIC: (messages.JOINT_TRAJECTORY, COMMAND, self._on_chunk),
            MODE_TOPIC: (messages.STRING, DEFAULT, self._on_mode),
            ESTOP_TOPIC: (messages.BOOL, COMMAND, self._on_estop),
            profile.topics.deadman: (messages.BOOL, COMMAND, self._on_deadman),
        }
        if safety.deadman_button >= 0:
            topics[profile.topics.deadman] = (messages.JOY, SENSOR_DATA, self._on_joy)
        if profile.gripper and profile.gripper.joint_states:
            topics[profile.gripper.joint_states] = (messages.JOINT_STATE, SENSOR_DATA, self._on_joint_state)
        for topic, (kind, qos, handler) in topics.items():
            kept = _BURST if handler == self._on_joint_state else _QUEUE
            self._inboxes[topic] = collections.deque(maxlen=kept)
            self._transport.subscriber(topic, kind, qos, functools.partial(self._arrived, topic))
        self._inputs = tuple(topics)
        self._states = {topic for topic, (_, _, handler) in topics.items() if handler == self._on_joint_state}
        return {topic: handler for topic, (_, _, handler) in topics.items()}

    def _arrived(self, topic: str, data: bytes, received_ns: int) -> None:
        content: Any = data
        if topic == CHUNK_TOPIC:  # the longest to read; what is no chunk is refused in the tick
            with contextlib.suppress(*_MALFORMED):
                content = self._chunks.read(data)
        self._inboxes[topic].append((topic, content, self._clock() if self._sim_time else received_ns * 1e-9))

    def _take(self, later: str = "") -> None:
        """Read what has arrived, except on the topic that can wait."""
        boxes = [box for topic, box in self._inboxes.items() if box and topic != later]
        if not boxes:
            return
        arrived = [box.popleft() for box in boxes for _ in range(len(box))]
        arrived.sort(key=_RECEIVED_AT)
        heard = False
        for topic, data, at in arrived:
            if topic in self._states:
                heard |= bool(self._handle(topic, data, at))
        if heard and not self._joints.missing():
            joints = self._joints
            position, velocity = self.commands.coordinates(joints.position, joints.velocity)
            self._measured = position
            # One that took long is as old as that: an arm that follows would look like one that hung.
            self.filter.measure(position, velocity, joints.oldest(self._group) - self._robot_clock.lateness)
        for topic, data, at in arrived:
            if topic not in self._states:
                self._handle(topic, data, at)

    def _handle(self, topic: str, data: Any, received_at: float) -> Any:
        try:
            return self._handlers[topic](data, received_at)
        except _MALFORMED as error:
            self.malformed[topic] += 1
            if self.malformed[topic] <= 3:
                log.warning("%s: %s", topic, error)
                self._events.write("malformed", topic=topic, text=str(error)[:200])
            return None

    def _on_joint_state(self, data: bytes, received_at: float) -> bool:
        sample = self._reader.read(data)
        self._robot_clock.hear(sample.stamp_ns, self._stamp() - round((self._clock() - received_at) * 1e9))
        return self._joints.update(sample, received_at)

    def _on_chunk(self, data: bytes | messages.Trajectory, received_at: float) -> None:
        trajectory = messages.read_joint_trajectory(data) if isinstance(data, bytes) else data
        source, run, sequence = [*trajectory.frame_id.split(":"), "", ""][:3]
        if source != "policy" or not (sequence.isascii() and sequence.isdigit() and len(sequence) < 19):
            raise InputError(f"a chunk with frame_id '{trajectory.frame_id[:80]}'; it must be policy:<run>:<sequence>")
        now = self._clock()
        observed_at = now - (self._stamp() - trajectory.stamp_ns) * 1e-9
        chunk = Chunk(
            run, int(sequence), observed_at, received_at, trajectory.names, trajectory.times, trajectory.positions
        )
        if not self.filter.offer(chunk, now):
            self._chunk = (run, int(sequence), observed_at)

    def _on_mode(self, data: bytes, received_at: float) -> None:
        self.request(messages.read_string(data))

    def _on_estop(self, data: bytes, received_at: float) -> None:
        self.filter.set_estop(read_flag(data), received_at)

    def _on_deadman(self, data: bytes, received_at: float) -> None:
        self.filter.set_deadman(read_flag(data), received_at)

    def _on_joy(self, data: bytes, received_at: float) -> None:
        button, buttons = self._profile.safety.deadman_button, read_joy(data)[1]
        if button >= len(buttons):
            raise InputError(f"a Joy with {len(buttons)} buttons; safety.deadman_button is {button}")
        self.filter.set_deadman(bool(buttons[button]), received_at)

    # ---- services and parameters, for convenience: some peers carry no services, so nothing needs them

    def _serve(self) -> None:
        if not getattr(self._transport, "services", False):
            return
        for mode in MODES:
            self._transport.service(f"~/{mode}", messages.TRIGGER, functools.partial(self._on_service, mode))
        self._transport.parameters(parameters(self._profile), lambda name, value: f"{name} is the profile's; edit it")

    def _on_service(self, mode: str, request: bytes) -> bytes:
        del request  # a Trigger has no content
        refusal = self.request(mode)
        return outcome(not refusal, refusal or f"the state is {self.filter.state}")

    def request(self, mode: str) -> str:
        """What /bridge/mode asks for. Returns why it is refused; empty if granted. From any thread."""
        obstacle = self._obstacle() if mode == "arm" else ""
        with self._lock:
            return self.filter.request(mode, self._clock(), obstacle)

    def _obstacle(self) -> str:
        """Why the robot could not be driven; the filter adds what is wrong with how the arm stands."""
        found = []
        if missing := self._joints.missing():
            found.append(f"no joint state names {', '.join(missing)} on {self._profile.topics.joint_states}")
        speed = np.abs(self._joints.velocity[: self._arm])
        worst = int(np.argmax(speed))
        if speed[worst] > self._profile.safety.arm_max_velocity:
            found.append(f"{self._joints.names[worst]} moves at {speed[worst]:.3f} rad/s")
        if not self._shadow:
            found += [line for line in self._transport.problems() if line.split(":")[0] in self._inputs]
            found.append(self.commands.obstacle())
        return "; ".join(filter(None, found))

    # ---- the tick

    def due(self) -> bool:
        """Whether it is time for a tick: with sim time, only when that has moved on, or has stood still too long."""
        if not self._sim_time:
            return True
        now = self._clock()
        since = now - self._last_tick
        if since >= self._period or since < 0:
            self._last_tick = now if not 0 <= since < 1 else now - since % self._period
            return True
        return self._clock_stands_still()

    def tick(self, later: bool = False) -> Tick:
        """Take what arrived, decide, send.

        Args:
            later: leave telling others of it to `between_ticks`, unless something happened.
        """
        started = time.perf_counter()
        if not self._sim_time:  # simulated time comes in steps
            self._report.lateness.started(self._clock())
        with self._lock:
            tick = self._tick(started)
        if not later or tick.events:
            self._tell()
        self._report.tick_cost.add(time.perf_counter() - started)
        return tick

    def between_ticks(self) -> None:
        """What can be done while there is time until the next tick."""
        self._tell()
        self._report.between_ticks()

    def prepare(self) -> None:
        """Shortly before a tick: read what has arrived by now and plan, so that less is left to do when it is due."""
        if not self._sim_time:
            with self._lock:
                self._take()
                if plan := self.filter.prepare():
                    self.commands.expect(plan)
                self._prepared = True

    def _tick(self, started: float) -> Tick:
        now = self._follow_clock()
        # A chunk that comes after `prepare` is for the next tick: to plan with it now would hold this one up.
        self._take(CHUNK_TOPIC if self._prepared else "")
        self._prepared = False
        self._watch(now)
        tick = self.filter.tick(now)
        stamp = self._stamp()
        gripper_age, agrees = now - self._joints.heard_at[-1], self._robot_clock.agrees
        if self.commands.send(tick, self._measured, gripper_age, now, stamp, agrees):
            self._report.command_cost.add(time.perf_counter() - started)
            self._untold.append(functools.partial(self._mirror, tick, now, stamp))
        for text in tick.events:
            self._events.write("safety", text=text)
        if late := self._report.lateness.verdict():
            self._events.write("late", text=late)
        due, shown = self._report.due(), (tick.state, tick.reason)
        if tick.events or due or shown != self._shown:
            self._untold.append(functools.partial(self._publish_state, tick, now, stamp))
        self._shown, self._ticks = shown, self._ticks + 1
        return tick

    def _tell(self) -> None:
        """Publish what the last ticks left to be told."""
        while self._untold:
            self._untold.pop(0)()

    def _follow_clock(self) -> float:
        """The present; notices a clock that jumped back, and a simulated one that stands still."""
        now, wall = self._clock(), self._wall()
        if now != self._heard:
            self._heard, self._moved_at = now, wall
        if self._clock_stands_still():
            # The controller went on to the end of what it had been sent, and so does the path: resuming where the clock
            # stopped would pull the arm back. Joint states need not become too old for a HOLD.
            now += min(wall - self._moved_at, BRAKING)
        if now < self._now - 1e-3:
            self._joints.forget()
            self._robot_clock.forget()
            self.filter.clock_jumped(now)
            self._events.write("clock_jumped", seconds=now - self._now)
        self._now = now
        return now

    def _clock_stands_still(self) -> bool:
        return self._sim_time and self._wall() - self._moved_at > CLOCK_SILENCE

    def _watch(self, now: float) -> None:
        """Faults that the filter cannot see."""
        if self._clock_stands_still() and self.filter.state in (State.ARMED, State.RUNNING):
            self.filter.hold(Cause.CLOCK, f"{self._profile.topics.clock} stands still", now)
        active = self.filter.state in (State.ARMED, State.RUNNING, State.HOLD)
        every_second = self._ticks % round(self._profile.safety.rate_hz) == 0
        if every_second and self.filter.state is State.INACTIVE and not self._shadow:
            self.commands.prepare()
        if active and every_second and (rival := self.commands.rival()):
            self.filter.stop(Cause.RIVAL, rival, now)
        running = self.filter.state is State.RUNNING
        if self._watched and running and (outside := self._watched.outside(self._joints.position)):
            self.filter.hold(Cause.WORKSPACE, outside, now)
        if self.commands.gripper_fault != self._fault:
            self._fault = self.commands.gripper_fault
            if self._fault:
                self._events.write("gripper", text=self._fault)

    def _mirror(self, tick: Tick, now: float, stamp_ns: int) -> None:
        """What was sent, for the recorder."""
        frame = f"policy:{tick.chunk[0]}:{tick.chunk[1]}" if tick.chunk else tick.state.lower()
        if tick.chunk and self._chunk and tick.chunk == self._chunk[:2]:
            self._report.observation_to_command.add(now - self._chunk[2])
            self._chunk = None
        if tick.plan is not None:
            first = (tick.plan.times[:1], tick.plan.positions[:1], tick.plan.velocities[:1])
        else:
            assert tick.motion is not None
            first = (np.zeros(1), tick.motion.position[None], tick.motion.velocity[None])
        frame = f"shadow:{frame}" if self._shadow else frame
        self._command.write(self._writer.encode(stamp_ns, frame, *first))

    def _publish_state(self, tick: Tick, now: float, stamp_ns: int) -> None:
        ages = self.filter.ages(now)
        if self._profile.gripper:
            ages["gripper"] = now - float(self._joints.heard_at[-1])
        values: dict[str, Any] = {
            **self.filter.counts,
            "profile": self._fingerprint,
            "adapter": self._profile.adapter,
            "malformed": self.malformed.total(),
            "missed_deadlines": self.rate.missed_deadlines if self.rate else 0,
        }
        values |= {"shadow": "true"} if self._shadow else {}
        values |= {"gripper": self.commands.gripper_fault} if self.commands.gripper_fault else {}
        self._report.publish(stamp_ns, tick.state, tick.reason, ages, values)

    def shut_down(self, rate: Rate) -> None:
        """Decelerate and hold before leaving; as long as that takes, and no more than twice as long."""
        self.request("stop")
        end = self._wall() + 1.0 + min(2 * self.commands.brake_time, 2.0)
        try:
            while self._wall() < end:
                tick = self.tick()
                if tick.motion is None or tick.motion.at_rest:
                    break
                time.sleep(rate.period)
        finally:
            self.commands.leave(self._stamp())


def parameters(profile: Profile) -> dict[str, bool | int | float | str | list[str]]:
    """The configuration as ROS parameters, read-only."""
    safety = {f"safety.{key}": value for key, value in vars(profile.safety).items()}
    more = {
        "profile": profile.name,
        "joints": list(profile.joints),
        "adapter": profile.adapter,
        "limit_scale": profile.limit_scale,
        "position_margin": profile.position_margin,
        "topics.joint_states": profile.topics.joint_states,
        "topics.command": profile.topics.command,
    }
    return more | safety


def run(node: SafetyNode, rate: Rate, stop: Stop) -> None:
    """Tick until told to end; on any exception bring the arm to rest before it is passed on."""
    try:
        with Collector() as collector:
            while not rate.sleep(stop, node.prepare, LEAD):
                if node.due():
                    node.tick(later=True)
                node.between_ticks()
                collector.between_ticks()
    except BaseException:
        log.exception("the safety process fails; the arm is brought to rest")
        node.shut_down(rate)
        raise
    node.shut_down(rate)


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    transport = open_transport("safety", options)
    sys.setswitchinterval(SWITCH_INTERVAL)
    ros_time = RosTime(transport, options.use_sim_time, profile.topics.clock)
    node = SafetyNode(profile, transport, ros_time.seconds, ros_time.now_ns, options.shadow, options.use_sim_time)
    rate = node.rate = Rate(profile.safety.rate_hz * (SIM_POLLS if options.use_sim_time else 1))
    log.info("ready: %s, %g Hz, %s", profile.name, profile.safety.rate_hz, raise_priority(options.priority))
    for note in node.commands.limits.notes:
        log.info("limits: %s", note)
    try:
        run(node, rate, stop)
    finally:
        log.info("ended: %s, missed deadlines %d", node.filter.counts, rate.missed_deadlines)
        transport.close()


if __name__ == "__main__":
    parser = arguments("The safety filter between policy and robot.")
    parser.add_argument("--shadow", action="store_true", help="run as ever, send nothing to the robot")
    add_priority(parser)
    run_process(main, parser)
