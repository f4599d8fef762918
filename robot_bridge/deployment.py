"""The processes of one deployment and the operator beside them.

    robot (MuJoCo, or one that is on the graph already) <- safety <- policy       recorder

Each can be started singly as well, `python -m embodied.robot_bridge.<module> --help`: `policy_node`, `safety_node`,
`mujoco_robot`, `recorder`.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError, InputError, SafetyError
from embodied.policies.bundle import PolicyContract
from embodied.robot_bridge import messages
from embodied.robot_bridge.node import EVENT_TOPIC, EventLog, RosTime, open_transport
from embodied.robot_bridge.preflight import Check, check
from embodied.robot_bridge.preflight_facts import collect
from embodied.robot_bridge.processes import Child, free_domain, profile_at_speed
from embodied.robot_bridge.profile import load_profile, profile_path
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST
from embodied.robot_bridge.robot_options import POSE_PREFIX, RESET_TOPIC, STATUS_TOPIC
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, MODE_TOPIC, STATE_TOPIC
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.switches import hold_the_switches

START_TIMEOUT, STEP_TIMEOUT = 60.0, 10.0  # [s]
_ROBOT_TIMEOUT = 5.0  # for a robot that is on the graph already; preflight says what is missing [s]
_REST_TIMEOUT = 1.0  # [s]
_SETTLE = 0.05  # after a reset every process has seen joint states newer than it [s]
_POLL = 0.02  # [s]
Success = Callable[[Mapping[str, np.ndarray]], bool]


@dataclasses.dataclass(frozen=True)
class EpisodeOutcome:
    """What one episode on the robot came to.

    Attributes:
        success: the rule's verdict, or None without a rule.
        steps: chunks the policy sent.
        duration_s: from the first chunk to the end [s].
        end: `success`, `horizon`, `interrupted`, or what the safety process stopped for.
        bag: folder of the recording, or None.
    """

    index: int
    success: bool | None
    steps: int
    duration_s: float
    end: str
    bag: str | None


class Deployment:
    """The running processes; a context manager.

    Args:
        bundle, profile, scene, record, domain, discovery, log_folder, transport, shadow, speed, use_sim_time, goal: as
            `run_deployment`.

    Attributes:
        state: the safety process's last words, by name.
        poses: ground truth of a simulated scene, name -> (7,) position [m] and quat_xyzw.
        contract: the bundle's, as the policy process loaded it.
        robot_log: where a simulated robot writes what the arm did, control step by control step; None without a
            `log_folder`.
        poll: called about 50 times a second while an episode runs, for a view.
    """

    def __init__(
        self,
        bundle: str | Path,
        profile: str | Path = "panda-mujoco",
        scene: str | Path | None = None,
        record: str | Path | None = None,
        domain: int | None = None,
        discovery: str = "localhost",
        log_folder: str | Path | None = None,
        transport: str = "auto",
        shadow: bool = False,
        speed: float | None = None,
        use_sim_time: bool = False,
        goal: str | Path | None = None,
    ) -> None:
        self.goal = goal
        self.bundle, self.record = Path(bundle), Path(record) if record is not None else None
        if not self.bundle.is_dir():
            raise InputError(f"{self.bundle} is no policy bundle.")
        self.robot_log = Path(log_folder) / "robot.log" if log_folder else None
        self.log_folder = Path(log_folder or tempfile.mkdtemp(prefix="embodied-deploy-"))
        self.log_folder.mkdir(parents=True, exist_ok=True)
        path = profile_at_speed(profile, speed, self.log_folder) if speed is not None else profile_path(profile)
        self.profile = load_profile(path)
        self.scene = load_scene(scene) if scene is not None else None
        self.domain = free_domain() if domain is None else domain
        self.shadow, self.use_sim_time = shadow, use_sim_time
        self.state: dict[str, str] = {}
        self.poses: dict[str, np.ndarray] = {}
        self.contract: dict[str, Any] | None = None
        self.run_chunks = 0
        self.observation_to_chunk_s: list[float] = []
        self.observation_to_command_s: list[float] = []
        self.poll: Callable[[], None] = lambda: None
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._switches: threading.Thread | None = None
        self._status: dict[str, Any] = {}
        self._recorder_said: dict[str, str] = {}
        self._joint_stamp_ns, self._joint_speed = 0, 0.0
        self._chunk_stamps: dict[str, int] = {}
        self._commanded: set[str] = set()
        self._options = argparse.Namespace(
            transport=transport, domain=self.domain, discovery=discovery, use_sim_time=use_sim_time, namespace="/"
        )
        self._common_flags = ["--profile", str(path), "--domain", str(self.domain), "--discovery", discovery]
        self._common_flags += ["--transport", transport] if transport != "auto" else []
        self._common_flags += ["--use-sim-time"] if use_sim_time else []
        self._flags: dict[str, list[str]] = {}
        self.children: dict[str, Child] = {}
        self.transport = open_transport("operator", self._options)
        self._time = RosTime(self.transport, use_sim_time, self.profile.topics.clock)
        self._subscribe()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        more: dict[str, list[str]] = {"policy_node": ["--bundle", str(self.bundle)]}
        more["policy_node"] += ["--goal", str(self.goal)] if self.goal else []
        more["safety_node"] = ["--shadow"] if self.shadow else []
        if self.scene is not None:
            more["mujoco_robot"] = ["--scene", str(self.scene.xml.parent)]
            more["mujoco_robot"] += ["--log", str(self.robot_log)] if self.robot_log else []
            arguments = (self.profile, self.transport, self._time.now_ns, self._closing)
            self._switches = threading.Thread(target=hold_the_switches, args=arguments, name="switches", daemon=True)
            self._switches.start()
        if self.record is not None:
            poses = [*self.scene.bodies, *self.scene.sites] if self.scene is not None else []
            more["recorder"] = ["--out", str(self.record), "--poses", *poses]
        for module, flags in more.items():
            self._flags[module] = [*self._common_flags, *flags]
            self.children[module] = Child(module, self._flags[module], self.log_folder)
        self._await_ready()

    def restart(self, module: str) -> None:
        """End one of the processes, if it has not ended, and start it anew (`policy_node`, `safety_node`, ...)."""
        self.children[module].end()
        if module == "policy_node":
            self.contract = None
        elif module == "safety_node":
            self.state = {}
        self.children[module] = Child(module, self._flags[module], self.log_folder)
        self._await_ready()

    def _await_ready(self) -> None:
        self._await(lambda: self.contract is not None, START_TIMEOUT, "the policy process to load its bundle")
        self._await(lambda: "state" in self.state, START_TIMEOUT, "the safety process")
        joints = f"joint states on {self.profile.topics.joint_states}"
        if self.scene is not None:
            self._await(lambda: self._joint_stamp_ns > 0, START_TIMEOUT, joints)
            self._await(lambda: self._reset.matched > 0, START_TIMEOUT, "the robot process to take resets")
        else:
            with contextlib.suppress(SafetyError):
                self._await(lambda: self._joint_stamp_ns > 0, _ROBOT_TIMEOUT, joints)
        if self.record is not None:
            self._await(self._recorder_ready, START_TIMEOUT, "the recorder")

    def _recorder_ready(self) -> bool:
        return self._events.matched >= 2  # the recorder's subscription and our own

    def _subscribe(self) -> None:
        transport = self.transport
        self._mode = transport.publisher(MODE_TOPIC, messages.STRING, DEFAULT)
        self._reset = transport.publisher(RESET_TOPIC, messages.STRING, DEFAULT)
        self._events = EventLog(transport, "operator", self._time.now_ns)
        transport.subscriber(EVENT_TOPIC, messages.STRING, EVENTS, self._on_event)
        transport.subscriber(STATE_TOPIC, messages.DIAGNOSTIC_ARRAY, LATCHED, self._on_state)
        transport.subscriber(STATUS_TOPIC, messages.STRING, LATCHED, self._on_status)
        transport.subscriber(self.profile.topics.joint_states, messages.JOINT_STATE, LATEST, self._on_joint_state)
        transport.subscriber(CHUNK_TOPIC, messages.JOINT_TRAJECTORY, COMMAND, self._on_chunk)
        transport.subscriber(COMMAND_TOPIC, messages.JOINT_TRAJECTORY, DEFAULT, self._on_command)
        for name in [*self.scene.bodies, *self.scene.sites] if self.scene is not None else []:
            transport.subscriber(
                POSE_PREFIX + name, messages.POSE_STAMPED, LATEST, lambda data, _, name=name: self._on_pose(name, data)
            )

    # ---- what arrives, on the transport's thread

    def _on_event(self, data: bytes, _: int) -> None:
        event = messages.read_json(data)
        if event["event"] == "policy_ready":
            self.contract = event["contract"]
        elif event["event"] in ("recording", "recorded", "recording_failed"):
            self._recorder_said[event.get("bag", "")] = event["event"]

    def _on_state(self, data: bytes, _: int) -> None:
        self.state = messages.read_diagnostics(data)

    def _on_status(self, data: bytes, _: int) -> None:
        self._status = messages.read_json(data)

    def _on_pose(self, name: str, data: bytes) -> None:
        self.poses = self.poses | {name: messages.read_pose_stamped(data)[1]}

    def _on_joint_state(self, data: bytes, _: int) -> None:
        sample = messages.read_joint_state(data)
        arm = [k for k, name in enumerate(sample.names) if name in self.profile.joints]
        if arm:  # not a gripper's message of its own
            self._joint_stamp_ns, self._joint_speed = sample.stamp_ns, float(np.abs(sample.velocity[arm]).max())

    def _on_chunk(self, data: bytes, received_ns: int) -> None:
        chunk = messages.read_joint_trajectory(data)
        arrived_ns = self._time.now_ns() - (time.monotonic_ns() - received_ns)
        with self._lock:
            self._chunk_stamps[chunk.frame_id] = chunk.stamp_ns
            self.observation_to_chunk_s.append((arrived_ns - chunk.stamp_ns) * 1e-9)
            self.run_chunks += 1

    def _on_command(self, data: bytes, _: int) -> None:
        command = messages.read_joint_trajectory(data)
        with self._lock:
            observed_ns = self._chunk_stamps.get(command.frame_id)
            if observed_ns is not None and command.frame_id not in self._commanded:
                self._commanded.add(command.frame_id)
                self.observation_to_command_s.append((command.stamp_ns - observed_ns) * 1e-9)

    # ---- what the operator does

    def _await(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            for child in self.children.values():
                child.check()
            if time.monotonic() > end:
                state = f" Safety: {self.state.get('state')}, {self.state.get('reason')}." if self.state else ""
                raise SafetyError(f"No sign of {what} within {timeout:g} s.{state}\nLogs: {self.log_folder}")
            time.sleep(_POLL)

    def preflight(self) -> list[Check]:
        """Compare bundle and profile with the live graph; takes about two seconds and sends nothing."""
        assert self.contract is not None
        transport = open_transport("preflight", self._options)
        try:
            facts = collect(
                self.profile,
                PolicyContract.from_json(self.contract),
                transport,
                bundle=str(self.bundle),
                simulated=self.scene is not None,
                sim_time=self.use_sim_time,
                stamp=RosTime(transport, self.use_sim_time, self.profile.topics.clock).now_ns,
            )
        finally:
            transport.close()
        return check(facts)

    def request(self, mode: str, wanted: str, timeout: float = STEP_TIMEOUT) -> None:
        """Publish a mode, again every half second, until the safety process reports the state `wanted`."""
        last = -np.inf

        def reached() -> bool:
            nonlocal last
            if self.state.get("state") == wanted:
                return True
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                self._mode.write(messages.string(mode))
            return False

        self._await(reached, timeout, f"the state {wanted} after '{mode}'")

    def reset(self, state: Mapping[str, Sequence[float]] | None) -> None:
        """Put robot and scene into `state` (qpos, qvel, ctrl; None: the scene's own), safety INACTIVE."""
        if self.state.get("state") not in ("INACTIVE", "STOPPED", "ESTOP"):
            self.request("stop", "STOPPED")
        self.request("reset", "INACTIVE")
        if self.scene is None:
            return
        identifier = f"{os.getpid()}-{time.monotonic_ns()}"
        values = {key: [float(x) for x in value] for key, value in (state or {}).items()}
        wish, last = messages.json_string({"id": identifier, **values}), -np.inf

        def answered() -> bool:
            nonlocal last
            if self._status.get("reset") == identifier:
                return True
            if time.monotonic() - last > 1.0:  # again, for a robot that was restarted and is only now discovered
                last = time.monotonic()
                self._reset.write(wish)
            return False

        self._await(answered, STEP_TIMEOUT, "the reset of the simulation")
        since = self._time.now_ns() + round(_SETTLE * 1e9)
        self._await(lambda: self._joint_stamp_ns > since, STEP_TIMEOUT, "joint states after the reset")

    def run_episode(
        self,
        index: int,
        state: Mapping[str, Sequence[float]] | None,
        horizon_s: float,
        success: Success | None,
        instruction: str = "",
    ) -> EpisodeOutcome:
        """Reset, arm, run until success, the horizon, a stop or Ctrl-C; leave the arm STOPPED."""
        self.reset(state)
        bag = f"episode_{index:04d}" if self.record is not None else None
        about = {"episode": index, "instruction": instruction, "profile": self.profile.name, "bag": bag or ""}
        self._events.write("episode_start", **about, contract=self.contract)
        if bag:
            self._await(lambda: self._recorder_said.get(bag) is not None, STEP_TIMEOUT, "the recorder to open a bag")
            if self._recorder_said[bag] != "recording":
                raise EmbodiedError(f"The recorder could not open {self.record}/{bag}.\nLogs: {self.log_folder}")
        with self._lock:
            self.run_chunks = 0
        end, seconds = "interrupted", 0.0
        started = time.monotonic()
        try:
            self.request("arm", "ARMED")
            self.request("run", "RUNNING")
            end, seconds = self._watch(horizon_s, success)
        except KeyboardInterrupt:
            seconds = time.monotonic() - started
        with _uninterrupted():
            verdict = None if success is None else end == "success"
            if self.state["state"] not in ("STOPPED", "ESTOP", "INACTIVE"):
                self.request("stop", "STOPPED")
            self._await_rest()
            self._events.write("episode_end", **about, success=verdict, end=end, duration_s=seconds)
            if bag:
                self._await(lambda: self._recorder_said.get(bag) != "recording", STEP_TIMEOUT, "the recorder to finish")
        path = str(self.record / bag) if self.record is not None and bag else None
        return EpisodeOutcome(index, verdict, self.run_chunks, seconds, end, path)

    def _await_rest(self) -> None:
        """Until the arm stands still, so that a recording shows it; an arm that does not is not waited for."""
        end = time.monotonic() + _REST_TIMEOUT
        while self._joint_speed > self.profile.safety.arm_max_velocity and time.monotonic() < end:
            time.sleep(_POLL)

    def _watch(self, horizon_s: float, success: Success | None) -> tuple[str, float]:
        """How the running episode ended, and how long after its first chunk."""
        started = time.monotonic()
        first: float | None = None
        held_since: float | None = None
        while True:
            time.sleep(_POLL)
            self.poll()
            now = time.monotonic()
            if first is None and self.run_chunks:
                first = now
            seconds = now - first if first is not None else 0.0
            if success is not None and self.poses and first is not None and success(self.poses):
                return "success", seconds
            if seconds >= horizon_s:
                return "horizon", seconds
            state, reason = self.state["state"], self.state.get("reason", "")
            if state in ("STOPPED", "ESTOP", "INACTIVE"):
                return f"{state}: {reason}", seconds
            held_since = (held_since or now) if state == "HOLD" else None
            if held_since is not None and now - held_since > self.profile.safety.hold_resume + 0.5:
                return f"HOLD: {reason}", seconds
            if first is None and now - started > self.profile.safety.first_chunk_timeout + STEP_TIMEOUT:
                return "no chunk from the policy", seconds
            for child in self.children.values():
                if child.process.poll() is not None:
                    return f"the {child.name} process ended", seconds

    def latencies(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Observation to chunk, observation to command, of every chunk so far [s]."""
        with self._lock:
            return tuple(self.observation_to_chunk_s), tuple(self.observation_to_command_s)

    def close(self) -> None:
        """Stop the arm, then end every process: policy, safety (which brakes first), recorder, robot."""
        with _uninterrupted():
            if self.state.get("state") in ("ARMED", "RUNNING", "HOLD"):
                self._mode.write(messages.string("stop"))
            for name in ("policy_node", "safety_node", "recorder", "mujoco_robot"):
                if name in self.children:
                    self.children[name].end()
            self._closing.set()
            if self._switches is not None:  # it must not send through a node that has left
                self._switches.join(1.0)
            self.transport.close()

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not cut short the braking that the first one asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
