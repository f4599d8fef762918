"""A MuJoCo scene as the robot process needs it: `scene.xml` and, beside it, `scene.json`.

`scene.xml` is a self-contained MJCF (absolute mesh and texture paths). Each arm joint is driven by a position actuator
(ctrl = joint target [rad]); a gripper by any number of position actuators whose ctrl is a multiple of one opening [m].

`scene.json` (every key of this list, no other; those marked * may be left out):

    {
      "schema": 1,
      "joints": {                              ROS joint name -> MJCF; this order is the order in /joint_states
        "panda_joint1": {"joint": "robot0_joint1", "actuator": "robot0_position_joint1"}, ...
      },
      "gripper": {                             * null or absent: no gripper
        "name": "panda_finger_joint",          ROS joint; position = total opening [m]
        "joints":    {"gripper0_finger_joint1": 1.0, "gripper0_finger_joint2": -1.0},   opening = sum of gain * qpos
        "actuators": {"gripper0_finger1": 0.5, "gripper0_finger2": -0.5}               ctrl = gain * opening
      },
      "cameras": {                             * the name is the observation's `images/<name>` and the profile's camera
        "wrist": {"camera": "robot0_eye_in_hand", "width": 64, "height": 64}, ...
      },
      "bodies": {"cube": "cube_main", ...},    * published as /sim/pose/<name>: body origin in the world frame
      "sites":  {"eef": "gripper0_grip_site"}, * the same for sites
      "base": "robot0_base",                   * body whose frame is the profile's description.base; the world without
      "tool": "gripper0_grip_site",            * site whose frame is description.tool; a twist command needs it
      "description": "robot.urdf",             * file beside this one for /robot_description; scene.xml itself without
      "about": "robosuite's Panda, ...",       * what the model is, and what it is not: shown to whoever runs it
      "initial": {"qpos": [nq numbers], "qvel": [nv numbers]*, "ctrl": [nu numbers]*},
      "render": {                              * pictures are those of `sim` pixel by pixel if this is what `sim` used
        "flags": {"shadow": false, "reflection": false, "haze": false, "skybox": false},   mjtRndFlag, lower case
        "geomgroup": [0, 1, 1, 1, 1, 1],       mjvOption.geomgroup; also "sitegroup": [six numbers]
        "offsamples": 0,                       multisampling of the off-screen buffer
        "max_geom": 2000
      }
    }

The buffer has the size of the picture, row 0 of the picture is the top. Without `ctrl` the actuators of the mapped
joints and of the gripper get the targets at which `qpos` is held, all others 0.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import ConfigError, suggest

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class SceneJoint:
    """One arm joint: names in the MJCF."""

    joint: str
    actuator: str


@dataclasses.dataclass(frozen=True)
class SceneGripper:
    """The gripper as one ROS joint. Gains: per MJCF joint (opening from qpos), per actuator (ctrl from opening)."""

    name: str
    joints: dict[str, float]
    actuators: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SceneCamera:
    """One camera: its name in the MJCF and the picture's size [px]."""

    camera: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class SceneState:
    """A full simulator state: qpos (nq,), qvel (nv,) and ctrl (nu,); empty means zeros or derived."""

    qpos: tuple[float, ...]
    qvel: tuple[float, ...] = ()
    ctrl: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """What decides the pixels besides the model: see the module docstring."""

    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    geomgroup: tuple[int, ...] = (1, 1, 1, 0, 0, 0)
    sitegroup: tuple[int, ...] = (1, 1, 1, 0, 0, 0)
    offsamples: int = 0
    max_geom: int = 2000


@dataclasses.dataclass(frozen=True)
class Scene:
    """A loaded `scene.json` and the path of its `scene.xml`."""

    xml: Path
    joints: dict[str, SceneJoint]
    initial: SceneState
    gripper: SceneGripper | None = None
    cameras: dict[str, SceneCamera] = dataclasses.field(default_factory=dict)
    bodies: dict[str, str] = dataclasses.field(default_factory=dict)
    sites: dict[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""
    tool: str = ""
    description: str = ""
    about: str = ""
    render: RenderSettings = dataclasses.field(default_factory=RenderSettings)


def load_scene(folder: str | Path) -> Scene:
    """Read `scene.json` of a folder.

    Raises:
        ConfigError: a file is absent, a key is unknown or missing, or the schema's number is another.
    """
    folder = Path(folder)
    path = folder / "scene.json"
    if not path.is_file() or not (folder / "scene.xml").is_file():
        raise ConfigError(f"{folder} is no scene: it must hold scene.xml and scene.json.")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    if data.pop("schema", None) != SCHEMA:
        raise ConfigError(f'{path} must say "schema": {SCHEMA}. Write the scene again with this version.')
    data["xml"] = (folder / "scene.xml").resolve()
    data["joints"] = {name: _build(SceneJoint, item, path) for name, item in data.get("joints", {}).items()}
    data["cameras"] = {name: _build(SceneCamera, item, path) for name, item in data.get("cameras", {}).items()}
    data["initial"] = _build(SceneState, data.get("initial", {}), path)
    data["gripper"] = _build(SceneGripper, data["gripper"], path) if data.get("gripper") else None
    data["render"] = _build(RenderSettings, data.get("render", {}), path)
    return _build(Scene, data, path)


def _build(kind: type, data: Mapping[str, Any], path: Path) -> Any:
    """A dataclass from a mapping; lists become tuples; unknown and missing keys are errors."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{path}: unknown key '{key}'.{suggest(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{path}: '{name}' is missing in {kind.__name__}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
