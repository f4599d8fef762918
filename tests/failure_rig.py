"""A robot, a safety process and a policy on a memory bus under virtual time, and what the arm did meanwhile.

`ROWS` is the failure table: what can go wrong while a policy drives an arm. Each row has at least one test named after
it, on `memory` (tests/test_failures_memory.py) or over DDS with real processes (tests/test_failures_dds.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bridge_fixtures import JOINTS, Clock, tiny_profile, write_bundle, write_scene

from embodied.policies.bundle import load_policy
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.messages import Trajectory
from embodied.robot_bridge.mujoco_robot import MujocoRobot
from embodied.robot_bridge.policy_node import PolicyNode
from embodied.robot_bridge.qos import CLOCK, COMMAND, DEFAULT, EVENTS, LATCHED
from embodied.robot_bridge.robot_log import RobotRecord, read_robot_log
from embodied.robot_bridge.robot_options import RobotOptions
from embodied.robot_bridge.safety_node import SafetyNode
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

# Row of the failure table -> where it must be tested, and what the arm does.
ROWS: dict[str, tuple[str, str]] = {
    "joint_states_stale": ("memory, dds", "HOLD, braking without feedback; STOPPED after joint_stop"),
    "image_stale": ("memory", "the policy falls silent; its chunk runs out; HOLD"),
    "policy_killed": ("dds", "HOLD when the chunk has run out; a new policy process needs `run`"),
    "policy_hung": ("dds", "HOLD when the chunk has run out; a policy that wakes late needs `run`"),
    "safety_killed": ("dds", "the trajectory controller brings the arm to rest within the horizon"),
    "robot_killed": ("dds", "STOPPED"),
    "malformed_chunk": ("memory", "the whole chunk is refused; HOLD"),
    "nan_in_unused_fields": ("memory", "accepted"),
    "jump_between_chunks": ("memory", "clamped and smoothed; HOLD when it does not end"),
    "late_chunk": ("memory", "refused"),
    "duplicate_or_reordered_chunk": ("memory", "ignored"),
    "clock_skew": ("memory", "refused"),
    "clock_jumps_back": ("memory", "HOLD with empty buffers"),
    "clock_stops": ("memory", "HOLD"),
    "qos_mismatch": ("memory, dds", "arming is refused, both profiles named"),
    "missing_subscriber": ("memory", "arming is refused"),
    "two_command_publishers": ("memory", "arming is refused; STOPPED while running"),
    "deadman": ("memory", "HOLD within deadman_timeout, then at rest"),
    "estop": ("memory", "ESTOP, latched; an old `run` does not resume"),
    "tracking_error": ("memory", "HOLD, then STOPPED"),
    "contact": ("memory", "HOLD, then STOPPED"),
    "limits_file": ("memory", "refused before anything starts"),
    "malformed_cdr": ("memory", "dropped; counts as silence"),
    "recorder_disk_full": ("dds", "an event; the control goes on"),
    "recorder_slow": ("dds", "the control goes on"),
    "gil_hog": ("dds", "the safety process is as punctual as without"),
    "rclpy_missing": ("memory", "a clear message; `auto` takes Cyclone DDS"),
    "ctrl_c": ("dds", "the arm brakes; the command ends with 0 and its report"),
}

TICK = 0.01  # [s]
MOVING, STILL = 0.25, 0.03  # [rad/s]


def assert_record_within(record: RobotRecord, limits: Limits) -> None:
    """Positions in the box and speeds below the limit, asked for and measured, in every control step."""
    steps = np.diff(record.time)
    assert len(steps) > 100
    # A trajectory controller starts a message in the control period after its arrival and joins the points by
    # splines: what it asks of the servos swings about the points that were sent.
    for values, slack in ((record.position, 0.02), (record.command, 1e-3)):
        assert (values >= limits.low - slack).all()
        assert (values <= limits.high + slack).all()
    asked = np.abs(np.diff(record.command, axis=0)) / steps[:, None]
    assert (asked <= limits.velocity * 1.4 + 0.02).all(), asked.max(0)
    measured = np.abs(record.velocity)
    assert (measured <= limits.velocity * 1.15 + 0.02).all(), measured.max(0)


class ScriptedPolicy:
    """Chunks at 10 Hz that turn the shoulder at `speed`; tests break them with `change`."""

    def __init__(self, transport: MemoryTransport, clock: Clock, stamp: Callable[[], int], speed: float = 0.5) -> None:
        self._publisher = transport.publisher("/bridge/chunk", m.JOINT_TRAJECTORY, COMMAND)
        self._clock, self._stamp, self.speed = clock, stamp, speed
        self.change: Callable[[Trajectory], Trajectory | None] = lambda chunk: chunk
        self.sequence, self._due, self._target = 0, 0.0, np.zeros(3)
        self.run = "r"

    def start(self, position: np.ndarray) -> None:
        """A new run from where the arm stands."""
        self.sequence, self.run = 0, self.run + "+"
        self.go_on(position)

    def go_on(self, position: np.ndarray) -> None:
        """The same run from where the arm stands."""
        self._target, self._due = position.copy(), self._clock.seconds

    def step(self) -> None:
        if self._clock.seconds < self._due - 1e-6:
            return
        self._due += 0.1
        self.sequence += 1
        step = np.array([0.1 * self.speed, 0.0, 0.0])
        rows = self._target + step * np.arange(1, 4)[:, None]
        self._target = rows[0]
        frame = f"policy:{self.run}:{self.sequence}"
        times = 0.1 * np.arange(1, 4)
        chunk = self.change(Trajectory(self._stamp(), frame, JOINTS, times, rows))
        if chunk is not None:
            self.send(chunk)

    def send(self, chunk: Trajectory) -> None:
        self._publisher.write(m.joint_trajectory(chunk))


class Rig:
    """Everything in one process: `run(seconds)` lets virtual time pass.

    Attributes:
        rows: where the arm was at each tick: time [s], positions (3,), velocities (3,), what the servos had to do (3,).
        states: (time, state, reason) as the safety process said them.
    """

    def __init__(self, folder: Path, camera_policy: bool = False, sim_time: bool = False, **profile: Any) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        self.profile = tiny_profile(folder, **profile)
        self.limits = self.profile.read_limits()
        self.arm = SimulatedArm(load_scene(write_scene(folder)))
        clocks = self.clock.monotonic, self.clock.stamp
        self._sim_ns = 0
        if sim_time:
            self.transport("clock").subscriber("/clock", m.CLOCK, CLOCK, self._on_clock)
        stamp = (lambda: self._sim_ns) if sim_time else self.clock.stamp
        now = (lambda: self._sim_ns * 1e-9) if sim_time else self.clock.monotonic
        self._log = folder / "robot.log"
        options = RobotOptions(log=self._log, use_sim_time=sim_time)
        self.robot = MujocoRobot(self.arm, self.profile, self.transport("mujoco_robot"), *clocks, options)
        self.safety: SafetyNode | None = SafetyNode(
            self.profile, self.transport("safety"), now, stamp, sim_time=sim_time, wall=self.clock.monotonic
        )
        self.policy: ScriptedPolicy | None = ScriptedPolicy(self.transport("script"), self.clock, stamp)
        self.camera_policy: PolicyNode | None = None
        if camera_policy:
            self.policy = None
            bundle = load_policy(write_bundle(folder / "bundle", np.array([0.5, 0.0, 0.9])))
            self.camera_policy = PolicyNode(bundle, self.profile, self.transport("policy"), self.clock.stamp)
        operator = self.transport("operator")
        self._mode = operator.publisher("/bridge/mode", m.STRING, DEFAULT)
        self._estop = operator.publisher("/bridge/estop", m.BOOL, COMMAND)
        self._deadman = operator.publisher("/bridge/deadman", m.BOOL, COMMAND)
        self._fault = operator.publisher("/sim/fault", m.STRING, DEFAULT)
        self.deadman: bool | None = None  # None: silent
        self.estop_heartbeat = False
        self.counts: dict[str, str] = {}
        self.states: list[tuple[float, str, str]] = []
        self.events: list[str] = []
        self.rows: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
        operator.subscriber("/bridge/state", m.DIAGNOSTIC_ARRAY, LATCHED, self._on_state)
        operator.subscriber("/bridge/event", m.STRING, EVENTS, lambda d, _: self.events.append(m.read_string(d)))

    def transport(self, node: str) -> MemoryTransport:
        return MemoryTransport(self.bus, node)

    def _on_clock(self, data: bytes, _: int) -> None:
        self._sim_ns = m.read_clock(data)

    def _on_state(self, data: bytes, _: int) -> None:
        values = m.read_diagnostics(data)
        self.counts = values
        if not self.states or self.states[-1][1:] != (values["state"], values["reason"]):
            self.states.append((self.clock.seconds, values["state"], values["reason"]))

    @property
    def now(self) -> float:
        return self.clock.seconds

    @property
    def state(self) -> str:
        return self.states[-1][1]

    @property
    def reason(self) -> str:
        return self.states[-1][2]

    def entered(self, state: str, since: float) -> float:
        """Seconds from `since` until the safety process said that it is in `state`."""
        times = [t for t, name, _ in self.states if name == state and t >= since]
        assert times, f"never {state}: {self.states}"
        return times[0] - since

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.clock.seconds += TICK
            if self.deadman is not None and round(self.clock.seconds / TICK) % 5 == 0:
                self._deadman.write(m.boolean(self.deadman))
            if self.estop_heartbeat and round(self.clock.seconds / TICK) % 10 == 0:
                self.press_estop(False)
            self.robot.tick()
            if self.safety is not None and self.safety.due():
                self.safety.tick()
            if self.policy is not None:
                self.policy.step()
            if self.camera_policy is not None and self.camera_policy.wake.is_set():
                self.camera_policy.step()
            position, velocity = self.arm.joint_state()
            shoulder, elbow, finger = self.arm.data.ctrl[:3]
            self.rows.append((self.clock.seconds, position, velocity, np.array([shoulder, elbow, 2 * finger])))

    def hang(self, seconds: float) -> np.ndarray:
        """The robot's process stands still for so long; of what was sent meanwhile it gets the newest when it wakes.

        Returns:
            (3,) how far the command has got ahead of it [rad, m].
        """
        assert self.safety is not None
        tick, self.robot.tick = self.robot.tick, lambda: None  # type: ignore[method-assign]
        self.run(seconds)
        self.robot.tick = tick  # type: ignore[method-assign]
        inbox = self.robot._inbox
        topic, data, _ = inbox[-1]
        inbox.clear()
        inbox.append((topic, data, self.clock.monotonic_ns()))
        assert self.safety.filter.motion is not None
        return self.safety.filter.motion.position - self.arm.joint_state()[0]

    def request(self, mode: str) -> None:
        self._mode.write(m.string(mode))
        self.run(0.03)

    def press_estop(self, pressed: bool) -> None:
        self._estop.write(m.boolean(pressed))

    def inject(self, fault: str, **fields: Any) -> None:
        self._fault.write(m.json_string({"fault": fault, **fields}))

    def moving(self) -> "Rig":
        """Arm, run, and let the shoulder come up to speed."""
        self.run(0.2)
        self.request("arm")
        assert self.state == "ARMED", self.states
        if self.policy is not None:
            self.policy.start(self.arm.joint_state()[0])
        self.request("run")
        self.run(0.8)
        assert self.state == "RUNNING", self.states
        assert self.speed > MOVING
        return self

    # ---- what the arm did

    @property
    def speed(self) -> float:
        """Of the fastest arm joint now [rad/s]."""
        return float(np.abs(self.rows[-1][2][:2]).max())

    def still_after(self, since: float) -> float:
        """Seconds from `since` to the last moment at which an arm joint moved."""
        moving = [t - since for t, _, velocity, _ in self.rows if t > since and np.abs(velocity[:2]).max() >= STILL]
        return max(moving, default=0.0)

    def distance_after(self, since: float) -> float:
        """How far the shoulder got after `since` [rad]."""
        angles = [position[0] for t, position, _, _ in self.rows if t >= since]
        return float(np.abs(np.array(angles) - angles[0]).max())

    def assert_within_limits(self) -> None:
        """Positions in the box and speeds below the limit, asked for and measured, in every control step of the log.

        The last thing a test does: it ends the robot.
        """
        self.robot.close()
        assert_record_within(read_robot_log(self._log), self.limits)
