"""A safety process, its adapter and the simulated robot's controller on a memory bus, under virtual time.

Chunks are written by hand: `follow` turns a path of targets into them. Put this folder on `sys.path` to import it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bridge_fixtures import Clock, tiny_profile, write_scene

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.messages import Trajectory
from embodied.robot_bridge.mujoco_robot import MujocoRobot
from embodied.robot_bridge.profile import Profile, load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATEST
from embodied.robot_bridge.robot_options import RobotOptions
from embodied.robot_bridge.safety import State, Tick
from embodied.robot_bridge.safety_node import SafetyNode
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

TICK = 0.01  # [s]

# Three slides and three hinges through one point: the tool's axes are the joints, so a twist is easy to judge.
GANTRY = ("gx", "gy", "gz", "ga", "gb", "gc")
_BODIES = (("gx", "slide", "1 0 0"), ("gy", "slide", "0 1 0"), ("gz", "slide", "0 0 1"))
_BODIES += (("ga", "hinge", "1 0 0"), ("gb", "hinge", "0 1 0"), ("gc", "hinge", "0 0 1"))


def gantry_scene(folder: Path) -> Path:
    inside = '<body name="flange" pos="0 0 0"><geom type="sphere" size="0.02" mass="0.2"/><site name="tip"/></body>'
    for name, kind, axis in reversed(_BODIES):
        joint = f'<joint name="{name}" type="{kind}" axis="{axis}" armature="0.5" range="-2 2"/>'
        inside = f'<body name="b_{name}">{joint}<geom type="sphere" size="0.01" mass="0.1"/>{inside}</body>'
    servos = "".join(f'<position name="a_{n}" joint="{n}" kp="4000" kv="120"/>' for n, _, _ in _BODIES)
    xml = f"""
    <mujoco><compiler angle="radian"/><option timestep="0.002" gravity="0 0 0" integrator="implicitfast"/>
    <default><geom contype="0" conaffinity="0"/></default>
    <worldbody><body name="base_link">{inside}</body></worldbody><actuator>{servos}</actuator></mujoco>"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scene.xml").write_text(xml)
    scene = {
        "schema": 1,
        "joints": {n: {"joint": n, "actuator": f"a_{n}"} for n in GANTRY},
        "base": "base_link",
        "tool": "tip",
        "initial": {"qpos": [0.1, 0.0, 0.3, 0.0, 0.0, 0.0]},
    }
    (folder / "scene.json").write_text(json.dumps(scene))
    return folder


def gantry_profile(folder: Path, **changes: Any) -> Profile:
    limit = {"position": [-2.0, 2.0], "velocity": 2.0, "acceleration": 12.0, "jerk": 5000.0, "max_step": 0.3}
    data = {
        "name": "gantry",
        "joints": list(GANTRY),
        "adapter": "servo_twist",
        "description": {"urdf": "scene.xml", "base": "base_link", "tool": "tip"},
        "limits": {name: limit for name in GANTRY},
        "limit_scale": 1.0,
        "servo": {"frame": "base_link", "linear": 0.2, "angular": 0.5},
        "topics": {"command": "/servo_node/delta_twist_cmds"},
        "safety": {"deadman_required": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gantry.yaml").write_text(yaml.safe_dump(data | changes))
    return load_profile(folder / "gantry.yaml")


class AdapterRig:
    """Robot and safety process; `run` lets virtual time pass.

    Attributes:
        path: (N, J) measured joints after each step; speed: (N, J).
        sent: what went out on the command topic, as bytes.
        commands: what /bridge/command said.
    """

    def __init__(
        self, folder: Path, profile: Profile | None = None, options: RobotOptions | None = None, **node: Any
    ) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        scene = write_scene(folder) if profile is None or profile.name == "tiny" else folder
        self.profile = profile or tiny_profile(folder)
        self.arm = SimulatedArm(load_scene(scene))
        clocks = self.clock.monotonic, self.clock.stamp
        self.robot = MujocoRobot(self.arm, self.profile, self.transport("robot"), *clocks, options)
        self.safety: SafetyNode | None = SafetyNode(self.profile, self.transport("safety"), *clocks, **node)
        self.operator = self.transport("operator")
        self._mode = self.operator.publisher("/bridge/mode", m.STRING, DEFAULT)
        self._chunk = self.operator.publisher("/bridge/chunk", m.JOINT_TRAJECTORY, COMMAND)
        self.sequence = 0
        self.path: list[np.ndarray] = []
        self.speed: list[np.ndarray] = []
        self.sent: list[bytes] = []
        self.commands: list[Trajectory] = []
        self.events: list[dict[str, Any]] = []
        self.tick: Tick | None = None
        self.before_step: Callable[[], object] = lambda: None
        command, kind = self.profile.topics.command, self.robot.mounted[0].message_type
        self.operator.subscriber(command, kind, LATEST, lambda data, _: self.sent.append(data))
        self.operator.subscriber(
            "/bridge/command",
            m.JOINT_TRAJECTORY,
            DEFAULT,
            lambda data, _: self.commands.append(m.read_joint_trajectory(data)),
        )
        self.operator.subscriber("/bridge/event", m.STRING, EVENTS, lambda d, _: self.events.append(m.read_json(d)))

    def transport(self, node: str) -> MemoryTransport:
        return MemoryTransport(self.bus, node)

    @property
    def state(self) -> State:
        assert self.safety is not None
        return self.safety.filter.state

    def run(self, seconds: float) -> "AdapterRig":
        for _ in range(round(seconds / TICK)):
            self.clock.seconds += TICK
            self.before_step()
            self.robot.tick()
            if self.safety is not None:
                self.tick = self.safety.tick()
            position, velocity = self.arm.joint_state()
            self.path.append(position.copy())
            self.speed.append(velocity.copy())
        return self

    def send(self, mode: str) -> None:
        self._mode.write(m.string(mode))
        self.run(0.05)

    def start(self) -> "AdapterRig":
        self.run(0.3)
        self.send("arm")
        self.send("run")
        assert self.state is State.RUNNING, self.events
        return self

    def offer(self, targets: Any, names: tuple[str, ...] | None = None, dt: float = 0.1) -> None:
        """A chunk of targets (K, J), observed now."""
        self.sequence += 1
        rows = np.atleast_2d(np.asarray(targets, np.float64))
        assert self.safety is not None
        columns = names or self.safety.commands.limits.names
        times = dt * np.arange(1, len(rows) + 1)
        chunk = Trajectory(self.clock.stamp(), f"policy:r:{self.sequence}", columns, times, rows)
        self._chunk.write(m.joint_trajectory(chunk))

    def follow(self, start: np.ndarray, velocity: np.ndarray, seconds: float) -> np.ndarray:
        """Offer targets that move from `start` (J,) at `velocity` (J,), ten times a second; returns the last."""
        target = np.array(start, np.float64)
        for _ in range(round(seconds / 0.1)):
            target = target + 0.1 * np.asarray(velocity)
            self.offer(target)
            self.run(0.1)
        return target
