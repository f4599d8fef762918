"""A two-joint arm with a gripper, its scene, profile and bundles. Put this folder on `sys.path` to import it."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.bundle import PolicyContract, save_policy
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, generators
from embodied.robot_bridge import messages
from embodied.robot_bridge.mujoco_robot import MujocoRobot
from embodied.robot_bridge.profile import Profile, load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, LATEST, SENSOR_DATA, QosProfile
from embodied.robot_bridge.robot_options import RobotOptions
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

JOINTS = ("shoulder", "elbow", "finger")

SCENE_XML = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="0.002" gravity="0 0 0" integrator="implicitfast"/>
  <visual><global offwidth="64" offheight="64"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="eye" pos="0 -1.5 0.5" xyaxes="1 0 0 0 0.3 1"/>
    <body name="cube_body" pos="0.5 0 0.5"><freejoint name="cube_free"/>
      <geom type="box" size="0.02 0.02 0.02" rgba="1 0 0 1" contype="0" conaffinity="0"/></body>
    <body name="upper">
      <joint name="m_shoulder" axis="0 1 0" range="-2 2" armature="0.1"/>
      <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.03" contype="0" conaffinity="0"/>
      <body name="lower" pos="0.3 0 0">
        <joint name="m_elbow" axis="0 1 0" range="-2 2" armature="0.1"/>
        <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.02" contype="0" conaffinity="0"/>
        <site name="tip" pos="0.3 0 0"/>
        <body name="left" pos="0.3 0.02 0">
          <joint name="m_left" type="slide" axis="0 1 0" range="0 0.04" armature="0.05"/>
          <geom type="box" size="0.01 0.005 0.01" contype="0" conaffinity="0"/></body>
        <body name="right" pos="0.3 -0.02 0">
          <joint name="m_right" type="slide" axis="0 1 0" range="-0.04 0" armature="0.05"/>
          <geom type="box" size="0.01 0.005 0.01" contype="0" conaffinity="0"/></body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position name="a_shoulder" joint="m_shoulder" kp="2000" kv="60"/>
    <position name="a_elbow" joint="m_elbow" kp="2000" kv="60"/>
    <position name="a_left" joint="m_left" kp="200" kv="5"/>
    <position name="a_right" joint="m_right" kp="200" kv="5"/>
  </actuator>
</mujoco>
"""
CUBE_QPOS = [0.5, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0]
INITIAL_QPOS = [*CUBE_QPOS, 0.1, -0.2, 0.04, -0.04]

SCENE_JSON = {
    "schema": 1,
    "joints": {
        "shoulder": {"joint": "m_shoulder", "actuator": "a_shoulder"},
        "elbow": {"joint": "m_elbow", "actuator": "a_elbow"},
    },
    "gripper": {
        "name": "finger",
        "joints": {"m_left": 1.0, "m_right": -1.0},
        "actuators": {"a_left": 0.5, "a_right": -0.5},
    },
    "cameras": {"eye": {"camera": "eye", "width": 64, "height": 64}},
    "bodies": {"cube": "cube_body"},
    "sites": {"tip": "tip"},
    "initial": {"qpos": INITIAL_QPOS},
    "render": {"flags": {"shadow": False, "reflection": False}, "geomgroup": [1, 1, 1, 0, 0, 0]},
}
_LIMIT = {"position": [-1.9, 1.9], "velocity": 2.0, "acceleration": 12.0, "jerk": 5000.0, "max_step": 0.3}
PROFILE = {
    "name": "tiny",
    "joints": ["shoulder", "elbow"],
    "gripper": {"joint": "finger", "open": 0.08, "closed": 0.0},
    "topics": {"cameras": {"eye": "/camera/eye/image_raw"}},
    "limits": {
        "shoulder": _LIMIT,
        "elbow": _LIMIT,
        "finger": {"position": [0.0, 0.08], "velocity": 0.5, "acceleration": 20.0, "jerk": 2000.0, "max_step": 0.1},
    },
    "limit_scale": 1.0,
    "position_margin": 0.0,
    "safety": {"deadman_required": False, "tracking_error": 0.2},
    "policy": {"image_timeout": 0.3},
}


def write_scene(folder: Path, **changes: object) -> Path:
    """scene.xml and scene.json; `changes` replace keys of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scene.xml").write_text(SCENE_XML)
    (folder / "scene.json").write_text(json.dumps(SCENE_JSON | changes))
    return folder


def write_profile(path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(PROFILE | changes))
    return path


def tiny_profile(folder: Path, **changes: object) -> Profile:
    return load_profile(write_profile(folder / "tiny.yaml", **changes))


def write_bundle(folder: Path, action: np.ndarray, camera: bool = True) -> Path:
    """A policy that always gives `action` (3,) in (-1, 1), at 10 Hz, 0.1 rad per action."""
    shapes = {"joint_position": (2,), "joint_velocity": (2,), "gripper_position": (1,), "joint_target": (3,)}
    observations = {key: ArraySpec(shape) for key, shape in shapes.items()}
    normalizer = {
        key: {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32)} for key, shape in shapes.items()
    }
    images = {"eye": ArraySpec((64, 64, 3), "uint8")} if camera else {}
    if camera:
        normalizer["images/eye"] = {"mean": np.zeros(8, np.float32), "std": np.ones(8, np.float32)}
    spec = ActionSpec(
        (3,),
        unit="rad, m",
        names=JOINTS,
        low=(-1.0,) * 3,
        high=(1.0,) * 3,
        control_mode="joint_position_delta",
        scale=(0.1, 0.1, 0.04),
    )
    contract = PolicyContract(observations, images, spec, 0.1, normalizer, JOINTS[:2], "tiny")
    actor = Actor(generators([0]), 16 if camera else 8, 3, (8,))
    with torch.no_grad():
        last = actor.mlp.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.atanh(torch.as_tensor(action, dtype=torch.float32)))
    encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=8), generators([1])[0]) if camera else None
    return save_policy(folder, actor.state_dict(), contract, {"algorithm": "test"}, {"made_by": "test"}, encoder)


class Clock:
    """Virtual time shared by every node of a test."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def monotonic_ns(self) -> int:
        return round(self.seconds * 1e9)

    def stamp(self) -> int:
        """System clock [ns]: another epoch, as on a real host."""
        return round((self.seconds + 1.7e9) * 1e9)


class RobotRig:
    """A robot on a memory bus under virtual time; `scene` and the other changes are keys of scene.json and profile."""

    def __init__(
        self, folder: Path, options: RobotOptions | None = None, scene: dict | None = None, **changes: object
    ) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        profile = tiny_profile(folder, **changes)
        self.arm = SimulatedArm(load_scene(write_scene(folder, **(scene or {}))))
        self.transport = MemoryTransport(self.bus, "mujoco_robot")
        clocks = (self.clock.monotonic, self.clock.stamp)
        self.robot = MujocoRobot(self.arm, profile, self.transport, *clocks, options)
        self.seen: dict[str, list[bytes]] = {}
        peer = self.peer = MemoryTransport(self.bus)
        for topic, kind, qos in (
            ("/joint_states", messages.JOINT_STATE, LATEST),
            ("/camera/eye/image_raw", messages.IMAGE, SENSOR_DATA),
            ("/sim/pose/cube", messages.POSE_STAMPED, LATEST),
            ("/sim/pose/tip", messages.POSE_STAMPED, LATEST),
            ("/sim/status", messages.STRING, LATCHED),
        ):
            self.listen(topic, kind, qos)
        self.command = peer.publisher(profile.topics.command, messages.JOINT_TRAJECTORY, COMMAND)
        self.array = peer.publisher(profile.topics.command, messages.FLOAT_ARRAY, COMMAND)
        self.twist = peer.publisher(profile.topics.command, messages.TWIST_STAMPED, COMMAND)
        self.reset = peer.publisher("/sim/reset", messages.STRING, DEFAULT)
        self.fault = peer.publisher("/sim/fault", messages.STRING, DEFAULT)

    def listen(self, topic: str, kind: str, qos: QosProfile = LATEST) -> list[bytes]:
        seen = self.seen[topic] = []
        self.peer.subscriber(topic, kind, qos, lambda data, _: seen.append(data))
        return seen

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.clock.seconds += 0.01
            self.robot.tick()

    def states(self) -> list[messages.JointSample]:
        return [messages.read_joint_state(data) for data in self.seen["/joint_states"]]

    def move(self, target: list[float], seconds: float, names: tuple[str, ...] = JOINTS) -> None:
        rows, rest = np.array([target], float), np.zeros((1, len(names)))
        self.command.write(
            messages.joint_trajectory(messages.Trajectory(0, "", names, np.array([seconds]), rows, rest))
        )

    def inject(self, fault: str, **values: object) -> None:
        self.fault.write(messages.json_string({"fault": fault, **values}))
