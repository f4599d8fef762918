"""robosuite's Lift with a Panda, its joints driven by position servos as a ros2_control arm's are.

Scene, placement range, initial posture, success rule and shaped reward are robosuite 1.5's. Two things differ, for one
reason each. The torque motors are replaced by MuJoCo position servos, so that a step is five C calls instead of 50
calls of a Python controller, and so that the same scene file serves as the robot on the ROS 2 graph. The episode never
terminates: success is reported in `info`, since a termination at success turns a positive learned reward into a reason
to fail.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import MissingExtraError
from embodied.contracts.provenance import hash_file, hash_json
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.sim.render import Pictured, check_views, load_mujoco, use_software_gl

CONTROL_DT = 0.1  # [s]
HORIZON = 50  # control steps in an episode
JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
GRIPPER_JOINT = "panda_finger_joint"  # position is the opening between both fingers [m]
JOINT_SCALE = 0.1  # action 1.0 moves a joint target by this much in one control step [rad]
GRIPPER_OPEN, GRIPPER_STEP = 0.08, 0.04  # opening [m]; largest change per control step [m], 0.4 m/s
MAX_LEAD = 0.2  # a joint target stays this close to the measured joint [rad]: no wind-up against a contact
SERVO_SPLITS = 5  # the command is interpolated linearly in this many pieces per control step
# Critically damped at 50 rad/s on robosuite's armature (5 / joint number [kg m^2]): the joints follow a ramp 40 ms
# late, as those of a stiff position-controlled arm do. Torque limits: FR3 data sheet [N·m].
SERVO_KP = (12500.0, 6250.0, 4170.0, 3125.0, 2500.0, 2080.0, 1790.0)
SERVO_KV = (500.0, 250.0, 167.0, 125.0, 100.0, 83.0, 71.0)
SERVO_TORQUE = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)
CAMERAS = {"wrist": "robot0_eye_in_hand", "side": "side"}
SIDE_CAMERA = {"pos": (0.02, -0.62, 1.0), "target": (0.0, 0.0, 0.895), "fovy": 36.0}
SUCCESS_HEIGHT = 0.04  # robosuite: cube centre this far above the table top [m]
TABLE_HEIGHT = 0.8  # [m]
_MODEL_SEED = 0  # robosuite draws the cube's size when it builds the model


@dataclasses.dataclass(frozen=True)
class LiftScene:
    """What `build_scene` takes from robosuite.

    Attributes:
        xml: MJCF with absolute mesh paths.
        initial_joints: (7,) robosuite's initial posture [rad].
        placement: half range of the cube's initial x and y [m].
    """

    xml: str
    initial_joints: tuple[float, ...]
    placement: float


def _camera_quat(position: Sequence[float], target: Sequence[float]) -> str:
    backward = np.subtract(position, target)
    backward = backward / np.linalg.norm(backward)
    right = np.cross([0, 0, 1], backward)
    right /= np.linalg.norm(right)
    up = np.cross(backward, right)
    return " ".join(f"{v:.9g}" for v in (*right, *up))


def _servo_xml(xml: str) -> str:
    """Replace torque motors by position servos, compensate the arm's own weight and add the side camera."""
    root = ElementTree.fromstring(xml)
    actuator = root.find("actuator")
    assert actuator is not None
    joints = {j.get("name"): j for j in root.iter("joint")}
    for index, motor in enumerate([m for m in actuator if str(m.get("joint")).startswith("robot0_joint")]):
        name = motor.get("joint")
        actuator.remove(motor)
        servo = {
            "name": f"servo_{JOINTS[index]}",
            "joint": str(name),
            "kp": str(SERVO_KP[index]),
            "kv": str(SERVO_KV[index]),
            "ctrlrange": str(joints[name].get("range")),
            "forcerange": f"{-SERVO_TORQUE[index]} {SERVO_TORQUE[index]}",
        }
        actuator.insert(index, ElementTree.Element("position", servo))
    robot = next(b for b in root.iter("body") if b.get("name") == "robot0_base")
    for body in robot.iter("body"):
        body.set("gravcomp", "1")
    worldbody = root.find("worldbody")
    assert worldbody is not None
    position, target = SIDE_CAMERA["pos"], SIDE_CAMERA["target"]
    camera = {"name": "side", "pos": " ".join(map(str, position)), "xyaxes": _camera_quat(position, target)}
    ElementTree.SubElement(worldbody, "camera", camera | {"fovy": str(SIDE_CAMERA["fovy"])})
    return ElementTree.tostring(root, encoding="unicode")


def _build_with_robosuite() -> LiftScene:
    try:
        # robosuite logs five warnings about optional parts on import.
        logging.disable(logging.WARNING)
        import robosuite

        env = robosuite.make(
            "Lift",
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=1 / CONTROL_DT,
            seed=_MODEL_SEED,
        )
    except ImportError as error:
        raise MissingExtraError("robosuite", "sim", "the environment robosuite/Lift") from error
    finally:
        logging.disable(logging.NOTSET)
    placement = float(env.placement_initializer.x_range[1])
    initial = tuple(float(q) for q in env.robots[0].init_qpos)
    xml = _servo_xml(env.sim.model.get_xml())
    env.close()
    return LiftScene(xml, initial, placement)


@functools.cache
def build_scene() -> LiftScene:
    """robosuite's Lift as a servo-driven scene.

    Importing robosuite and building the task takes seconds, so the result is kept in the cache folder, keyed by the
    versions of robosuite and MuJoCo, where they are installed, and this file.
    """
    use_software_gl()
    try:
        found = [importlib.metadata.distribution(name) for name in ("robosuite", "mujoco")]
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(str(error.name), "sim", "the environment robosuite/Lift") from error
    key = hash_json([[str(d.locate_file("")), d.version] for d in found] + [hash_file(Path(__file__))])
    folder = Path(os.environ.get("EMBODIED_CACHE") or Path.home() / ".cache" / "embodied")
    path = folder / f"lift-{key[:16]}.json"
    try:
        return LiftScene(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        scene = _build_with_robosuite()
    with contextlib.suppress(OSError):  # a read-only home only costs time
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(scene)))
        temporary.replace(path)
    return scene


def dataset_spec(cameras: Sequence[str], image_size: int) -> DatasetSpec:
    """The arrays this environment gives per frame."""
    observations = {
        "joint_position": ArraySpec((7,), unit="rad", names=JOINTS),
        "joint_velocity": ArraySpec((7,), unit="rad/s", names=JOINTS),
        "gripper_position": ArraySpec((1,), unit="m", names=(GRIPPER_JOINT,), low=(0.0,), high=(GRIPPER_OPEN,)),
        "joint_target": ArraySpec((8,), unit="rad, m", names=(*JOINTS, GRIPPER_JOINT)),
        "cube_position": ArraySpec((3,), unit="m", names=("x", "y", "z"), privileged=True),
        "eef_position": ArraySpec((3,), unit="m", names=("x", "y", "z"), privileged=True),
        "cube_grasped": ArraySpec((1,), privileged=True),
    }
    action = ActionSpec(
        (8,),
        names=(*JOINTS, GRIPPER_JOINT),
        low=(-1.0,) * 8,
        high=(1.0,) * 8,
        unit="rad, m",
        control_mode="joint_position_delta",
        scale=(JOINT_SCALE,) * 7 + (GRIPPER_STEP,),
    )
    images = {camera: ArraySpec((image_size, image_size, 3), dtype="uint8") for camera in cameras}
    return DatasetSpec(observations, images, action, CONTROL_DT, "robosuite/Lift")


class LiftEnv(Pictured):
    """Gymnasium's reset and step over the servo-driven scene.

    Args:
        cameras: which of `wrist` and `side` to render at every step; none is fastest.
        image_size: height and width [px].
    """

    horizon = HORIZON
    camera_names = CAMERAS

    def __init__(self, cameras: Sequence[str] = ("wrist",), image_size: int = 64) -> None:
        check_views("robosuite/Lift", CAMERAS, cameras, image_size)
        mujoco = load_mujoco()
        self._mujoco = mujoco
        self.scene = build_scene()
        self.model = mujoco.MjModel.from_xml_string(self.scene.xml)
        self.data = mujoco.MjData(self.model)
        self.spec = dataset_spec(cameras, image_size)
        self.cameras, self._size = tuple(cameras), image_size
        joint_ids = [self.model.joint(f"robot0_joint{i}").id for i in range(1, 8)]
        self.arm_qpos = self.model.jnt_qposadr[joint_ids]
        self.arm_dofs = self.model.jnt_dofadr[joint_ids]
        self.joint_range = self.model.jnt_range[joint_ids]
        self._fingers = [self.model.joint(f"gripper0_right_finger_joint{i}").qposadr[0] for i in (1, 2)]
        self._cube = self.model.joint("cube_joint0").qposadr[0]
        self.cube_body = self.model.body("cube_main").id
        self._cube_geoms = [g for g in range(self.model.ngeom) if self.model.geom_bodyid[g] == self.cube_body]
        names = {g: self.model.geom(g).name or "" for g in range(self.model.ngeom)}
        self._pads = [{g for g, name in names.items() if f"finger{i}_" in name} for i in (1, 2)]
        self.grip_site = self.model.site("gripper0_right_grip_site").id
        self._substeps = round(CONTROL_DT / self.model.opt.timestep / SERVO_SPLITS)
        self.target = np.zeros(8)

    def initial_state(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The joints (7,) [rad] and the cube's pose (7,) [m, quat_wxyz] that `reset(seed)` starts from."""
        rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
        joints = np.array(self.scene.initial_joints) + rng.normal(0.0, 0.02, 7)
        x, y = rng.uniform(-self.scene.placement, self.scene.placement, 2)
        angle = rng.uniform(-np.pi, np.pi)
        height = TABLE_HEIGHT + float(self.model.geom_size[self._cube_geoms[0]][2])
        return joints, np.array([x, y, height, np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; equal seeds give equal episodes on every machine."""
        joints, cube = self.initial_state(seed)
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self.arm_qpos] = joints
        self.data.qpos[self._fingers] = GRIPPER_OPEN / 2, -GRIPPER_OPEN / 2
        self.data.qpos[self._cube : self._cube + 7] = cube
        self.target = np.array([*joints, GRIPPER_OPEN])
        self._command(self.target)
        self._mujoco.mj_step(self.model, self.data, nstep=self._substeps)
        self.steps = 0
        return self._observe(), {"success": False}

    def _command(self, target: np.ndarray) -> None:
        self.data.ctrl[:7] = target[:7]
        self.data.ctrl[7:9] = target[7] / 2, -target[7] / 2

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move the targets by one action, (8,) in [-1, 1], and simulate one control step.

        The last entry opens the gripper when negative, closes it when positive. The reward is robosuite's shaped one.
        """
        previous = self.target
        self.target = self.next_target(previous, action)
        for piece in range(1, SERVO_SPLITS + 1):
            self._command(previous + (self.target - previous) * piece / SERVO_SPLITS)
            self._mujoco.mj_step(self.model, self.data, nstep=self._substeps)
        self.steps += 1
        observation = self._observe()
        success = bool(is_success(observation["cube_position"]))
        reward = float(shaped_reward(**{k: observation[k] for k in REWARD_KEYS}))
        return observation, reward, False, self.steps >= HORIZON, {"success": success}

    def next_target(self, previous: np.ndarray, action: np.ndarray) -> np.ndarray:
        """(8,) targets after `action`: inside joint limits, within MAX_LEAD of the measured joints."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        measured = self.data.qpos[self.arm_qpos]
        arm = np.clip(previous[:7] + JOINT_SCALE * action[:7], measured - MAX_LEAD, measured + MAX_LEAD)
        wanted = 0.0 if action[7] > 0 else GRIPPER_OPEN
        gripper = previous[7] + np.clip(wanted - previous[7], -GRIPPER_STEP, GRIPPER_STEP)
        return np.array([*np.clip(arm, self.joint_range[:, 0], self.joint_range[:, 1]), gripper])

    def opening(self) -> float:
        """Distance between the fingers [m]."""
        return float(self.data.qpos[self._fingers[0]] - self.data.qpos[self._fingers[1]])

    def grasped(self) -> bool:
        """robosuite's rule: both fingers touch the cube."""
        touching = [False, False]
        for contact in self.data.contact[: self.data.ncon]:
            pair = {int(contact.geom1), int(contact.geom2)}
            if pair & set(self._cube_geoms):
                for finger in range(2):
                    touching[finger] |= bool(pair & self._pads[finger])
        return all(touching)

    def _observe(self) -> dict[str, np.ndarray]:
        data = self.data
        values = {
            "joint_position": data.qpos[self.arm_qpos],
            "joint_velocity": data.qvel[self.arm_dofs],
            "gripper_position": [self.opening()],
            "joint_target": self.target,
            "cube_position": data.xpos[self.cube_body],
            "eef_position": data.site_xpos[self.grip_site],
            "cube_grasped": [self.grasped()],
        }
        observation = {key: np.array(value, np.float32) for key, value in values.items()}
        for camera in self.cameras:
            observation[f"images/{camera}"] = self.render(camera)
        return observation


REWARD_KEYS = ("cube_position", "eef_position", "cube_grasped")


def is_success(cube_position: np.ndarray) -> np.ndarray:
    """(...,) bool from (..., 3) [m]: robosuite's rule, the cube's centre more than 4 cm above the table."""
    return cube_position[..., 2] > TABLE_HEIGHT + SUCCESS_HEIGHT


def shaped_reward(cube_position: np.ndarray, eef_position: np.ndarray, cube_grasped: np.ndarray) -> np.ndarray:
    """(...,) robosuite's shaped reward in [0, 1]: (1 - tanh(10 d) + 0.25 grasped) / 2.25, or 1 when lifted."""
    distance = np.linalg.norm(eef_position - cube_position, axis=-1)
    staged = (1 - np.tanh(10.0 * distance) + 0.25 * cube_grasped[..., 0]) / 2.25
    return np.where(is_success(cube_position), 1.0, staged).astype(np.float32)


def true_progress(cube_position: np.ndarray, eef_position: np.ndarray, cube_grasped: np.ndarray) -> np.ndarray:
    """(...,) in [0, 1]: how far the task has come. Nearness counts half, the grasp 0.1, height up to 10 cm the rest.

    Unlike the shaped reward it does not saturate at the success height, so that ranks stay defined while lifting.
    """
    distance = np.linalg.norm(eef_position - cube_position, axis=-1)
    height = np.clip((cube_position[..., 2] - TABLE_HEIGHT - 0.021) / 0.1, 0.0, 1.0)
    return (0.5 * (1 - np.tanh(5.0 * distance)) + 0.1 * cube_grasped[..., 0] + 0.4 * height).astype(np.float32)
