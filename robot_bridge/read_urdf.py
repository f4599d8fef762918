"""A URDF as plain data: links, joints, their origins and limits. Meshes, inertias and plugins are not looked at."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import ConfigError, suggest

MOVING = {"revolute": "hinge", "continuous": "hinge", "prismatic": "slide"}


@dataclasses.dataclass(frozen=True)
class UrdfJoint:
    """A joint.

    Attributes:
        kind: fixed, revolute, continuous, prismatic, floating or planar.
        xyz, rpy: pose of the child's frame in the parent's [m], [rad, about fixed axes].
        axis: in the child's frame.
        position, velocity: of <limit> [rad, m], [rad/s, m/s]; None where not stated.
        soft_position: of <safety_controller>.
    """

    name: str
    kind: str
    parent: str
    child: str
    xyz: tuple[float, ...]
    rpy: tuple[float, ...]
    axis: tuple[float, ...]
    position: tuple[float, float] | None
    velocity: float | None
    soft_position: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Urdf:
    """Links and joints by name, and the link that has no parent."""

    path: Path
    links: tuple[str, ...]
    joints: dict[str, UrdfJoint]
    root: str


def parse_xml(path: Path) -> ElementTree.Element:
    """The root element of a file.

    Raises:
        ConfigError: it is absent, not XML, or a xacro that nobody expanded.
    """
    if not path.is_file():
        raise ConfigError(f"description {path} is no file.")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} is not XML: {error}.") from None
    if any("wiki/xacro" in element.tag for element in root.iter()):
        raise ConfigError(f"{path} is a xacro. Expand it first: ros2 run xacro xacro {path.name} > robot.urdf")
    return root


def read_urdf(path: Path) -> Urdf:
    """Read the kinematic tree.

    Raises:
        ConfigError: it is no URDF, a number is missing or malformed, or the links do not form one tree.
    """
    root = parse_xml(path)
    if root.tag != "robot":
        raise ConfigError(f"{path} is no URDF: its outermost element is <{root.tag}>, not <robot>.")
    links = tuple(link.get("name", "") for link in root.findall("link"))
    joints = [_joint(element, path) for element in root.findall("joint")]
    by_name = {joint.name: joint for joint in joints}
    if len(by_name) != len(joints) or len(set(links)) != len(links) or "" in (*by_name, *links):
        raise ConfigError(f"{path}: every link and joint needs a name of its own.")
    for joint in joints:
        for link in (joint.parent, joint.child):
            if link not in links:
                raise ConfigError(f"{path}: joint '{joint.name}' names the link '{link}', which is not there.")
    children = [joint.child for joint in joints]
    roots = [link for link in links if link not in children]
    if len(roots) != 1 or len(set(children)) != len(children):
        raise ConfigError(f"{path}: the links must form one tree; without a parent: {', '.join(roots) or 'none'}.")
    return Urdf(path, links, by_name, roots[0])


def read_chain(base: str, chain: Mapping[str, Any], source: Path) -> Urdf:
    """A tree without branches from a profile: link -> {joint, xyz, rpy}, each link carried by the one before.

    A joint turns about the link's z; a link without one is fixed.

    Raises:
        ConfigError: a key is unknown, or xyz or rpy is not three numbers.
    """
    if not base or base in chain:
        raise ConfigError(f"{source}: description.chain starts at description.base, which must be a link before it.")
    joints, parent = {}, base
    for link, entry in chain.items():
        where = f"{source}: description.chain.{link}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} is {entry!r}; it must be {{joint, xyz, rpy}}.")
        for key in entry:
            if key not in ("joint", "xyz", "rpy"):
                raise ConfigError(f"{where} has an unknown key '{key}'.{suggest(str(key), ('joint', 'xyz', 'rpy'))}")
        xyz, rpy = (_vector(entry.get(key, [0.0, 0.0, 0.0]), f"{where}.{key}") for key in ("xyz", "rpy"))
        name = str(entry.get("joint", f"{link} fixed"))
        if name in joints:
            raise ConfigError(f"{where}: joint '{name}' is there already.")
        kind = "revolute" if "joint" in entry else "fixed"
        joints[name] = UrdfJoint(name, kind, parent, str(link), xyz, rpy, (0.0, 0.0, 1.0), None, None, None)
        parent = str(link)
    return Urdf(source, (base, *map(str, chain)), joints, base)


def _vector(value: Any, where: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    sound = [isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9 for x in numbers]
    if len(sound) != 3 or not all(sound):
        raise ConfigError(f"{where} is {value!r}; it must be three finite numbers.")
    return tuple(float(x) for x in numbers)


def _joint(element: ElementTree.Element, path: Path) -> UrdfJoint:
    name = element.get("name", "")
    where = f"{path}: joint '{name}'"

    def numbers(tag: str, key: str, default: str, count: int) -> tuple[float, ...]:
        found = element.find(tag)
        text = default if found is None else found.get(key, default)
        try:
            values = tuple(float(value) for value in text.split())
        except ValueError:
            values = ()
        if len(values) != count or not all(abs(value) < 1e9 for value in values):
            raise ConfigError(f"{where} has <{tag} {key}='{text}'>; {count} finite numbers are needed.")
        return values

    def end(tag: str, key: str) -> str:
        found = element.find(tag)
        return "" if found is None else found.get(key, "")

    kind = element.get("type", "")
    if kind not in (*MOVING, "fixed", "floating", "planar"):
        raise ConfigError(f"{where} has type '{kind}', which URDF does not know.")
    position = numbers("limit", "lower", "0", 1) + numbers("limit", "upper", "0", 1)
    soft = numbers("safety_controller", "soft_lower_limit", "0", 1)
    soft += numbers("safety_controller", "soft_upper_limit", "0", 1)
    bounded = kind in ("revolute", "prismatic")
    velocity = numbers("limit", "velocity", "0", 1)[0]
    return UrdfJoint(
        name,
        kind,
        end("parent", "link"),
        end("child", "link"),
        numbers("origin", "xyz", "0 0 0", 3),
        numbers("origin", "rpy", "0 0 0", 3),
        numbers("axis", "xyz", "1 0 0", 3),
        # Exporters write zeros where they know nothing.
        position if bounded and position[0] < position[1] else None,  # pyright: ignore[reportArgumentType]
        velocity if velocity > 0 else None,
        soft if bounded and soft[0] < soft[1] else None,  # pyright: ignore[reportArgumentType]
    )


def as_mjcf(urdf: Urdf) -> str:
    """The kinematic tree alone, as MJCF; every link is a body of the same name."""
    mujoco = ElementTree.Element("mujoco", model="kinematics")
    # boundmass: a body without geoms has no mass, which MuJoCo refuses. XYZ: roll, pitch, yaw about fixed axes.
    ElementTree.SubElement(
        mujoco, "compiler", angle="radian", eulerseq="XYZ", boundmass="1e-3", boundinertia="1e-6", fusestatic="false"
    )
    world = ElementTree.SubElement(mujoco, "worldbody")
    # MuJoCo's own outermost body is called world, as many a URDF's root is.
    bodies = {urdf.root: world if urdf.root == "world" else ElementTree.SubElement(world, "body", name=urdf.root)}
    waiting = list(urdf.joints.values())
    while waiting:
        ready = [joint for joint in waiting if joint.parent in bodies]
        for joint in ready:
            body = ElementTree.SubElement(
                bodies[joint.parent], "body", name=joint.child, pos=_text(joint.xyz), euler=_text(joint.rpy)
            )
            bodies[joint.child] = body
            if joint.kind in MOVING:
                ElementTree.SubElement(body, "joint", name=joint.name, type=MOVING[joint.kind], axis=_text(joint.axis))
        waiting = [joint for joint in waiting if joint not in ready]
        if not ready and waiting:
            raise ConfigError(f"{urdf.path}: joint '{waiting[0].name}' belongs to a loop of links.")
    return ElementTree.tostring(mujoco, encoding="unicode")


def _text(values: tuple[float, ...]) -> str:
    return " ".join(repr(value) for value in values)
