"""The faults of bridge_faults.py: each makes one, and says how long the arm may move on after it."""

import functools
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bridge_faults_operator import HEARTBEAT, Operator

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.node import now_ns
from embodied.robot_bridge.qos import COMMAND
from embodied.robot_bridge.safety_node import CHUNK_TOPIC
from embodied.robot_bridge.transport import open_transport

PERIOD = 0.1  # of the policy [s]
RECOVER = 15.0  # [s]

HOG = """
import runpy, sys, threading
def spin():
    while True:
        sum(range(1000))
threading.Thread(target=spin, daemon=True).start()
sys.argv = ["policy_node", *sys.argv[1:]]
runpy.run_module("embodied.robot_bridge.policy_node", run_name="__main__")
"""


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
