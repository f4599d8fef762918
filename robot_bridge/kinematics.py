"""Where links are for given joint positions, and whether they stay in a box. MuJoCo does the arithmetic."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, MissingExtraError, suggest
from embodied.robot_bridge.limits import LimitSource, match_joints
from embodied.robot_bridge.read_urdf import Urdf, as_mjcf, parse_xml, read_urdf

# Nothing of these is needed to know where a body is, and most of it names files that may be absent.
_STRIPPED = ("asset", "actuator", "sensor", "tendon", "equality", "contact", "keyframe", "visual", "deformable", "skin")
_STRIPPED_ANYWHERE = ("geom", "mesh", "material", "camera", "light", "composite", "flexcomp", "plugin", "extension")


class Kinematics:
    """Forward kinematics of a URDF or MJCF.

    Args:
        description: the file, whose outermost element tells which of the two it is; or what was read from one.
        joints: arm joints in the order of `q`. A prefix more or less than in the file is understood.
        frames: links (URDF), bodies or sites (MJCF) whose origins are wanted.
        base: frame in which positions are expressed; the tree's root if empty.

    Raises:
        ConfigError: the file cannot be read, or a joint or frame is not in it, or a frame also moves with a joint that
            is not in `joints`.
        MissingExtraError: MuJoCo is not installed.
    """

    def __init__(self, description: Path | Urdf, joints: Sequence[str], frames: Sequence[str], base: str = "") -> None:
        self._model = _compile(description)
        description = description.path if isinstance(description, Urdf) else description
        import mujoco

        self._data = mujoco.MjData(self._model)  # pyright: ignore[reportAttributeAccessIssue]
        self.joints, self.frames = tuple(joints), tuple(frames)
        ids = _joint_ids(self._model, self.joints, description)
        self._address = np.array([self._model.jnt_qposadr[i] for i in ids])
        self._forward = mujoco.mj_kinematics  # pyright: ignore[reportAttributeAccessIssue]
        found = [_frame(self._model, name, description) for name in frames]
        self._is_site = np.array([is_site for is_site, _ in found], bool)
        self._bodies = np.array([index for _, index in found], int)
        body = _frame(self._model, base, description)[1] if base else 0
        for name, (is_site, index) in zip(frames, found, strict=True):
            carrier = int(self._model.site_bodyid[index]) if is_site else index
            self._check_path(carrier, body, set(ids), name, description)
        self._forward(self._model, self._data)
        self._base_xyz = self._data.xpos[body].copy()
        self._base_matrix = self._data.xmat[body].reshape(3, 3).copy()
        self._at_origin = not self._base_xyz.any() and np.array_equal(self._base_matrix, np.eye(3))

    def _check_path(self, frame: int, base: int, joints: set[int], name: str, description: Path) -> None:
        """Between base and frame only `joints` may move, and the base itself must stand."""
        to_base, to_frame = _ancestors(self._model, base), _ancestors(self._model, frame)
        for body in to_base ^ to_frame:
            first = int(self._model.body_jntadr[body])
            for joint in range(first, first + int(self._model.body_jntnum[body])):
                moving = self._model.joint(joint).name or f"#{joint}"
                if body in to_base:
                    raise ConfigError(f"{description}: the base is moved by the joint '{moving}'; choose another base.")
                if joint not in joints:
                    raise ConfigError(
                        f"{description}: frame '{name}' also moves with the joint '{moving}', which is not one of the\n"
                        "arm's. Name the link before it."
                    )

    def positions(self, q: np.ndarray) -> np.ndarray:
        """Joint positions (J,) [rad, m] to origins of the frames (F, 3) in the base frame [m]."""
        data = self._data
        data.qpos[self._address] = q
        self._forward(self._model, data)
        xyz = data.xpos[self._bodies] if not self._is_site.any() else self._mixed()
        return xyz if self._at_origin else (xyz - self._base_xyz) @ self._base_matrix

    def _mixed(self) -> np.ndarray:
        rows = zip(self._is_site, self._bodies, strict=True)
        return np.stack([self._data.site_xpos[i] if is_site else self._data.xpos[i] for is_site, i in rows])


class Workspace:
    """A box in the base frame in which the frames of `kinematics` must stay.

    Args:
        low, high: corners (3,) [m].
        margin: taken off each side [m].

    Raises:
        ConfigError: the box is empty.
    """

    def __init__(self, kinematics: Kinematics, low: Sequence[float], high: Sequence[float], margin: float) -> None:
        self.kinematics = kinematics
        self.low, self.high = np.array(low, float) + margin, np.array(high, float) - margin
        if self.low.shape != (3,) or self.high.shape != (3,) or not (self.low < self.high).all():
            raise ConfigError(
                f"workspace from {list(low)} to {list(high)} with a margin of {margin:g} m holds nothing;\n"
                "low and high are three numbers each, low below high."
            )

    def outside(self, q: np.ndarray) -> str:
        """Empty, or which frame leaves the box and by how much.

        Args:
            q: (J,) or longer; the arm's joints come first, in the order of `kinematics`.
        """
        xyz = self.kinematics.positions(q[: len(self.kinematics.joints)])
        over = np.maximum(xyz - self.high, self.low - xyz)
        worst = int(over.argmax())  # of a NaN, which argmax finds first
        if over.flat[worst] <= 0.0:
            return ""
        frame, axis = divmod(worst, 3)
        return (
            f"{self.kinematics.frames[frame]} leaves the workspace: {'xyz'[axis]} is {xyz[frame, axis]:.3f} m, "
            f"allowed is {self.low[axis]:.3f} to {self.high[axis]:.3f} m"
        )


def description_limits(path: Path) -> list[LimitSource]:
    """What a URDF or MJCF states: <limit> and <safety_controller>, or the range of joints."""
    if parse_xml(path).tag == "robot":
        joints = read_urdf(path).joints.values()
        hard = {joint.name: _entry(position=joint.position, velocity=joint.velocity) for joint in joints}
        soft = {joint.name: _entry(position=joint.soft_position) for joint in joints}
        sources = [LimitSource(path.name, hard), LimitSource(f"{path.name} safety_controller", soft)]
        return [source for source in sources if any(source.joints.values())]
    model = _compile(path)
    ranges = {
        model.joint(i).name: {"position": tuple(model.jnt_range[i].tolist())}
        for i in range(model.njnt)
        if model.jnt_limited[i]
    }
    return [LimitSource(path.name, ranges)] if ranges else []


def _entry(**limits: Any) -> dict[str, Any]:
    return {quantity: value for quantity, value in limits.items() if value is not None}


def _compile(description: Path | Urdf) -> Any:
    try:
        import mujoco
    except ImportError:
        raise MissingExtraError("mujoco", "ros", "Forward kinematics") from None

    text, path = _mjcf(description)
    try:
        return mujoco.MjModel.from_xml_string(text)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        raise ConfigError(f"{path}: MuJoCo refuses it: {' '.join(str(error).split())[:200]}") from None


def _mjcf(description: Path | Urdf) -> tuple[str, Path]:
    if isinstance(description, Urdf):
        return as_mjcf(description), description.path
    root = parse_xml(description)
    if root.tag == "robot":
        return as_mjcf(read_urdf(description)), description
    if root.tag == "mujoco":
        return _stripped(root, description), description
    raise ConfigError(f"{description} is neither URDF nor MJCF: its outermost element is <{root.tag}>.")


def _include(root: ElementTree.Element, path: Path, depth: int = 0) -> None:
    """Put included files in the place of their <include>."""
    if depth > 8:
        raise ConfigError(f"{path}: files include one another.")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "include":
                included = parse_xml(path.parent / child.get("file", ""))
                _include(included, path, depth + 1)
                index = list(parent).index(child)
                parent.remove(child)
                for offset, element in enumerate(included):
                    parent.insert(index + offset, element)


def _stripped(root: ElementTree.Element, path: Path) -> str:
    """An MJCF with nothing but bodies, joints and sites."""
    _include(root, path)
    for parent in list(root.iter()):
        for child in list(parent):
            needless = child.tag in _STRIPPED_ANYWHERE or (parent is root and child.tag in _STRIPPED)
            if needless or (parent.tag == "default" and child.tag not in ("default", "joint", "site")):
                parent.remove(child)
    compiler = root.find("compiler")
    if compiler is None:
        compiler = ElementTree.SubElement(root, "compiler")
    for key in ("inertiafromgeom", "meshdir", "texturedir", "assetdir"):
        compiler.attrib.pop(key, None)
    compiler.attrib |= {"boundmass": "1e-3", "boundinertia": "1e-6", "balanceinertia": "true"}
    for site in root.iter("site"):
        site.attrib.pop("material", None)
    return ElementTree.tostring(root, encoding="unicode")


def _joint_ids(model: Any, joints: Sequence[str], path: Path) -> list[int]:
    names = {model.joint(i).name: i for i in range(model.njnt)}
    matches = match_joints(joints, names)
    for name in joints:
        if name not in matches:
            raise ConfigError(f"{path} has no moving joint '{name}'.{suggest(name, [n for n in names if n])}")
    return [names[matches[name]] for name in joints]


def _frame(model: Any, name: str, path: Path) -> tuple[bool, int]:
    bodies = {model.body(i).name: i for i in range(model.nbody)}
    sites = {model.site(i).name: i for i in range(model.nsite)}
    if name in bodies:
        return False, bodies[name]
    if name in sites:
        return True, sites[name]
    raise ConfigError(f"{path} has no frame '{name}'.{suggest(name, [n for n in (*bodies, *sites) if n])}")


def _ancestors(model: Any, body: int) -> set[int]:
    found = {body}
    while body:
        body = int(model.body_parentid[body])
        found.add(body)
    return found
