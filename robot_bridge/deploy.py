"""Runs a bundle on a robot for some episodes: starts the processes, plays the operator, collects latencies.

    robot (MuJoCo, or one that is on the graph already) <- safety <- policy       recorder

Every child is started and ended by its own process id; a child whose parent is gone ends by itself.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError, InputError, SafetyError
from embodied.robot_bridge import messages
from embodied.robot_bridge.mujoco_robot import POSE_PREFIX, RESET_TOPIC, STATUS_TOPIC
from embodied.robot_bridge.node import EVENT_TOPIC, EventLog, now_ns
from embodied.robot_bridge.profile import load_profile, profile_path
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, MODE_TOPIC, STATE_TOPIC
from embodied.robot_bridge.scene import load_scene

START_TIMEOUT, STEP_TIMEOUT, END_TIMEOUT = 60.0, 10.0, 5.0  # [s]
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
        end: `success`, `horizon`, or what the safety process stopped for.
        bag: folder of the recording, or None.
    """

    index: int
    success: bool | None
    steps: int
    duration_s: float
    end: str
    bag: str | None


@dataclasses.dataclass(frozen=True)
class DeploymentResult:
    """All episodes, and how long the wire took.

    Attributes:
        observation_to_chunk_s: stamp of the newest image (or joint state) -> the chunk made from it has arrived [s].
        observation_to_command_s: the same stamp -> the first command from that chunk was sent [s].
        safety: the safety process's last counters (chunks, rejected, clamped, holds, missed_deadlines, ...).
        control_dt: period of the policy [s].
    """

    episodes: tuple[EpisodeOutcome, ...]
    observation_to_chunk_s: tuple[float, ...]
    observation_to_command_s: tuple[float, ...]
    safety: dict[str, str]
    control_dt: float
    domain: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def free_domain() -> int:
    """A ROS domain of 1 to 200 on which no participant of this host listens."""
    start = os.getpid() % 200
    for offset in range(200):
        domain = 1 + (start + offset) % 200
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("0.0.0.0", 7400 + 250 * domain + 10))
            except OSError:
                continue
            return domain
    raise EmbodiedError("No free ROS domain between 1 and 200 on this host.")


class Child:
    """One process of the bridge with its log file."""

    def __init__(self, module: str, flags: Sequence[str], log_folder: Path) -> None:
        self.name, self.log_path = module, log_folder / f"{module}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"embodied.robot_bridge.{module}", *flags, "--parent", str(os.getpid())],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends everything in order
            )

    def check(self) -> None:
        """Raise EmbodiedError with the end of its log if the process has ended."""
        code = self.process.poll()
        if code is not None:
            tail = self.log_path.read_text(errors="replace").strip().splitlines()[-3:]
            raise EmbodiedError(f"The {self.name} process ended (exit code {code}):\n" + "\n".join(tail))

    def end(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_TIMEOUT)


class Deployment:
    """The running processes; a context manager. Arguments as `run_deployment`."""

    def __init__(
        self,
        bundle: str | Path,
        profile: str | Path = "panda-mujoco",
        scene: str | Path | None = None,
        record: str | Path | None = None,
        domain: int | None = None,
        discovery: str = "localhost",
        log_folder: str | Path | None = None,
    ) -> None:
        from embodied.robot_bridge.transport_cyclone import CycloneTransport

        self.profile = load_profile(profile)
        self.bundle, self.record = Path(bundle), Path(record) if record is not None else None
        if not self.bundle.is_dir():
            raise InputError(f"{self.bundle} is no policy bundle.")
        self.scene = load_scene(scene) if scene is not None else None
        self.domain = free_domain() if domain is None else domain
        self.log_folder = Path(log_folder or tempfile.mkdtemp(prefix="embodied-deploy-"))
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self.state: dict[str, str] = {}
        self.poses: dict[str, np.ndarray] = {}
        self.contract: dict[str, Any] | None = None
        self._status: dict[str, Any] = {}
        self._recorder_said: dict[str, str] = {}
        self._joint_stamp_ns = 0
        self._chunk_stamps: dict[str, int] = {}
        self._commanded: set[str] = set()
        self.run_chunks = 0
        self.observation_to_chunk_s: list[float] = []
        self.observation_to_command_s: list[float] = []
        self._transport = CycloneTransport("operator", self.domain, discovery)
        self._subscribe()
        self._common_flags = ["--profile", str(profile_path(profile)), "--domain", str(self.domain)]
        self._common_flags += ["--discovery", discovery]
        self._flags: dict[str, list[str]] = {}
        self.children: dict[str, Child] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        more: dict[str, list[str]] = {"policy_node": ["--bundle", str(self.bundle)], "safety_node": []}
        if self.scene is not None:
            more["mujoco_robot"] = ["--scene", str(self.scene.xml.parent)]
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
        joints = self.profile.topics.joint_states
        self._await(lambda: self.contract is not None, START_TIMEOUT, "the policy process to load its bundle")
        self._await(lambda: "state" in self.state, START_TIMEOUT, "the safety process")
        self._await(lambda: self._joint_stamp_ns > 0, START_TIMEOUT, f"joint states on {joints}")
        if self.scene is not None:
            self._await(lambda: self._reset.matched > 0, START_TIMEOUT, "the robot process to take resets")
        if self.record is not None:
            self._await(self._recorder_ready, START_TIMEOUT, "the recorder")

    def _recorder_ready(self) -> bool:
        return self._events.matched >= 2  # the recorder's subscription and our own

    def _subscribe(self) -> None:
        transport = self._transport
        self._mode = transport.publisher(MODE_TOPIC, messages.STRING, DEFAULT)
        self._reset = transport.publisher(RESET_TOPIC, messages.STRING, DEFAULT)
        self._events = EventLog(transport, "operator")
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
        self._joint_stamp_ns = messages.read_joint_state(data).stamp_ns

    def _on_chunk(self, data: bytes, received_ns: int) -> None:
        chunk = messages.read_joint_trajectory(data)
        arrived_ns = now_ns() - (time.monotonic_ns() - received_ns)
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
        identifier = f"{os.getpid()}-{now_ns()}"
        values = {key: [float(x) for x in value] for key, value in (state or {}).items()}
        self._reset.write(messages.json_string({"id": identifier, **values}))
        self._await(lambda: self._status.get("reset") == identifier, STEP_TIMEOUT, "the reset of the simulation")
        since = now_ns() + round(_SETTLE * 1e9)
        self._await(lambda: self._joint_stamp_ns > since, STEP_TIMEOUT, "joint states after the reset")

    def run_episode(
        self,
        index: int,
        state: Mapping[str, Sequence[float]] | None,
        horizon_s: float,
        success: Success | None,
        instruction: str = "",
    ) -> EpisodeOutcome:
        """Reset, arm, run until success, the horizon or a stop; leave the arm STOPPED."""
        self.reset(state)
        bag = f"episode_{index:04d}" if self.record is not None else None
        about = {"episode": index, "instruction": instruction, "profile": self.profile.name, "bag": bag or ""}
        self._events.write("episode_start", **about, contract=self.contract)
        if bag:
            self._await(lambda: self._recorder_said.get(bag) is not None, STEP_TIMEOUT, "the recorder to open a bag")
            if self._recorder_said[bag] != "recording":
                raise EmbodiedError(f"The recorder could not open {self.record}/{bag}.\nLogs: {self.log_folder}")
        self.request("arm", "ARMED")
        with self._lock:
            self.run_chunks = 0
        self.request("run", "RUNNING")
        end, seconds = self._watch(horizon_s, success)
        verdict = None if success is None else end == "success"
        if self.state["state"] not in ("STOPPED", "ESTOP", "INACTIVE"):
            self.request("stop", "STOPPED")
        self._events.write("episode_end", **about, success=verdict, end=end, duration_s=seconds)
        if bag:
            self._await(lambda: self._recorder_said.get(bag) != "recording", STEP_TIMEOUT, "the recorder to finish")
        path = str(self.record / bag) if self.record is not None and bag else None
        return EpisodeOutcome(index, verdict, self.run_chunks, seconds, end, path)

    def _watch(self, horizon_s: float, success: Success | None) -> tuple[str, float]:
        """How the running episode ended, and how long after its first chunk."""
        started = time.monotonic()
        first: float | None = None
        held_since: float | None = None
        while True:
            time.sleep(_POLL)
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

    def result(self, episodes: Sequence[EpisodeOutcome]) -> DeploymentResult:
        assert self.contract is not None
        with self._lock:
            chunk, command = tuple(self.observation_to_chunk_s), tuple(self.observation_to_command_s)
        return DeploymentResult(
            tuple(episodes), chunk, command, dict(self.state), float(self.contract["control_dt"]), self.domain
        )

    def close(self) -> None:
        """Stop the arm, then end every process: policy, safety (which brakes first), recorder, robot."""
        if self.state.get("state") in ("ARMED", "RUNNING", "HOLD"):
            self._mode.write(messages.string("stop"))
        for name in ("policy_node", "safety_node", "recorder", "mujoco_robot"):
            if name in self.children:
                self.children[name].end()
        self._transport.close()

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_deployment(
    bundle: str | Path,
    profile: str | Path = "panda-mujoco",
    *,
    scene: str | Path | None = None,
    initial_states: Sequence[Mapping[str, Sequence[float]] | None] = (None,),
    horizon_s: float = 5.0,
    success: Success | None = None,
    instruction: str = "",
    record: str | Path | None = None,
    domain: int | None = None,
    discovery: str = "localhost",
    log_folder: str | Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> DeploymentResult:
    """Run a bundle for one episode per initial state, at wall-clock speed.

    Args:
        bundle: policy bundle folder.
        profile: name of a shipped robot profile, or a YAML file.
        scene: scene folder: a MuJoCo robot is started with it. None: the robot is on the graph already, and
            initial states are ignored.
        initial_states: per episode {"qpos": [...], "qvel": [...], "ctrl": [...]}, or None for the scene's own.
        horizon_s: length of an episode from the first chunk on [s].
        success: called about 50 times a second with the latest ground-truth poses, name -> (7,) position [m] and
            quat_xyzw; True ends the episode. None: every episode runs to the horizon.
        record: folder that gets one bag per episode (`episode_0000`, ...).
        domain: ROS domain; None picks one that nobody on this host uses.
        discovery: `localhost`, or `subnet` to leave this host.
        log_folder: logs of the processes; None: a temporary folder.

    Raises:
        EmbodiedError: a process ended or did not answer in time; the message holds the end of its log.
    """
    outcomes: list[EpisodeOutcome] = []
    total = len(initial_states)
    progress(0, total, "starting the robot")
    with Deployment(bundle, profile, scene, record, domain, discovery, log_folder) as deployment:
        for index, state in enumerate(initial_states):
            outcomes.append(deployment.run_episode(index, state, horizon_s, success, instruction))
            progress(len(outcomes), total, outcomes[-1].end)
        return deployment.result(outcomes)
