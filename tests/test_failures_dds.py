"""The failure table over DDS with real processes: killed, stopped, starved. See tests/failure_rig.py.

What the arm did is read from the simulator's own log, which survives every other process.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import write_bundle, write_profile, write_scene
from failure_rig import MOVING, STILL, assert_record_within

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.node import now_ns
from embodied.robot_bridge.processes import Child, free_domain
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import DEFAULT, EVENTS, LATEST, QosProfile
from embodied.robot_bridge.robot_log import RobotRecord, read_robot_log
from embodied.robot_bridge.transport import open_transport

ACTION = np.array([0.4, -0.3, 0.9])  # 0.4 and -0.3 rad/s
PERIOD = 0.1  # of the policy [s]
BRAKE = 0.15  # from full speed to rest, servo lag included [s]
SCHEDULING = 0.15  # what a busy machine may add to a deadline [s]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failures")
    return {
        "bundle": write_bundle(folder / "bundle", ACTION, camera=False),
        "profile": write_profile(folder / "tiny.yaml"),
        "scene": write_scene(folder / "scene"),
    }


class Running:
    """A deployment whose arm moves, and the log of its simulator."""

    def __init__(self, parts: dict[str, Any], folder: Path, **more: Any) -> None:
        self.log = folder / "logs" / "robot.log"
        self.deployment = Deployment(**parts, log_folder=folder / "logs", **more)
        self.profile = self.deployment.profile
        self.speed, self.began = 0.0, 0.0
        joints = self.profile.topics.joint_states
        self.deployment.transport.subscriber(joints, m.JOINT_STATE, LATEST, self._measure)

    def _measure(self, data: bytes, _: int) -> None:
        self.speed = float(np.abs(m.read_joint_state(data).velocity[:2]).max())

    @property
    def state(self) -> str:
        return self.deployment.state["state"]

    def moving(self) -> None:
        """The arm moves; a process that an earlier test left dead is started again."""
        for module, child in self.deployment.children.items():
            if child.process.poll() is not None:
                self.deployment.restart(module)
        self.deployment.reset(None)
        self.began = time.monotonic()
        self.deployment.request("arm", "ARMED")
        self.deployment.request("run", "RUNNING")
        self.wait(lambda: self.speed > MOVING, 5.0)

    def wait(self, condition: Any, seconds: float) -> float:
        """Until it holds; how long that took [s]."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"{self.deployment.state}"
            time.sleep(0.01)
        return time.monotonic() - started

    def send(self, module: str, number: int) -> float:
        """A signal to one of the processes; when it was sent [monotonic s]."""
        os.kill(self.deployment.children[module].process.pid, number)
        return time.monotonic()

    def record(self, since: float) -> RobotRecord:
        """What the arm did from `since` on; the log is at most a tenth of a second behind."""
        time.sleep(0.25)
        record = read_robot_log(self.log)
        assert_record_within(record.between(self.began), self.profile.read_limits())
        return record.between(since)


@pytest.fixture(scope="module")
def running(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(parts, tmp_path_factory.mktemp("running"))
    with running.deployment:
        yield running


def distance(record: RobotRecord) -> float:
    """How far the shoulder got [rad]."""
    return float(np.abs(record.position[:, 0] - record.position[0, 0]).max())


def test_policy_killed(running: Running) -> None:
    running.moving()
    killed = running.send("policy_node", signal.SIGKILL)
    running.wait(lambda: running.state == "HOLD", 2.0)
    safety = running.profile.safety
    silence = PERIOD + safety.chunk_horizon + BRAKE + SCHEDULING
    time.sleep(0.3)
    assert running.record(killed).time_to_rest(killed, STILL) < silence
    running.deployment.restart("policy_node")
    since = time.monotonic()
    time.sleep(1.0)  # a new policy runs, and nothing moves until an operator says so
    assert running.state == "HOLD"
    assert distance(running.record(since)) < 0.01
    running.deployment.request("run", "RUNNING")
    running.wait(lambda: running.speed > MOVING, 3.0)


def test_policy_hung(running: Running) -> None:
    running.moving()
    stopped = running.send("policy_node", signal.SIGSTOP)
    running.wait(lambda: running.state == "HOLD", 2.0)
    time.sleep(running.profile.safety.hold_resume + 0.2)
    since = running.send("policy_node", signal.SIGCONT)
    time.sleep(0.8)  # it goes on with its old run: too late to resume by itself
    assert running.state == "HOLD"
    record = running.record(stopped)
    limit = PERIOD + running.profile.safety.chunk_horizon + BRAKE + SCHEDULING
    assert record.between(stopped, since).time_to_rest(stopped, STILL) < limit
    assert distance(record.between(since)) < 0.01
    running.deployment.request("run", "RUNNING")
    running.wait(lambda: running.speed > MOVING, 3.0)


def test_safety_killed(running: Running) -> None:
    """Nobody commands the arm any more: the trajectory controller ends what it has, which ends at rest."""
    running.moving()
    killed = running.send("safety_node", signal.SIGKILL)
    time.sleep(1.0)
    record = running.record(killed)
    horizon = 0.25  # of the trajectories that adapter jtc sends [s]
    assert record.time_to_rest(killed, STILL) < horizon + running.profile.safety.command_every / 100 + 0.1
    assert np.ptp(record.accepted) <= 1  # one may have been on its way
    running.deployment.restart("safety_node")
    assert running.state == "INACTIVE"


def test_joint_states_stale(running: Running) -> None:
    """The robot's process hangs: HOLD, then STOPPED; when it wakes up the arm goes nowhere."""
    running.moving()
    stopped = running.send("mujoco_robot", signal.SIGSTOP)
    safety = running.profile.safety
    assert running.wait(lambda: running.state in ("HOLD", "STOPPED"), 1.0) < safety.joint_timeout + SCHEDULING
    running.wait(lambda: running.state == "STOPPED", 1.0)
    assert time.monotonic() - stopped < safety.joint_stop + 2 * SCHEDULING
    time.sleep(0.3)
    woken = running.send("mujoco_robot", signal.SIGCONT)
    time.sleep(1.0)
    assert running.state == "STOPPED"
    record = running.record(woken)
    assert record.time_to_rest(woken, STILL) < 0.25 + BRAKE + SCHEDULING
    assert distance(record) < 0.15


def test_robot_killed(running: Running) -> None:
    running.moving()
    said: list[tuple[float, np.ndarray]] = []

    def keep(data: bytes, at: int) -> None:
        said.append((at * 1e-9, m.read_joint_trajectory(data).positions[0]))

    running.deployment.transport.subscriber("/bridge/command", m.JOINT_TRAJECTORY, DEFAULT, keep)
    time.sleep(0.5)
    killed = running.send("mujoco_robot", signal.SIGKILL)
    safety = running.profile.safety
    running.wait(lambda: running.state == "STOPPED", safety.joint_stop + 2 * SCHEDULING)
    time.sleep(0.5)
    last = np.array([position for at, position in said if at > time.monotonic() - 0.4])
    assert len(last) > 5  # the stop is commanded on and on
    assert np.ptp(last, axis=0).max() < 1e-6
    record = read_robot_log(running.log)
    assert_record_within(record.between(running.began), running.profile.read_limits())
    assert record.between(killed).time.size == 0
    running.deployment.restart("mujoco_robot")


HOG = """
import runpy, sys, threading
def spin():
    while True:
        sum(range(1000))
threading.Thread(target=spin, daemon=True).start()
sys.argv = ["policy_node", *sys.argv[1:]]
runpy.run_module("embodied.robot_bridge.policy_node", run_name="__main__")
"""


def test_gil_hog(running: Running) -> None:
    """A thread in the policy's process never lets go of the interpreter: the safety process is one of its own."""

    def commands_per_second() -> float:
        since = time.monotonic()
        time.sleep(2.0)
        record = running.record(since)
        return float(np.ptp(record.accepted) / np.ptp(record.wall))

    running.moving()
    before = commands_per_second()
    child = running.deployment.children["policy_node"]
    child.end()
    flags = running.deployment._flags["policy_node"]
    running.deployment.contract = None
    with open(child.log_path, "ab") as log:
        child.process = subprocess.Popen(
            [sys.executable, "-c", HOG, *flags, "--parent", str(os.getpid())], stdout=log, stderr=log
        )
    running.wait(lambda: running.deployment.contract is not None, 60.0)
    running.moving()
    assert commands_per_second() > 0.8 * before
    assert running.state in ("RUNNING", "HOLD")  # its chunks may come too late, which is the policy's trouble
    child.end()
    running.deployment.restart("policy_node")


# ---- the recorder


@pytest.fixture(scope="module")
def recorded(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("recorded")
    running = Running(parts, folder, record=folder / "bags")
    with running.deployment:
        yield running


def test_recorder_slow(recorded: Running) -> None:
    """A recorder that does not read for a second: nobody waits for it."""
    threading.Timer(0.5, recorded.send, ("recorder", signal.SIGSTOP)).start()
    threading.Timer(1.5, recorded.send, ("recorder", signal.SIGCONT)).start()
    since = time.monotonic()
    recorded.began = since + 0.5  # after the reset
    outcome = recorded.deployment.run_episode(0, None, 2.0, None)
    assert outcome.end == "horizon"
    assert outcome.steps >= 17
    moving = recorded.record(since)
    assert distance(moving) == pytest.approx(0.4 * 2.0, abs=0.2)
    assert outcome.bag is not None
    assert (Path(outcome.bag) / "metadata.yaml").exists()


def test_recorder_disk_full(recorded: Running) -> None:
    pid = recorded.deployment.children["recorder"].process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (40_000, 40_000))  # as a disk with so much left
    since = time.monotonic()
    recorded.began = since + 0.5  # after the reset
    outcome = recorded.deployment.run_episode(1, None, 2.0, None)
    assert outcome.end == "horizon"
    assert outcome.steps >= 17
    assert recorded.deployment._recorder_said["episode_0001"] == "recording_failed"
    assert distance(recorded.record(since)) == pytest.approx(0.4 * 2.0, abs=0.2)


# ---- before and after


def test_qos_mismatch(parts: dict[str, Any], tmp_path: Path) -> None:
    """The controller asks for latched commands, which nobody offers: arming is refused, both profiles named."""
    domain, profile = free_domain(), load_profile(parts["profile"])
    robot = open_transport("controller_manager", "dds", domain)
    flags = ["--profile", str(parts["profile"]), "--domain", str(domain)]
    child = Child("safety_node", flags, tmp_path)
    try:
        events: list[str] = []
        wanted = QosProfile(depth=1, latched=True)
        robot.subscriber(profile.topics.command, m.JOINT_TRAJECTORY, wanted, lambda data, at: None)
        robot.subscriber("/bridge/event", m.STRING, EVENTS, lambda data, at: events.append(m.read_string(data)))
        states = robot.publisher(profile.topics.joint_states, m.JOINT_STATE, DEFAULT)
        mode = robot.publisher("/bridge/mode", m.STRING, DEFAULT)
        end = time.monotonic() + 15
        while not any("arm refused" in event and "transient local" in event for event in events):
            assert time.monotonic() < end, events
            states.write(m.joint_state(now_ns(), profile.all_joints, np.zeros(3), np.zeros(3)))
            if mode.matched and round(time.monotonic() * 100) % 20 == 0:
                mode.write(m.string("arm"))
            time.sleep(0.01)
        (refusal, *_) = [event for event in events if "transient local" in event]
        assert "volatile" in refusal
        assert profile.topics.command in refusal
    finally:
        child.end()
        robot.close()


CLI = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from bridge_fixtures import write_scene
from embodied import cli
from embodied.robot_bridge import deploy
from embodied.sim import suites

class Tiny:
    duration = 60.0
    export_scene = staticmethod(lambda folder, cameras, size: write_scene(folder / "scene"))
    initial_states = staticmethod(lambda seeds: [None for _ in seeds])
    succeeded = staticmethod(lambda poses: False)

suites.ENVIRONMENTS["tests/tiny"] = Tiny
sys.exit(cli.main({words!r}))
"""


def test_ctrl_c(parts: dict[str, Any], tmp_path: Path) -> None:
    """`embodied deploy`, interrupted twice while the arm moves: it brakes, writes its report and ends with 0."""
    words = ["deploy", str(parts["bundle"]), "--robot", str(parts["profile"]), "--env", "tests/tiny"]
    words += ["--out", str(tmp_path / "out.json"), "--logs", str(tmp_path / "logs"), "--episodes", "2"]
    words += ["--record", str(tmp_path / "bags")]
    code = CLI.format(tests=str(Path(__file__).parent), words=words)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "logs" / "safety_node.log"
    end = time.monotonic() + 120
    try:
        while not (log.exists() and "ARMED -> RUNNING" in log.read_text()):
            assert time.monotonic() < end, "the arm was never run"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        pressed = time.monotonic()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, output
    assert "(interrupted)" in output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["interrupted"] is True
    (episode,) = report["episodes"]
    assert episode["end"] == "interrupted"
    assert "RUNNING -> STOPPED: operator" in log.read_text()
    bag = Path(episode["bag"])
    assert (bag / "metadata.yaml").exists()
    record = read_robot_log(tmp_path / "logs" / "robot.log")
    assert np.abs(record.velocity[:, :2]).max() > MOVING
    assert record.time_to_rest(pressed, STILL) < BRAKE + 2 * SCHEDULING
    assert record.wall[-1] > pressed + 0.3  # the robot ends last
