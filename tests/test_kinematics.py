"""Forward kinematics agrees with products of the description's own origins, and the workspace says who leaves it."""

import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("mujoco")

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.kinematics import Kinematics, Workspace, description_limits
from embodied.robot_bridge.read_urdf import read_urdf

ARMS = Path(__file__).resolve().parents[2] / "shared" / "data" / "arm-descriptions"
needs_arms = pytest.mark.skipif(not ARMS.is_dir(), reason=f"{ARMS} is absent")
PANDA = [f"panda_joint{i}" for i in range(1, 8)]
READY = np.array([0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4])

# Turned base, a slide, an axis that is no unit vector, a fixed flange, a finger, and a mesh that is not there.
URDF = """
<robot name="odd" xmlns:xacro="http://www.ros.org/wiki/xacro">
  <link name="world"/><link name="base"/><link name="l1"><visual><geometry>
    <mesh filename="package://nowhere/none.dae"/></geometry></visual></link>
  <link name="l2"/><link name="l3"/><link name="flange"/><link name="finger"/>
  <joint name="mount" type="fixed"><origin xyz="1 2 3" rpy="0.1 0.2 0.3"/><parent link="world"/><child link="base"/>
  </joint>
  <joint name="turn" type="revolute"><origin xyz="0 0 0.3" rpy="0.4 -0.5 0.6"/><parent link="base"/><child link="l1"/>
    <axis xyz="0 0 1"/><limit lower="-2" upper="2" velocity="1.5" effort="1"/>
    <safety_controller soft_lower_limit="-1.5" soft_upper_limit="1.8" k_velocity="1"/></joint>
  <joint name="slide" type="prismatic"><origin xyz="0.2 0 0"/><parent link="l1"/><child link="l2"/>
    <axis xyz="0 0.6 0.8"/><limit lower="0" upper="0.4" velocity="0" effort="1"/></joint>
  <joint name="roll" type="continuous"><origin rpy="1.5708 0 0"/><parent link="l2"/><child link="l3"/>
    <limit velocity="3" effort="1"/></joint>
  <joint name="end" type="fixed"><origin xyz="0 0.1 0.05" rpy="0 0 0.7"/><parent link="l3"/><child link="flange"/>
  </joint>
  <joint name="pinch" type="prismatic"><parent link="flange"/><child link="finger"/><axis xyz="0 1 0"/>
    <limit lower="0" upper="0" velocity="1" effort="1"/></joint>
</robot>
"""
JOINTS = ["turn", "slide", "roll"]


def _rotation(rpy: np.ndarray) -> np.ndarray:
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return z @ y @ x


def _about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues."""
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def _pose(xyz: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, xyz
    return pose


def reference(urdf: Path, base: str, frame: str, q: dict[str, float]) -> np.ndarray:
    """Pose of `frame` in `base` by multiplying what stands in the file, read with nothing of ours."""
    joints = {j.find("child").get("link"): j for j in ElementTree.parse(urdf).getroot().findall("joint")}  # pyright: ignore

    def numbers(joint: ElementTree.Element, tag: str, key: str, default: str) -> np.ndarray:
        found = joint.find(tag)
        return np.array([float(x) for x in (default if found is None else found.get(key, default)).split()])

    def from_root(link: str) -> np.ndarray:
        if link not in joints:
            return np.eye(4)
        joint = joints[link]
        pose = _pose(numbers(joint, "origin", "xyz", "0 0 0"), _rotation(numbers(joint, "origin", "rpy", "0 0 0")))
        axis, value = numbers(joint, "axis", "xyz", "1 0 0"), q.get(joint.get("name", ""), 0.0)
        if joint.get("type") in ("revolute", "continuous"):
            pose = pose @ _pose(np.zeros(3), _about(axis, value))
        elif joint.get("type") == "prismatic":
            pose = pose @ _pose(axis / np.linalg.norm(axis) * value, np.eye(3))
        return from_root(joint.find("parent").get("link")) @ pose  # pyright: ignore

    return np.linalg.inv(from_root(base)) @ from_root(frame)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "odd.urdf").write_text(URDF)
    return tmp_path / "odd.urdf"


@pytest.mark.parametrize("base", ["", "base"])
def test_a_made_up_urdf_agrees_with_the_product_of_its_origins(odd: Path, base: str) -> None:
    kinematics = Kinematics(odd, JOINTS, ["l2", "flange"], base)
    rng = np.random.default_rng(1)
    for q in rng.uniform(-1.5, 1.5, (50, 3)):
        named = dict(zip(JOINTS, q, strict=True))
        expected = [reference(odd, base or "world", frame, named)[:3, 3] for frame in ("l2", "flange")]
        np.testing.assert_allclose(kinematics.positions(q), expected, atol=1e-12)


def test_a_result_is_not_changed_by_the_next_call(odd: Path) -> None:
    kinematics = Kinematics(odd, JOINTS, ["flange"])
    first = kinematics.positions(np.zeros(3))
    before = first.copy()
    kinematics.positions(np.ones(3))
    np.testing.assert_array_equal(first, before)


def test_order_of_joints_is_the_callers(odd: Path) -> None:
    forwards, backwards = Kinematics(odd, JOINTS, ["flange"]), Kinematics(odd, JOINTS[::-1], ["flange"])
    q = np.array([0.3, 0.1, -0.7])
    np.testing.assert_allclose(forwards.positions(q), backwards.positions(q[::-1]), atol=1e-15)


def test_limits_of_a_urdf_leave_out_what_it_does_not_state(odd: Path) -> None:
    hard, soft = description_limits(odd)
    assert hard.joints["turn"] == {"position": (-2.0, 2.0), "velocity": 1.5}
    assert hard.joints["slide"] == {"position": (0.0, 0.4)}  # velocity 0 is what exporters write for unknown
    assert hard.joints["roll"] == {"velocity": 3.0}
    assert hard.joints["pinch"] == {"velocity": 1.0}
    assert soft.joints["turn"] == {"position": (-1.5, 1.8)}


@pytest.mark.parametrize(
    ("joints", "frames", "base", "message"),
    [
        (JOINTS, ["flang"], "", "no frame 'flang'. Did you mean 'flange'"),
        (["turn", "slyde", "roll"], ["l3"], "", "no moving joint 'slyde'. Did you mean 'slide'"),
        (["mount"], ["l3"], "", "no moving joint 'mount'"),
        (JOINTS, ["finger"], "", "'finger' also moves with the joint 'pinch'"),
        (["turn", "roll"], ["flange"], "", "'flange' also moves with the joint 'slide'"),
        (JOINTS, ["flange"], "l9", "no frame 'l9'"),
        (JOINTS, ["base"], "flange", "base is moved by the joint"),
    ],
)
def test_unknown_and_moving_frames_are_refused(
    odd: Path, joints: list[str], frames: list[str], base: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Kinematics(odd, joints, frames, base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<robot", "not XML"),
        ("<sdf/>", "neither URDF nor MJCF"),
        ('<robot xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:include filename="a"/></robot>', "is a xacro"),
        ('<robot><link name="a"/><link name="b"/></robot>', "one tree; without a parent: a, b"),
        ("<robot/>", "without a parent: none"),
        (URDF.replace('xyz="0.2 0 0"', 'xyz="0.2 zero 0"'), "'slide' has <origin xyz='0.2 zero 0'>; 3 finite numbers"),
        (URDF.replace('xyz="0.2 0 0"', 'xyz="0.2 nan 0"'), "3 finite numbers"),
        (URDF.replace('child link="flange"', 'child link="flansch"'), "'flansch', which is not there"),
        (URDF.replace('type="continuous"', 'type="wobbly"'), "type 'wobbly'"),
        (URDF.replace('name="end"', 'name="roll"'), "a name of its own"),
        (URDF.replace('xyz="0 0.6 0.8"', 'xyz="0 0 0"'), "MuJoCo refuses it"),
    ],
)
def test_broken_descriptions_say_what_is_broken(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.urdf").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Kinematics(tmp_path / "a.urdf", JOINTS, ["flange"])


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    joint = '<joint name="{0}{1}" type="fixed"><parent link="{0}"/><child link="{1}"/></joint>'
    links = "".join(f'<link name="{name}"/>' for name in "abc")
    (tmp_path / "a.urdf").write_text(f"<robot>{links}{joint.format('b', 'c')}{joint.format('c', 'b')}</robot>")
    with pytest.raises(ConfigError, match="belongs to a loop"):
        Kinematics(tmp_path / "a.urdf", [], ["a"])


def test_mjcf_with_includes_sites_and_absent_meshes(tmp_path: Path) -> None:
    (tmp_path / "arm.xml").write_text(
        """
        <mujoco><compiler angle="degree" meshdir="nowhere"/>
          <asset><mesh name="m" file="none.stl"/></asset>
          <default><default class="d"><geom mesh="m" type="mesh"/><joint axis="0 0 1" range="-90 45"/></default>
          </default>
          <worldbody><include file="part.xml"/></worldbody>
          <actuator><position joint="j" kp="1"/></actuator></mujoco>
        """
    )
    (tmp_path / "part.xml").write_text(
        """
        <mujocoinclude><body name="b" pos="0 0 1" childclass="d"><joint name="left_j"/><geom/>
          <site name="tip" pos="1 0 0"/></body></mujocoinclude>
        """
    )
    kinematics = Kinematics(tmp_path / "arm.xml", ["left_j"], ["tip", "b"])
    np.testing.assert_allclose(kinematics.positions(np.array([np.pi / 2])), [[0, 1, 1], [0, 0, 1]], atol=1e-15)
    (source,) = description_limits(tmp_path / "arm.xml")
    np.testing.assert_allclose(source.joints["left_j"]["position"], (-np.pi / 2, np.pi / 4))
    (tmp_path / "part.xml").write_text('<mujocoinclude><include file="part.xml"/></mujocoinclude>')
    with pytest.raises(ConfigError, match="include one another"):
        Kinematics(tmp_path / "arm.xml", ["left_j"], ["tip"])


def test_workspace_names_the_frame_the_axis_and_both_numbers(odd: Path) -> None:
    kinematics = Kinematics(odd, JOINTS, ["l2", "flange"], "base")
    inside = Workspace(kinematics, [-1, -1, -1], [1, 1, 1], 0.02)
    assert inside.outside(np.zeros(3)) == ""
    assert inside.outside(np.zeros(5)) == ""  # a gripper's joint may follow the arm's
    xyz = kinematics.positions(np.zeros(3))
    high = xyz.max(0) + np.array([0.5, 0.5, 0.01])
    tight = Workspace(kinematics, [-1, -1, -1], list(high), 0.02)
    highest = ["l2", "flange"][int(xyz[:, 2].argmax())]
    assert tight.outside(np.zeros(3)) == (
        f"{highest} leaves the workspace: z is {xyz[:, 2].max():.3f} m, allowed is -0.980 to {high[2] - 0.02:.3f} m"
    )
    assert "leaves the workspace: x is nan" in inside.outside(np.array([np.nan, 0.0, 0.0]))


def test_workspace_agrees_with_a_direct_comparison(odd: Path) -> None:
    kinematics = Kinematics(odd, JOINTS, ["l2", "flange"], "base")
    low, high, margin = np.array([-0.2, -0.3, 0.1]), np.array([0.4, 0.3, 0.9]), 0.05
    box = Workspace(kinematics, list(low), list(high), margin)
    found = set()
    for q in np.random.default_rng(2).uniform(-1.5, 1.5, (500, 3)):
        xyz = np.stack([reference(odd, "base", f, dict(zip(JOINTS, q, strict=True)))[:3, 3] for f in kinematics.frames])
        inside = bool(((xyz >= low + margin) & (xyz <= high - margin)).all())
        assert (box.outside(q) == "") == inside
        found.add(inside)
    assert found == {True, False}


@pytest.mark.parametrize(("low", "high"), [([0, 0, 0], [1, 1, 0.03]), ([0, 0], [1, 1]), ([0, 0, 1], [1, 1, 0])])
def test_an_empty_box_is_refused(odd: Path, low: list[float], high: list[float]) -> None:
    with pytest.raises(ConfigError, match="workspace from"):
        Workspace(Kinematics(odd, JOINTS, ["flange"]), low, high, 0.02)


def test_a_call_takes_less_than_20_us(odd: Path) -> None:
    kinematics = Kinematics(odd, JOINTS, ["l2", "flange"], "base")
    q, best = np.zeros(3), np.inf
    for _ in range(200):  # the best of many short batches: what the call costs, not what else the machine does
        start = time.perf_counter()
        for _ in range(20):
            kinematics.positions(q)
        best = min(best, (time.perf_counter() - start) / 20)
    assert best < 20e-6


# ---- the makers' own files


@needs_arms
def test_panda_agrees_with_its_urdf_with_frankas_flange_and_with_menagerie() -> None:
    urdf = ARMS / "moveit_panda" / "panda.urdf"
    frames = ["panda_link3", "panda_link8", "panda_hand"]
    kinematics = Kinematics(urdf, PANDA, frames, "panda_link0")
    # Flange at the ready pose, by hand from the Denavit-Hartenberg table of Franka's documentation: the upper arm leans
    # back by 45 degrees, the forearm is level, the hand points down.
    c = np.cos(np.pi / 4)
    x = -0.316 * c + 0.0825 * c + 0.384 + 0.088
    z = 0.333 + 0.316 * c + 0.0825 * c + 0.0825 - 0.107
    np.testing.assert_allclose(kinematics.positions(READY)[1], [x, 0.0, z], atol=1e-9)
    np.testing.assert_allclose(
        kinematics.positions(np.zeros(7))[1], [0.088, 0.0, 0.333 + 0.316 + 0.384 - 0.107], atol=1e-9
    )
    menagerie = Kinematics(
        ARMS / "menagerie_franka_emika_panda" / "panda.xml", PANDA, ["link3", "link7", "hand"], "link0"
    )
    for q in np.random.default_rng(3).uniform(-2.5, 2.5, (100, 7)):
        named, ours, theirs = dict(zip(PANDA, q, strict=True)), kinematics.positions(q), menagerie.positions(q)
        expected = [reference(urdf, "panda_link0", frame, named)[:3, 3] for frame in frames]
        np.testing.assert_allclose(ours, expected, atol=1e-12)
        np.testing.assert_allclose(theirs[[0, 2]], ours[[0, 2]], atol=1e-6)


@needs_arms
def test_ur5e_agrees_with_the_makers_calibration_table(tmp_path: Path) -> None:
    table = yaml.safe_load((ARMS / "ur5e" / "default_kinematics.yaml").read_text())["kinematics"]
    links = ["shoulder", "upper_arm", "forearm", "wrist_1", "wrist_2", "wrist_3"]
    joints = [f"joint_{i}" for i in range(6)]
    parts, pairs = ["<robot>", '<link name="base"/>'], zip(["base", *links], links, joints, strict=False)
    for parent, link, joint in pairs:
        o = table[link]
        parts.append(
            f'<link name="{link}"/><joint name="{joint}" type="revolute"><parent link="{parent}"/>'
            f'<child link="{link}"/>'
            f'<origin xyz="{o["x"]} {o["y"]} {o["z"]}" rpy="{o["roll"]} {o["pitch"]} {o["yaw"]}"/><axis xyz="0 0 1"/>'
            '<limit lower="-6" upper="6" velocity="3" effort="1"/></joint>'
        )
    (tmp_path / "ur.urdf").write_text("".join([*parts, "</robot>"]))
    kinematics = Kinematics(tmp_path / "ur.urdf", joints, ["wrist_3"], "base")
    for q in np.random.default_rng(4).uniform(-3, 3, (50, 6)):
        pose = np.eye(4)
        for link, angle in zip(links, q, strict=True):
            o = table[link]
            origin = _pose(np.array([o["x"], o["y"], o["z"]]), _rotation(np.array([o["roll"], o["pitch"], o["yaw"]])))
            pose = pose @ origin @ _pose(np.zeros(3), _about(np.array([0, 0, 1.0]), angle))
        np.testing.assert_allclose(kinematics.positions(q)[0], pose[:3, 3], atol=1e-9)


@needs_arms
def test_read_urdf_finds_the_pandas_tree() -> None:
    urdf = read_urdf(ARMS / "moveit_panda" / "panda.urdf")
    assert urdf.root == "panda_link0"
    assert [name for name, joint in urdf.joints.items() if joint.kind == "revolute"] == PANDA
    assert urdf.joints["panda_joint1"].position == (-2.9671, 2.9671)
    assert urdf.joints["panda_joint4"].soft_position == (-3.0718, 0.0175)
