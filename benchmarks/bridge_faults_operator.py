"""The deployment under faults: its processes, the operator's switches, and what they take in memory."""

import collections
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bridge_parts import child_environment

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.node import EventLog, now_ns
from embodied.robot_bridge.processes import Child, free_domain
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED
from embodied.robot_bridge.robot_options import FAULT_TOPIC
from embodied.robot_bridge.safety_node import COMMAND_TOPIC, ESTOP_TOPIC, MODE_TOPIC, STATE_TOPIC

HEARTBEAT = 0.05  # of deadman and e-stop [s]
MISSED = 3  # ticks of 5 ms between two of the safety process's reports: it was not scheduled
BAG_EVERY = 20.0  # a bag keeps an index of its messages: memory rises and falls with each [s]

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
        self.safety_late: list[tuple[float, float]] = []  # when its process was not scheduled, to a tenth of a second
        self._missed, self._state_at = 0, 0.0
        self.transport.subscriber(STATE_TOPIC, m.DIAGNOSTIC_ARRAY, LATCHED, self._on_state)
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

    def _on_state(self, data: bytes, received_ns: int) -> None:
        """The safety process counts the ticks that it missed, by its own clock."""
        missed, at = int(m.read_diagnostics(data)["missed_ticks"]), received_ns * 1e-9
        if missed - self._missed >= MISSED:
            self.safety_late.append((self._state_at, at))
        self._missed, self._state_at = missed, at

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
        self._closing.set()  # what beats on its own writes no more
        self.deployment.close()
        self.robot.end()
