"""A scene with one arm on a floor, for `embodied robot sim`: from robosuite's models, a URDF, or numbers alone.

Whatever the source, the joints carry the names and ranges of the robot's profile, position servos drive them, and a
gripper of two sliding fingers stands in for the real one unless the URDF has its joint. What the model is and what it
is not is written into the scene (`about`) and said when it runs.
"""

import dataclasses
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError, suggest
from embodied.sim.export_scene import write_scene
from embodied.sim.render import HIDDEN_GROUPS, RENDER_FLAGS, load_mujoco

SERVO_RATE = 50.0  # critically damped servos follow a ramp 2 / SERVO_RATE behind [1/s]
STROKE = 0.08  # opening of the stand-in gripper [m]
REACH, LINK_MASS = 0.7, 1.0  # of a stand-in arm [m], of each of its links [kg]
TORQUE = 200.0  # of a servo whose model states none [N·m]
BEND = 0.3  # a stand-in does not start stretched out, where its tool can only move sideways [rad]
HOME_NOISE = 0.02  # the start differs from seed to seed by this [rad]
TIP = 0.1  # the tool's site lies so far in front of the hand [m]


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """What a profile says of an arm.

    Attributes:
        names, low, high: J joints and their ranges [rad].
        gripper: (joint, open, closed), or None.
        base, tool: names of links; "" if unknown.
        cameras: names; one called wrist or hand sits on the hand, the others beside the arm.
        chain: link -> {joint, xyz, rpy} from the base outwards; a joint turns about its link's z. {} if unknown.
        home: (J,) initial posture; () leaves it to the model.
        tool_at: where the tool is in the base frame at `home` [m]; () leaves it to the model.
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    gripper: tuple[str, float, float] | None = None
    base: str = ""
    tool: str = ""
    cameras: tuple[str, ...] = ()
    chain: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    home: tuple[float, ...] = ()
    tool_at: tuple[float, ...] = ()


# Models that come with robosuite: initial posture [rad]. The FR3 has the Panda's link lengths.
MODELS: dict[str, tuple[float, ...]] = {
    "panda": (0.0, 0.2, 0.0, -2.62, 0.0, 2.94, 0.785),
    "ur5e": (-0.47, -1.735, 2.48, -2.275, -1.59, -1.991),
    "xarm7": (0.0, 0.0, 0.0, 1.225, 0.0, 1.225, 0.0),
}


def export_arm_scene(
    folder: Path, arm: ArmSpec, model: str = "", urdf: Path | None = None, image_size: int = 64, seed: int = 0
) -> Path:
    """Write scene.xml and scene.json of an arm into `folder`; returns it.

    Args:
        model: one of MODELS; "" with a URDF, or for a stand-in made of the ranges alone.

    Raises:
        InputError: the URDF cannot be used, the model is unknown or has another number of joints.
    """
    if image_size < 1:
        raise InputError(f"An image size of {image_size} is not possible; give at least 1 pixel.")
    mujoco = load_mujoco()
    if urdf is not None:
        spec, joints, about = _from_urdf(mujoco, urdf, arm)
    elif model:
        spec, joints, about = _from_robosuite(mujoco, model, arm)
    elif arm.chain:
        spec, joints, about = _from_chain(mujoco, arm)
    else:
        spec, joints, about = _stand_in(mujoco, arm)
    home = np.clip(arm.home or home_of(model, arm.low, arm.high), arm.low, arm.high)
    for body in spec.bodies:
        body.gravcomp = 1.0
    for actuator in list(spec.actuators):
        spec.delete(actuator)
    for name, low, high in zip(joints, arm.low, arm.high, strict=True):
        spec.joint(name).range, spec.joint(name).limited = [low, high], True
    hand, tool = _hand(mujoco, spec, dict(zip(joints, home, strict=True)), arm)
    gripper = _gripper(mujoco, spec, hand, arm) if arm.gripper else None
    _surroundings(mujoco, spec, hand, arm.cameras)
    initial = _servos(mujoco, spec, dict(zip(joints, home, strict=True)), gripper, seed)
    scene: dict[str, Any] = {
        "schema": 1,
        "about": about,
        "joints": {n: {"joint": j, "actuator": f"servo_{j}"} for n, j in zip(arm.names, joints, strict=True)},
        "gripper": gripper,
        "cameras": {c: {"camera": f"camera_{c}", "width": image_size, "height": image_size} for c in arm.cameras},
        "bodies": {"cube": "scene_cube"},
        "sites": {"eef": tool},
        "base": _base(spec, arm),
        "tool": tool,
        "initial": {"qpos": initial},
        "render": {
            "flags": RENDER_FLAGS,
            "geomgroup": [int(group not in HIDDEN_GROUPS) for group in range(5)] + [0],
            "sitegroup": [0] * 6,
            "offsamples": 0,
        },
    }
    if urdf is not None:
        scene["description"] = "robot.urdf"
    folder.mkdir(parents=True, exist_ok=True)
    if urdf is not None:
        (folder / "robot.urdf").write_text(urdf.read_text())
    return write_scene(folder, spec.to_xml(), scene)


def home_of(model: str, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """(J,) where an arm starts: the model's own posture, or a little off the middle of the ranges.

    Raises:
        InputError: the model is unknown or has another number of joints.
    """
    if model and model not in MODELS:
        raise InputError(f"There is no arm model '{model}'.{suggest(model, MODELS)}")
    if model and len(low) != len(MODELS[model]):
        raise InputError(f"The model {model} has {len(MODELS[model])} joints, the profile {len(low)}.")
    return np.array(MODELS[model]) if model else (np.array(low) + np.array(high)) / 2 + BEND


# ---- where the arm comes from: spec, MJCF joint names in the profile's order, what it is


def _from_robosuite(mujoco: Any, model: str, arm: ArmSpec) -> tuple[Any, list[str], str]:
    home_of(model, arm.low, arm.high)
    package = importlib.util.find_spec("robosuite")  # its files are read, the package is not imported
    if package is None or package.origin is None:
        raise MissingExtraError("robosuite", "sim", f"the model of {model}")
    path = Path(package.origin).parent / "models" / "assets" / "robots" / model / "robot.xml"
    spec = mujoco.MjSpec.from_file(str(path))
    spec.meshdir = spec.texturedir = str(path.parent)
    for geom in spec.geoms:  # the arm touches the world, not itself
        if geom.contype or geom.conaffinity:
            geom.contype, geom.conaffinity = 1, 2
    about = f"robosuite's model of {model}: link lengths and masses of that arm, ranges of the profile"
    return spec, [joint.name for joint in spec.joints], about + _gripper_note(arm)


def _gripper_note(arm: ArmSpec) -> str:
    return "; two sliding fingers stand in for the gripper" if arm.gripper else ""


def _from_urdf(mujoco: Any, urdf: Path, arm: ArmSpec) -> tuple[Any, list[str], str]:
    try:
        root = ElementTree.fromstring(urdf.read_text())
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise InputError(f"The URDF {urdf} cannot be read: {error}. A xacro must be expanded first.") from None
    if root.tag != "robot":
        raise InputError(f"{urdf} is no URDF: it begins with <{root.tag}>, not <robot>.")
    moving = {str(j.get("name")): j for j in root.findall("joint") if j.get("type") in ("revolute", "prismatic")}
    moving |= {str(j.get("name")): j for j in root.findall("joint") if j.get("type") == "continuous"}
    for name in arm.names:
        if name not in moving:
            raise InputError(f"{urdf} has no moving joint '{name}', which the profile names.{suggest(name, moving)}")
    kept = set(arm.names) | ({arm.gripper[0]} if arm.gripper else set())
    for name, joint in moving.items():
        if name not in kept:
            joint.set("type", "fixed")
    for link in root.findall("link"):
        for part in [*link.findall("visual"), *link.findall("collision")]:
            link.remove(part)  # meshes lie in ROS packages that are not here
    for extra in [*root.findall("transmission"), *root.findall("gazebo"), *root.findall("mujoco")]:
        root.remove(extra)
    extension = ElementTree.SubElement(root, "mujoco")
    options = {"fusestatic": "false", "balanceinertia": "true", "boundmass": "0.05", "boundinertia": "0.0005"}
    ElementTree.SubElement(extension, "compiler", options)
    try:
        spec = mujoco.MjSpec.from_string(ElementTree.tostring(root, encoding="unicode"))
        spec.copy().compile()
    except ValueError as error:
        raise InputError(f"MuJoCo cannot load the URDF {urdf}: {str(error).splitlines()[0]}.") from None
    _draw_links(mujoco, spec)
    driven = arm.gripper is not None and any(joint.name == arm.gripper[0] for joint in spec.joints)
    about = f"{urdf.name}: its joints, link lengths and masses; capsules instead of its meshes, no collisions"
    return spec, list(arm.names), about + ("" if driven else _gripper_note(arm))


def _from_chain(mujoco: Any, arm: ArmSpec) -> tuple[Any, list[str], str]:
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    body = spec.worldbody.add_body(name=arm.base or "base")
    for link, entry in arm.chain.items():
        quat, euler = np.zeros(4), np.array(entry.get("rpy", (0.0, 0.0, 0.0)), float)
        mujoco.mju_euler2Quat(quat, euler, "XYZ")  # about the fixed axes of the parent, as in URDF
        body = body.add_body(name=link, pos=entry.get("xyz", (0.0, 0.0, 0.0)), quat=quat)
        if "joint" in entry:
            body.add_joint(name=entry["joint"], axis=[0, 0, 1], armature=0.01)
            ball = {"type": mujoco.mjtGeom.mjGEOM_SPHERE, "size": [0.025, 0, 0], "mass": LINK_MASS}
            body.add_geom(**ball, contype=0, conaffinity=0, group=1, rgba=[0.4, 0.4, 0.45, 1])
    if missing := [name for name in arm.names if not any(joint.name == name for joint in spec.joints)]:
        raise InputError(f"description.chain lacks the joints {', '.join(missing)}.")
    _draw_links(mujoco, spec)
    about = "joints and links where the profile's description.chain puts them; masses are invented, nothing collides"
    return spec, list(arm.names), about + _gripper_note(arm)


def _stand_in(mujoco: Any, arm: ArmSpec) -> tuple[Any, list[str], str]:
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    length = REACH / len(arm.names)
    body = spec.worldbody.add_body(name=arm.base or "base")
    for index, name in enumerate(arm.names):
        body = body.add_body(name=f"link_{name}", pos=[0, 0, length])
        roll = index in (0, len(arm.names) - 1)
        body.add_joint(name=name, axis=[0, 0, 1] if roll else [0, 1, 0], armature=0.01)
        capsule = {"type": mujoco.mjtGeom.mjGEOM_CAPSULE, "fromto": [0, 0, 0, 0, 0, length], "size": [0.03, 0, 0]}
        body.add_geom(**capsule, mass=LINK_MASS, contype=0, conaffinity=0, group=1, rgba=[0.6, 0.6, 0.65, 1])
    about = (
        "a stand-in: names and ranges of the profile's joints are real; axes, link lengths and masses are invented. "
        "Give --urdf for the arm's own"
    )
    return spec, list(arm.names), about + _gripper_note(arm)


def _draw_links(mujoco: Any, spec: Any) -> None:
    for body in spec.bodies:
        for child in body.bodies:
            if np.linalg.norm(child.pos) > 0.01:
                ends = [0.0, 0.0, 0.0, *map(float, child.pos)]
                capsule = {"type": mujoco.mjtGeom.mjGEOM_CAPSULE, "fromto": ends, "size": [0.02, 0, 0]}
                body.add_geom(**capsule, mass=0.0, contype=0, conaffinity=0, group=1, rgba=[0.6, 0.6, 0.65, 1])


# ---- what every arm gets


def _hand(mujoco: Any, spec: Any, home: Mapping[str, float], arm: ArmSpec) -> tuple[Any, str]:
    """The body that carries the gripper, and the name of the tool's site."""
    bodies = {body.name: body for body in spec.bodies}
    hand = bodies.get(arm.tool) or bodies.get("right_hand") or spec.joint(list(home)[-1]).parent
    at = np.array([0.0, 0.0, 0.0 if hand.name == arm.tool else TIP])  # a description says where the tool is
    if arm.tool_at and hand.name != arm.tool:
        model = spec.copy().compile()
        data = mujoco.MjData(model)
        for name, position in home.items():
            data.qpos[model.joint(name).qposadr[0]] = position
        mujoco.mj_kinematics(model, data)
        base, body = model.body(_base(spec, arm) or 0).id, model.body(hand.name).id
        place = data.xpos[base] + data.xmat[base].reshape(3, 3) @ np.array(arm.tool_at)
        at = data.xmat[body].reshape(3, 3).T @ (place - data.xpos[body])
    hand.add_site(name="scene_tool", pos=at)
    return hand, "scene_tool"


def _base(spec: Any, arm: ArmSpec) -> str:
    """The body whose frame is the arm's base; "" for the world."""
    names = {body.name for body in spec.bodies}
    return next((name for name in (arm.base, "base", "link0") if name in names), "")


def _gripper(mujoco: Any, spec: Any, hand: Any, arm: ArmSpec) -> dict[str, Any]:
    """Fingers whose sum of ways is the profile's gripper joint, as scene.json says it."""
    assert arm.gripper is not None
    name, opened, closed = arm.gripper
    low, high = sorted((opened, closed))
    if any(joint.name == name for joint in spec.joints):
        joint = spec.joint(name)
        joint.range, joint.limited = [low, high], True
        return {"name": name, "joints": {name: 1.0}, "actuators": {f"servo_{name}": 1.0}}
    gain = STROKE / 2 / (opened - closed)  # outward way of one finger per unit of the joint
    fingers: dict[str, float] = {}
    reach = -0.03 if hand.name == arm.tool else TIP - 0.02  # the fingers end at the tool
    for side, direction in (("left", 1.0), ("right", -1.0)):
        # At joint position 0 the finger is `gain * closed` short of where it meets the other.
        offset = 0.006 - gain * closed
        body = hand.add_body(name=f"scene_{side}", pos=[0, direction * offset, reach])
        ends = sorted((gain * low, gain * high))
        finger = body.add_joint(
            name=f"scene_finger_{side}",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, direction, 0],
            range=ends,
            armature=0.1,
            damping=5.0,
        )
        finger.limited = True
        box = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [0.01, 0.005, 0.03], "mass": 0.02}
        body.add_geom(**box, group=1, contype=1, conaffinity=2, friction=[1.5, 0.05, 0.001], rgba=[0.2, 0.2, 0.2, 1])
        body.gravcomp = 1.0
        fingers[f"scene_finger_{side}"] = gain
    return {
        "name": name,
        "joints": {finger: 0.5 / gain for finger in fingers},
        "actuators": {f"servo_{finger}": gain for finger in fingers},
    }


def _surroundings(mujoco: Any, spec: Any, hand: Any, cameras: Sequence[str]) -> None:
    world = spec.worldbody
    world.add_light(pos=[0.5, -0.5, 2.5], dir=[-0.2, 0.2, -1.0])
    plane = {"type": mujoco.mjtGeom.mjGEOM_PLANE, "size": [2, 2, 0.1], "rgba": [0.75, 0.75, 0.7, 1]}
    world.add_geom(name="scene_floor", **plane, group=1, contype=2, conaffinity=1)
    cube = world.add_body(name="scene_cube", pos=[0.45, 0.0, 0.02])
    cube.add_freejoint(name="scene_cube")
    box = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [0.02, 0.02, 0.02], "mass": 0.05, "rgba": [0.8, 0.1, 0.1, 1]}
    cube.add_geom(**box, group=1, contype=3, conaffinity=3)
    fixed = 0
    for name in cameras:
        if "wrist" in name or "hand" in name:
            hand.add_camera(name=f"camera_{name}", pos=[0.06, 0, 0], quat=[0, 1, 0, 0], fovy=75)
            continue
        angle = -1.2 + 0.9 * fixed  # several stand side by side
        fixed += 1
        position = np.array([0.3 + 1.1 * np.cos(angle), 1.1 * np.sin(angle), 0.7])
        back = position - [0.3, 0.0, 0.25]
        right = np.cross([0, 0, 1], back / np.linalg.norm(back))
        axes = np.column_stack([right / np.linalg.norm(right), np.zeros(3), back / np.linalg.norm(back)])
        axes[:, 1] = np.cross(axes[:, 2], axes[:, 0])
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, axes.reshape(-1))
        world.add_camera(name=f"camera_{name}", pos=position, quat=quat, fovy=45)


def _servos(
    mujoco: Any, spec: Any, home: Mapping[str, float], gripper: Mapping[str, Any] | None, seed: int
) -> list[float]:
    """Add a critically damped position servo to every driven joint; returns qpos of the start."""
    fingers = [name.removeprefix("servo_") for name in gripper["actuators"]] if gripper else []
    model = spec.copy().compile()
    data = mujoco.MjData(model)
    noise = np.random.default_rng(seed).uniform(-HOME_NOISE, HOME_NOISE, len(home))
    for (name, position), offset in zip(home.items(), noise, strict=True):
        joint = model.joint(name)
        data.qpos[joint.qposadr[0]] = np.clip(position + offset, *joint.range)
    for name in fingers:  # as open as it gets
        joint = model.joint(name)
        data.qpos[joint.qposadr[0]] = joint.range[1] if name.startswith("scene_") else float(np.mean(joint.range))
    mujoco.mj_forward(model, data)
    mass = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, mass, data.qM)
    spec.option.timestep = 0.002
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    for name in [*home, *fingers]:
        inertia = mass[model.joint(name).dofadr[0], model.joint(name).dofadr[0]] + 0.1
        spec.joint(name).armature = float(spec.joint(name).armature) + 0.1  # a geared motor's own inertia
        spec.joint(name).frictionloss = 0.0
        stiffness, damping = inertia * SERVO_RATE**2, 2 * inertia * SERVO_RATE
        actuator = spec.add_actuator(
            name=f"servo_{name}", target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, forcerange=[-TORQUE, TORQUE]
        )
        actuator.set_to_position(kp=stiffness, kv=damping)
        actuator.forcelimited = True
    return data.qpos.tolist()
