"""The bridge under random faults every few seconds: what the arm did, whether it came back, what memory it took.

    python benchmarks/bridge_faults.py --minutes 30 [--seed 0]

Robot, safety, policy and recorder are processes on Cyclone DDS over loopback; this one is the operator, with deadman
and e-stop. After each fault the operator brings the bridge back to RUNNING: stop, reset, arm, run. Exit status 1 if
any of these does not hold:

- position: commanded and measured joints are within the limits in every control step of the simulator's own log
  (slack 1e-3 rad and 0.02 rad: servos overshoot), whatever the fault;
- sent: what the safety process says it commanded (/bridge/command) keeps the position and velocity limits;
- speed: measured joint speed is at most 1.15 times the limit + 0.02 rad/s in every control step, and the commanded
  speed and acceleration over 0.1 s at most 1.4 times the limits + 0.02; but for two kinds of steps, which are counted
  and reported apart. Where the fault is that of the simulated robot itself, which then jumps to what it has missed (it
  holds the arm, refuses, loses or delays commands, or its process is stopped or starved), and half a second after. And
  a tenth of a second after a command that the host delivered late (more than 15 ms after the one before; 10 ms is
  nominal): a trajectory that starts on arrival starts late then, and the next one makes up for it; by 2.5 times the
  limits at most;
- stop: after a fault that must stop the arm, it is at rest (below 0.03 rad/s) within the time that the profile's
  deadlines promise, plus --slack for a busy host;
- recovery: RUNNING again within 15 s, 60 s where a process had to be started, and an arm joint moves at 0.2 rad/s or
  more before the next fault;
- memory: the median of the last tenth of each process's life is at most 2 % above that of the first tenth after
  warm-up, for every life of three times the warm-up or more (3 min; 1 min for safety and policy, which are killed now
  and then); threads and file descriptors do not grow.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bridge_parts import child_environment, picture_scene, swinging_bundle, swinging_profile
from record import machine, write_result

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.node import EventLog, now_ns
from embodied.robot_bridge.processes import Child, free_domain
from embodied.robot_bridge.profile import Profile, load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT
from embodied.robot_bridge.robot_log import RobotRecord, read_robot_log
from embodied.robot_bridge.robot_options import FAULT_TOPIC
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, ESTOP_TOPIC, MODE_TOPIC
from embodied.robot_bridge.transport import open_transport

STILL, MOVING = 0.03, 0.2  # [rad/s]
PERIOD = 0.1  # of the policy [s]
CONTROL = 0.004  # of the simulated controller [s]
HEARTBEAT = 0.05  # of deadman and e-stop [s]
RECOVER, RECOVER_PROCESS = 15.0, 60.0  # [s]
BAG_EVERY = 20.0  # a bag keeps an index of its messages: memory rises and falls with each [s]
LATE = 0.015  # between two commands; 10 ms is nominal [s]
MADE_UP = 2.5  # times a limit
CAUGHT_UP = 0.5  # after `contact` [s]
COMMAND_SLACK, MEASURED_SLACK = 1e-3, 0.02  # [rad]
GROWTH = 1.02
WARM_UP = 60.0  # of processes that are killed now and then [s]
WHOLE_RUN = ("mujoco_robot", "recorder", "operator")

HOG = """
import runpy, sys, threading
def spin():
    while True:
        sum(range(1000))
threading.Thread(target=spin, daemon=True).start()
sys.argv = ["policy_node", *sys.argv[1:]]
runpy.run_module("embodied.robot_bridge.policy_node", run_name="__main__")
"""


@dataclasses.dataclass
class Trial:
    """One fault and what came of it; times on the monotonic clock [s].

    Attributes:
        bound: at rest so long after `began`; None where the arm need not stop.
        ended: when the fault was over; what the arm does after that is not part of the stop.
    """

    fault: str
    began: float
    bound: float | None
    ended: float = 0.0
    left_running: bool = False
    recovered_in: float | None = None
    recovered_at: float = np.inf
    rest_in: float | None = None
    own: bool = False  # the simulated robot's own


# ---- memory, threads, files


class Watcher(threading.Thread):
    """Once a second: resident memory [KiB], threads and open files of every process, per process id."""

    def __init__(self, children: Callable[[], dict[str, Child]]) -> None:
        super().__init__(name="watcher", daemon=True)
        self._children, self.closing = children, threading.Event()
        self.lives: dict[tuple[str, int], list[tuple[float, int, int, int]]] = collections.defaultdict(list)

    def run(self) -> None:
        while not self.closing.wait(1.0):
            pids = {name: child.process.pid for name, child in self._children().items()}
            for name, pid in {**pids, "operator": os.getpid()}.items():
                with contextlib.suppress(OSError, KeyError):  # it has just ended
                    self.lives[name, pid].append((time.monotonic(), *_status(pid)))


def _status(pid: int) -> tuple[int, int, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
    return int(words["VmRSS"]), int(words["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def life(samples: list[tuple[float, int, int, int]], warm_up: float) -> dict[str, Any]:
    """Growth of one process after its warm-up: ratios of the median of the last tenth to that of the first."""
    times, *columns = np.array(samples).T
    kept = times >= times[0] + warm_up
    figures: dict[str, Any] = {"seconds": round(float(times[-1] - times[0])), "judged": False}
    if times[-1] - times[0] < 3 * warm_up or kept.sum() < 20:
        return figures
    tenth = max(1, int(kept.sum()) // 10)
    for name, column in zip(("rss", "threads", "files"), columns, strict=True):
        values = column[kept]
        first, last = float(np.median(values[:tenth])), float(np.median(values[-tenth:]))
        figures |= {f"{name}_first": first, f"{name}_last": last, f"{name}_ratio": round(last / first, 4)}
    slope = np.linalg.lstsq(np.vander(times[kept] / 3600, 2), columns[0][kept])[0][0]
    figures["rss_kib_per_hour"] = round(float(slope))
    return figures | {"judged": True}


# ---- the deployment and its operator


class Operator:
    """Everything that runs, the switches, and the way back to RUNNING."""

    def __init__(self, folder: Path, profile: Path, parts: dict[str, Path]) -> None:
        self.folder, self.profile = folder, load_profile(profile)
        self.log, self.bags = folder / "robot.log", folder / "bags"
        domain = free_domain()
        flags = ["--profile", str(profile), "--domain", str(domain), "--discovery", "localhost", "--transport", "dds"]
        scene = ["--scene", str(parts["scene"]), "--log", str(self.log)]
        self.robot = Child("mujoco_robot", [*flags, *scene], folder)
        self._closing = threading.Event()
        try:
            # No scene is passed: the robot counts as one that is there already, and the switches are ours.
            self.deployment = Deployment(
                parts["bundle"], profile, None, self.bags, domain, log_folder=folder, transport="dds"
            )
        except BaseException:
            self.robot.end()
            raise
        self.domain, self.transport = domain, self.deployment.transport
        self.deadman, self.estop, self.silent = True, False, False
        self._deadman = self.transport.publisher(self.profile.topics.deadman, m.BOOL, COMMAND)
        self._estop = self.transport.publisher(ESTOP_TOPIC, m.BOOL, COMMAND)
        self._mode = self.transport.publisher(MODE_TOPIC, m.STRING, DEFAULT)
        self._fault = self.transport.publisher(FAULT_TOPIC, m.STRING, DEFAULT)
        self.events = EventLog(self.transport, "operator", now_ns)
        self.sent: dict[str, float] = {"messages": 0, "position": -np.inf, "velocity": 0.0}
        self._limits = self.profile.read_limits()
        self.transport.subscriber(COMMAND_TOPIC, m.JOINT_TRAJECTORY, DEFAULT, self._on_command)
        self.starts: dict[str, int] = collections.Counter()
        self._bag, self._bag_due = 0, 0.0
        threading.Thread(target=self._switches, name="switches", daemon=True).start()

    @property
    def children(self) -> dict[str, Child]:
        return {**self.deployment.children, "mujoco_robot": self.robot}

    @property
    def state(self) -> str:
        return self.deployment.state.get("state", "")

    def _switches(self) -> None:
        while not self._closing.wait(HEARTBEAT):
            if not self.silent:
                self._deadman.write(m.boolean(self.deadman))
            self._estop.write(m.boolean(self.estop))

    def _on_command(self, data: bytes, _: int) -> None:
        """How much of each limit the safety process asks for, where it says so: one state per message."""
        command = m.read_joint_trajectory(data)
        assert command.velocities is not None
        position, velocity = command.positions[0], command.velocities[0]
        limits, sent = self._limits, self.sent
        outside = np.maximum(limits.low - position, position - limits.high).max()
        sent["messages"] += 1
        sent["position"] = max(sent["position"], float(outside))
        sent["velocity"] = max(sent["velocity"], float((np.abs(velocity) / limits.velocity).max()))

    def ask(self, mode: str) -> None:
        self._mode.write(m.string(mode))

    def inject(self, fault: str, **fields: Any) -> None:
        self._fault.write(m.json_string({"fault": fault, **fields}))

    def send(self, module: str, number: int) -> None:
        os.kill(self.children[module].process.pid, number)

    def restart(self, module: str, code: str = "") -> None:
        """Start a process anew, or `code` in its place with the same flags."""
        self.starts[module] += 1
        if not code:
            self.deployment.restart(module)
            return
        child = self.deployment.children[module]
        child.end()
        self.deployment.contract = None
        flags = [*self.deployment._flags[module], "--parent", str(os.getpid())]
        with open(child.log_path, "ab") as log:
            child.process = subprocess.Popen(
                [sys.executable, "-c", code, *flags], stdout=log, stderr=log, env=child_environment()
            )
        self.deployment._await_ready()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def recover(self, seconds: float) -> float | None:
        """Back to RUNNING, by the operator's whole way; how long it took [s], None if it did not."""
        began = time.monotonic()
        self.deadman, self.estop, self.silent = True, False, False
        self.inject("none")
        while time.monotonic() - began < seconds:
            try:
                self.ask("stop")
                if not self.wait(lambda: self.state in ("STOPPED", "ESTOP", "INACTIVE"), 0.5):
                    continue
                for mode, wanted in (("reset", "INACTIVE"), ("arm", "ARMED"), ("run", "RUNNING")):
                    self.deployment.request(mode, wanted, 3.0)
                return time.monotonic() - began
            except SafetyError:
                continue
        return None

    def next_bag(self) -> None:
        """A bag every BAG_EVERY; the one before the last goes, or the disk fills."""
        if time.monotonic() < self._bag_due:
            return
        self._bag_due, self._bag = time.monotonic() + BAG_EVERY, self._bag + 1
        about = {"episode": self._bag, "instruction": "", "profile": self.profile.name}
        self.events.write("episode_start", **about, bag=f"bag_{self._bag:04d}", contract=self.deployment.contract)
        shutil.rmtree(self.bags / f"bag_{self._bag - 2:04d}", ignore_errors=True)

    def close(self) -> None:
        self.deployment.close()
        self._closing.set()
        self.robot.end()


# ---- the faults


class Faults:
    """Each makes one fault for `seconds`, and returns how long the arm may move on after it; None: it need not stop."""

    def __init__(self, operator: Operator, random: np.random.Generator) -> None:
        self.operator, self.random = operator, random
        safety = operator.profile.safety
        limits = operator.profile.read_limits()
        # From full speed to rest: jerk up, jerk down, and the servos' lag.
        self.brake = float((limits.velocity / limits.acceleration + limits.acceleration / limits.jerk).max()) + 0.1
        self.joints = safety.joint_timeout + self.brake
        self.silence = PERIOD + safety.chunk_horizon + safety.chunk_timeout + self.brake
        self.safety = safety
        self.horizon = max(0.15, (2 * safety.command_every + 1) / safety.rate_hz + self.brake) + 0.1
        policy = operator.profile.policy
        camera = policy.image_timeout + self.silence
        tracking = safety.tracking_time + self.brake + 0.3
        simulated: dict[str, tuple[Callable[[], dict[str, Any]], float | None]] = {
            "freeze_state": (dict, self.joints),
            "nan": (lambda: {"joint": self.joint()}, self.joints),
            "drop": (lambda: {"of": "joint_states", "probability": 1.0}, self.joints),
            "drop_half": (lambda: {"of": self.stream(), "probability": 0.5}, None),
            "delay": (lambda: {"of": self.stream(), "seconds": float(self.random.uniform(0.02, 0.3))}, None),
            "joint_jump": (lambda: {"joint": self.joint(), "by": 0.5}, tracking),
            "camera_black": (dict, None),
            "freeze_cameras": (dict, camera),
            "reject_commands": (dict, self.horizon),
            "contact": (dict, None),
        }
        self.kinds: dict[str, tuple[float, Callable[[], float | None]]] = {}  # weight, fault
        for name, (fields, bound) in simulated.items():
            self.kinds[name] = (1.0, functools.partial(self.simulated, name, fields, bound))
        more: dict[str, tuple[float, Callable[[], float | None]]] = {
            "policy_stopped": (1.0, lambda: self.signalled("policy_node", self.silence)),
            "policy_killed": (0.3, lambda: self.killed("policy_node", self.silence)),
            "policy_hogged": (0.15, self.hogged),
            "safety_killed": (0.1, lambda: self.killed("safety_node", self.horizon)),
            "safety_stopped": (0.5, lambda: self.signalled("safety_node", self.horizon)),
            "robot_stopped": (0.7, self.robot_stopped),
            "operator_stop": (1.0, lambda: self.asked("stop")),
            "operator_hold": (0.5, lambda: self.asked("hold")),
            "operator_confused": (1.0, self.confused),
            "estop": (1.0, self.estop),
            "deadman_released": (1.0, self.released),
            "deadman_silent": (1.0, self.deadman_silent),
            "hostile_chunks": (1.5, self.hostile),
            "second_publisher": (0.5, self.rival),
        }
        self.kinds |= more
        self.own = False

    def joint(self) -> str:
        return str(self.random.choice(self.operator.profile.joints))

    def stream(self) -> str:
        return str(self.random.choice(["joint_states", "cameras", "command"]))

    def choose(self) -> str:
        weights = np.array([weight for weight, _ in self.kinds.values()])
        return str(self.random.choice(list(self.kinds), p=weights / weights.sum()))

    def while_it_lasts(self) -> None:
        time.sleep(float(self.random.uniform(1.3, 2.5)))

    def simulated(self, name: str, draw: Callable[[], dict[str, Any]], bound: float | None) -> float | None:
        fields = draw()
        self.own = name in ("contact", "reject_commands") or fields.get("of") == "command"
        self.operator.inject(name.removesuffix("_half"), **fields)
        self.while_it_lasts()
        return bound

    def signalled(self, module: str, bound: float | None) -> float | None:
        self.operator.send(module, signal.SIGSTOP)
        self.while_it_lasts()
        self.operator.send(module, signal.SIGCONT)
        return bound

    def robot_stopped(self) -> float | None:
        """The simulated arm stands still as long as its process does; what it does after is another matter."""
        self.own = True
        return self.signalled("mujoco_robot", None)

    def killed(self, module: str, bound: float) -> float:
        self.operator.send(module, signal.SIGKILL)
        self.while_it_lasts()
        self.operator.restart(module)
        return bound

    def hogged(self) -> None:
        """A thread in the policy's process that never lets go of the interpreter."""
        self.operator.restart("policy_node", HOG)
        self.operator.recover(RECOVER)
        self.while_it_lasts()
        self.operator.restart("policy_node")

    def asked(self, mode: str) -> float:
        self.operator.ask(mode)
        self.while_it_lasts()
        return self.brake

    def confused(self) -> None:
        """Wishes in any order, some of them nonsense."""
        for _ in range(30):
            words = ["arm", "run", "hold", "stop", "reset", "", "Run", "x" * 200]
            self.operator.ask(str(self.random.choice(words)))
            time.sleep(float(self.random.uniform(0.0, 0.05)))

    def estop(self) -> float:
        self.operator.estop = True
        self.while_it_lasts()
        self.operator.estop = False
        return HEARTBEAT + self.brake

    def released(self) -> float:
        self.operator.deadman = False
        self.while_it_lasts()
        return HEARTBEAT + self.brake

    def deadman_silent(self) -> float:
        self.operator.silent = True
        self.while_it_lasts()
        return self.safety.deadman_timeout + self.brake

    def hostile(self) -> None:
        """Chunks that no policy should send, from a node of its own."""
        transport = open_transport("rogue", "dds", self.operator.domain, "localhost")
        try:
            publisher = transport.publisher(CHUNK_TOPIC, m.JOINT_TRAJECTORY, COMMAND)
            self.operator.wait(lambda: publisher.matched > 0, 2.0)
            for sequence in range(1, 60):
                publisher.write(self._hostile_chunk(sequence))
                time.sleep(float(self.random.uniform(0.0, 0.02)))
        finally:
            transport.close()

    def _hostile_chunk(self, sequence: int) -> bytes:
        random, names = self.random, self.operator.profile.all_joints
        kind, rows = int(random.integers(8)), int(random.integers(1, 6))
        times = 0.1 * np.arange(1, rows + 1)
        positions = random.uniform(-1.0, 1.0, (rows, len(names)))
        stamp, frame = now_ns(), f"policy:{secrets.token_hex(2)}:{sequence}"
        if kind == 0:
            positions[random.integers(rows), random.integers(len(names))] = random.choice([np.nan, np.inf, -np.inf])
        elif kind == 1:
            positions *= 10.0 ** random.integers(1, 300)
        elif kind == 2:
            names = ("a", *names[1:])
        elif kind == 3:
            names, positions = names[:-1], positions[:, :-1]
        elif kind == 4:
            stamp += int(random.choice([-1, 1])) * int(random.integers(10**8, 10**11))
        elif kind == 5:
            times = times[::-1].copy()
        elif kind == 6:
            frame = str(random.choice(["", "policy", "policy::", "policy:a:-1", "policy:a:9" + "9" * 30, ":" * 500]))
        return m.joint_trajectory(m.Trajectory(stamp, frame, names, times, positions))

    def rival(self) -> float:
        """Somebody else who could command the arm; arming again is refused as long as it is there."""
        transport = open_transport("rival", "dds", self.operator.domain, "localhost")
        try:
            transport.publisher(self.operator.profile.topics.command, m.JOINT_TRAJECTORY, COMMAND)
            time.sleep(3.0)
        finally:
            transport.close()
        return 1.0 + 1.0 + self.brake  # looked for once a second, once it is discovered


def run(operator: Operator, minutes: float, seed: int) -> list[Trial]:
    """Faults until the time is over."""
    random = np.random.default_rng(seed)
    faults, trials = Faults(operator, random), []
    end = time.monotonic() + 60 * minutes
    operator.next_bag()
    if operator.recover(RECOVER) is None:
        raise SafetyError(f"The bridge never came to RUNNING: {operator.state}.\nLogs: {operator.folder}")
    while time.monotonic() < end:
        operator.next_bag()
        time.sleep(float(random.uniform(1.0, 4.0)))
        name = faults.choose()
        trial = Trial(name, time.monotonic(), None)
        trials.append(trial)
        starts = sum(operator.starts.values())
        faults.own = False
        trial.bound = faults.kinds[name][1]()
        trial.own = faults.own
        trial.ended, trial.left_running = time.monotonic(), operator.state != "RUNNING"
        restarted = sum(operator.starts.values()) > starts
        trial.recovered_in = operator.recover(RECOVER_PROCESS if restarted else RECOVER)
        trial.recovered_at = time.monotonic()
        print(
            f"{len(trials):4d} {name:18} {'left RUNNING' if trial.left_running else '':12} "
            f"back in {trial.recovered_in if trial.recovered_in is None else round(trial.recovered_in, 2)} s",
            file=sys.stderr,
            flush=True,
        )
        for child in operator.children.values():
            child.check()
    return trials


# ---- what the arm did


def judge_stops(record: RobotRecord, trials: list[Trial], arm: int, slack: float) -> list[str]:
    """Sets `rest_in` of every trial that must stop the arm; returns what came too late."""
    late = []
    speed = np.abs(record.velocity[:, :arm]).max(axis=1)
    for trial in trials:
        if trial.bound is None:
            continue
        begin, end = np.searchsorted(record.wall, [trial.began, trial.ended])
        moving = begin + np.flatnonzero(speed[begin:end] >= STILL)
        if not len(moving):
            trial.rest_in = 0.0
        elif moving[-1] + 1 < end:
            trial.rest_in = float(record.wall[moving[-1] + 1] - trial.began)
        elif trial.ended - trial.began > trial.bound + slack:
            trial.rest_in = np.inf
        if trial.rest_in is not None and trial.rest_in > trial.bound + slack:
            late.append(f"{trial.fault}: at rest after {trial.rest_in:.3f} s, not {trial.bound:.3f} + {slack:g} s")
    return late


def _largest(values: np.ndarray) -> float | None:
    return round(float(values.max()), 4) if len(values) else None


def judge_motion(record: RobotRecord, trials: list[Trial], profile: Profile) -> tuple[dict[str, Any], list[str]]:
    """Positions, speeds and accelerations of every control step against the limits."""
    limits, arm = profile.read_limits(), slice(0, len(profile.joints))
    violations = []
    figures: dict[str, Any] = {"control_steps": len(record.time)}
    for name, values, slack in (
        ("measured", record.position, MEASURED_SLACK),
        ("commanded", record.command, COMMAND_SLACK),
    ):
        outside = np.maximum(limits.low - values, values - limits.high)[:, arm].max(axis=1)
        figures[f"{name}_position_beyond_limit_max_rad"] = round(float(outside.max()), 6)
        if (outside > slack).any():
            violations.append(f"{name} position: {outside.max():.4f} rad beyond its limit")
    own, steps = np.zeros(len(record.time), bool), round(0.1 / CONTROL)
    gaps = np.flatnonzero(np.diff(record.wall) > 5 * CONTROL)
    spans = [(trial.began, trial.ended + CAUGHT_UP) for trial in trials if trial.own]
    spans += [(record.wall[k], record.wall[k + 1] + CAUGHT_UP) for k in gaps]
    for begin, end in spans:
        own[np.searchsorted(record.wall, begin) : np.searchsorted(record.wall, end)] = True
    arrivals = np.flatnonzero(np.diff(record.accepted.astype(np.int64)) > 0) + 1
    late = np.zeros(len(own), bool)
    for k in arrivals[1:][np.diff(record.wall[arrivals]) > LATE]:
        late[k : k + steps] = True
    figures["control_steps_of_the_robots_own_faults"] = int(own.sum())
    figures["control_steps_after_late_commands"] = int((late & ~own).sum())
    excused = own | late
    figures["times_the_robot_lost_time"] = len(gaps)
    moved = record.command[steps:, arm] - record.command[:-steps, arm]
    mean_speed = moved / (record.time[steps:] - record.time[:-steps])[:, None]
    gain = (mean_speed[steps:] - mean_speed[:-steps]) / (steps * CONTROL)

    def over(span: int, mask: np.ndarray) -> np.ndarray:
        """Whether any of `span` steps is in the mask."""
        return np.convolve(mask, np.ones(span), "valid") > 0

    for name, values, limit, factor, span in (
        ("measured_speed", record.velocity[:, arm], limits.velocity[arm], 1.15, 1),
        ("commanded_speed_over_0.1_s", mean_speed, limits.velocity[arm], 1.4, steps + 1),
        ("commanded_acceleration_over_0.1_s", gain, limits.acceleration[arm], 1.4, 2 * steps + 1),
    ):
        ratio = (np.abs(values) / limit).max(axis=1)
        beyond = (np.abs(values) > limit * factor + 0.02).any(axis=1)
        robots, excuse = over(span, own), over(span, excused)
        delivered = excuse & ~robots
        figures[f"{name}_over_limit"] = {
            "max": _largest(ratio[~excuse]),
            "p99_9": round(float(np.quantile(ratio[~excuse], 0.999)), 4),
            "max_after_late_commands": _largest(ratio[delivered]),
            "steps_beyond_after_late_commands": int((beyond & delivered).sum()),
            "max_in_the_robots_own_faults": _largest(ratio[robots]),
        }
        if found := int((beyond & ~excuse).sum()):
            violations.append(f"{name}: {found} control steps beyond {factor} times the limit + 0.02")
        if delivered.any() and ratio[delivered].max() > MADE_UP:
            violations.append(f"{name}: {ratio[delivered].max():.2f} times the limit after a late command")
    return figures, violations


def stood_still(record: RobotRecord, trials: list[Trial], arm: int) -> list[str]:
    """After which faults the bridge said RUNNING, and yet the arm did not move until the next fault."""
    found = []
    for trial, following in itertools.pairwise(trials):
        after = record.between(trial.recovered_at, following.began)
        if trial.recovered_in is not None and not (np.abs(after.velocity[:, :arm]) > MOVING).any():
            found.append(f"{trial.fault}: RUNNING again, but the arm stood still")
    return found


def by_fault(trials: list[Trial]) -> dict[str, Any]:
    table = {}
    for name in sorted({trial.fault for trial in trials}):
        mine = [trial for trial in trials if trial.fault == name]
        rests = [trial.rest_in for trial in mine if trial.rest_in is not None]
        back = [trial.recovered_in for trial in mine if trial.recovered_in is not None]
        table[name] = {
            "count": len(mine),
            "left_running": sum(trial.left_running for trial in mine),
            "must_rest_within_s": round(mine[0].bound, 3) if mine[0].bound is not None else None,
            "at_rest_worst_s": round(max(rests), 3) if rests else None,
            "at_rest_judged": len(rests),
            "back_to_running_worst_s": round(max(back), 2) if back else None,
            "not_recovered": len(mine) - len(back),
        }
    return table


@contextlib.contextmanager
def operating(folder: Path) -> Iterator[Operator]:
    parts = {"bundle": swinging_bundle(folder), "scene": picture_scene(folder / "scene", 64, 64)}
    safety = {"deadman_required": True, "estop_required": True}
    profile = swinging_profile(folder / "tiny.yaml", "jtc", safety)
    operator = Operator(folder, profile, parts)
    try:
        yield operator
    finally:
        operator.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slack", type=float, default=0.15, help="what a busy host may add to a deadline [s]")
    parser.add_argument("--keep", type=Path, default=None, help="folder for logs, otherwise they are removed")
    options = parser.parse_args()
    before = machine()["load_average"]
    warm_up = min(180.0, 15 * options.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with operating(folder) as operator:
            watcher = Watcher(lambda: operator.children)
            watcher.start()
            trials = run(operator, options.minutes, options.seed)
            watcher.closing.set()
            watcher.join()
            state, sent = dict(operator.deployment.state), dict(operator.sent)
        if options.keep:
            about: dict[str, Any] = {"trials": [dataclasses.asdict(trial) for trial in trials]}
            about["processes"] = [[*key, samples] for key, samples in watcher.lives.items()]
            (folder / "run.json").write_text(json.dumps(about))
        record = read_robot_log(operator.log)
        motion, violations = judge_motion(record, trials, operator.profile)
        violations += judge_stops(record, trials, len(operator.profile.joints), options.slack)
    violations += stood_still(record, trials, len(operator.profile.joints))
    if sent["position"] > COMMAND_SLACK or sent["velocity"] > 1.001:
        violations.append(f"sent: {sent}")
    violations += [f"{t.fault}: never RUNNING again" for t in trials if t.recovered_in is None]
    violations += [f"the safety process counts {key} {state[key]}" for key in ("violations", "bugs") if int(state[key])]
    lives = [
        {"process": name, **life(samples, warm_up if name in WHOLE_RUN else WARM_UP)}
        for (name, _), samples in watcher.lives.items()
        if len(samples) > 1
    ]
    for about in lives:
        if not about["judged"] or about["process"] == "operator":  # this process keeps the trials and every latency
            continue
        if about["rss_ratio"] > GROWTH:
            violations.append(f"memory of {about['process']}: {about['rss_ratio']} after {about['seconds']} s")
        for what in ("threads", "files"):
            if about[f"{what}_last"] > about[f"{what}_first"]:
                violations.append(f"{what} of {about['process']}: {about[f'{what}_first']} -> {about[f'{what}_last']}")
    write_result(
        "bridge_faults",
        {
            "minutes": options.minutes,
            "seed": options.seed,
            "slack_s": options.slack,
            "load_average_before": before,
            "faults": len(trials),
            "recovered": sum(trial.recovered_in is not None for trial in trials),
            "violations": violations,
            "by_fault": by_fault(trials),
            "motion": motion,
            "sent_over_limit": {key: round(value, 6) for key, value in sent.items()},
            "processes": lives,
        },
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
