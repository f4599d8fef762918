"""Write a simulated task as the scene folder that `robot_bridge`'s MuJoCo robot loads: same model, same pictures.

The schema of scene.json stands in robot_bridge/scene.py; the two rooms meet in the file, not in an import.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError
from embodied.sim.render import HIDDEN_GROUPS, RENDER_FLAGS, check_views
from embodied.sim.robosuite_lift import CAMERAS, GRIPPER_JOINT, GRIPPER_OPEN, JOINTS, LiftEnv

_FINGERS = ((1, 1.0), (2, -1.0))  # finger, sign of its joint when the hand opens


def initial_state(env: LiftEnv, seed: int) -> dict[str, list[float]]:
    """The full simulator state that `env.reset(seed)` starts from: qpos, qvel, ctrl."""
    env.reset(seed)
    return {name: getattr(env.data, name).tolist() for name in ("qpos", "qvel", "ctrl")}


def initial_states(seeds: Sequence[int]) -> list[dict[str, list[float]]]:
    """One state per seed, without rendering."""
    env = LiftEnv(cameras=())
    return [initial_state(env, seed) for seed in seeds]


def export_scene(
    folder: Path,
    cameras: Sequence[str] = ("wrist",),
    image_size: int = 64,
    seed: int = 0,
    joints: Sequence[str] = JOINTS,
    gripper: tuple[str, float] = (GRIPPER_JOINT, GRIPPER_OPEN),
) -> Path:
    """Write scene.xml and scene.json of robosuite/Lift into `folder`; returns it.

    Args:
        cameras: those the robot publishes; each costs a picture per camera period.
        seed: of the state the scene starts in.
        joints: ROS names of the seven joints.
        gripper: ROS name of the gripper's joint, and its position when open; closed is 0.
    """
    if len(joints) != len(JOINTS):
        raise InputError(f"robosuite/Lift has a Panda of {len(JOINTS)} joints, the profile {len(joints)}.")
    scale = gripper[1] / GRIPPER_OPEN
    about = "robosuite's Lift: a Panda with position servos and its own gripper, a cube on a table"
    if tuple(joints) != JOINTS:
        about += "; the joints have the profile's names, ranges and link lengths are the Panda's"
    check_views("robosuite/Lift", CAMERAS, cameras, image_size)
    env = LiftEnv(cameras=())
    scene: dict[str, Any] = {
        "schema": 1,
        "about": about,
        "base": "robot0_link0",
        "tool": "gripper0_right_grip_site",
        "joints": {
            name: {"joint": f"robot0_joint{i}", "actuator": f"servo_{JOINTS[i - 1]}"}
            for i, name in enumerate(joints, start=1)
        },
        "gripper": {
            "name": gripper[0],
            "joints": {f"gripper0_right_finger_joint{i}": sign * scale for i, sign in _FINGERS},
            "actuators": {f"gripper0_right_gripper_finger_joint{i}": sign / 2 / scale for i, sign in _FINGERS},
        },
        "cameras": {c: {"camera": CAMERAS[c], "width": image_size, "height": image_size} for c in cameras},
        "bodies": {"cube": "cube_main"},
        "sites": {"eef": "gripper0_right_grip_site"},
        "initial": initial_state(env, seed),
        "render": {
            "flags": RENDER_FLAGS,
            "geomgroup": [int(group not in HIDDEN_GROUPS) for group in range(5)] + [0],
            "sitegroup": [0] * 6,
            "offsamples": 0,
        },
    }
    return write_scene(folder, env.scene.xml, scene)


def write_scene(folder: Path, xml: str, scene: Mapping[str, Any]) -> Path:
    """Write scene.xml and scene.json, each whole; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("scene.xml", xml), ("scene.json", json.dumps(scene, indent=1))):
        temporary = folder / f".{name}"
        temporary.write_text(text)
        temporary.replace(folder / name)
    return folder
