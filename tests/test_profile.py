"""A profile is read strictly; the shipped ones are slow, complete, and as strict as their makers' files."""

import copy
import dataclasses
import itertools
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE, write_profile

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.profile import PROFILES, Safety, load_profile
from embodied.robot_bridge.profile_check import profile_warnings, safety_faults
from embodied.robot_bridge.read_joint_limits import read_joint_limits

ARMS = Path(__file__).resolve().parents[2] / "shared" / "data" / "arm-descriptions"
needs_arms = pytest.mark.skipif(not ARMS.is_dir(), reason=f"{ARMS} is absent")
REAL = ("franka-panda", "franka-fr3", "ur5e", "xarm7", "so101")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "robot-profiles.md"

# shoulder about z at the base, elbow about y 0.3 m along x, tip another 0.3 m along x
TINY_URDF = """
<robot name="tiny"><link name="base"/><link name="upper"/><link name="lower"/><link name="tip"/>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
    <limit lower="-1.5" upper="1.5" velocity="1" effort="1"/></joint>
  <joint name="elbow" type="revolute"><origin xyz="0.3 0 0"/><parent link="upper"/><child link="lower"/>
    <axis xyz="0 1 0"/><limit lower="-2.5" upper="2.5" velocity="9" effort="1"/></joint>
  <joint name="end" type="fixed"><origin xyz="0.3 0 0"/><parent link="lower"/><child link="tip"/></joint>
</robot>
"""
BOX = {"low": [-1, -1, -0.1], "high": [1, 1, 1], "frames": ["tip"]}


def test_shipped_profile_reads_and_is_complete() -> None:
    profile = load_profile("panda-mujoco")
    assert len(profile.joints) == 7
    assert profile.all_joints[-1] == "panda_finger_joint"
    assert profile.read_limits().names == profile.all_joints
    assert profile.safety.deadman_required is False
    assert set(profile.topics.cameras) == {"wrist", "side"}


def test_a_real_arm_needs_a_deadman_unless_its_profile_says_otherwise(tmp_path: Path) -> None:
    assert load_profile(write_profile(tmp_path / "p.yaml", safety={})).safety.deadman_required is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safty": {}}, "unknown key 'safty'.*Did you mean 'safety'"),
        ({"safety": {"rate": 3}}, "unknown key 'safety.rate'.*Did you mean 'rate_hz'"),
        ({"joints": "shoulder"}, "'joints' is 'shoulder'"),
        ({"safety": {"rate_hz": "fast"}}, "safety.rate_hz"),
        ({"safety": {"command_every": 1.5}}, "safety.command_every"),
        ({"adapter": "servo"}, "adapter 'servo'.*Did you mean"),
        ({"adapter": "forward_velocity"}, "no timeout.\nPrefer jtc"),
        ({"adapter": "servo_jog"}, "needs servo.frame"),
        ({"adapter": "servo_jog", "servo": {"frame": "base"}}, "drives no gripper"),
        ({"adapter": "servo_jog", "servo": {"frame": "base", "linear": 0.0}}, "servo.linear is 0"),
        ({"topics": {"joint_states": "joint_states"}}, "topics.joint_states is 'joint_states'; .* absolutely"),
        ({"topics": {"cameras": {"eye": "/a//b"}}}, "topics.cameras.eye is '/a//b'"),
        ({"topics": {"cameras": {"eye": 3}}}, "topics.cameras.eye is 3"),
        ({"topics": {"joint_states": "/a", "command": "/a"}}, "topics.command and topics.joint_states are both /a"),
        ({"gripper": PROFILE["gripper"] | {"open": 0.2}}, r"gripper.open is 0.2; the limits of finger are \[0, 0.08\]"),
        ({"gripper": PROFILE["gripper"] | {"open": 0.0}}, "gripper.open and gripper.closed are both 0"),
        ({"gripper": PROFILE["gripper"] | {"adapter": "gripper_command"}}, "needs gripper.topic"),
        ({"gripper": PROFILE["gripper"] | {"adapter": "suck"}}, "gripper.adapter 'suck' is unknown"),
        ({"limit_scale": 1.01}, "limit_scale 1.01"),
        ({"position_margin": -0.1}, "position_margin -0.1"),
        ({"position_margin": 1.9}, "leaves nothing"),
        ({"estimated": {"jrek": "mine"}}, "estimated names 'jrek'.*Did you mean 'jerk'"),
        ({"workspace": BOX}, "needs description.urdf"),
        ({"workspace": {"low": [0, 0, "a"]}}, "'workspace.low' is 'a'"),
        ({"description": {"urdf": "none.urdf"}}, "none.urdf is no file"),
        ({"limits": {}}, "'shoulder' has no limits"),
        ({"joints": ["shoulder", "shoulder"]}, "must differ"),
        ({"gripper": {"joint": "finger"}}, "'gripper.open' is missing"),
    ],
)
def test_wrong_profiles_say_what_and_where(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(write_profile(tmp_path / "p.yaml", **changes))


def test_defaults_are_slow_and_ask_for_a_deadman(tmp_path: Path) -> None:
    profile = {k: v for k, v in PROFILE.items() if k not in ("limit_scale", "position_margin", "safety")}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))
    loaded = load_profile(tmp_path / "p.yaml")
    assert (loaded.limit_scale, loaded.position_margin, loaded.safety.deadman_required) == (0.3, 0.05, True)
    limits = loaded.read_limits()
    np.testing.assert_allclose(limits.velocity, 0.3 * np.array([2.0, 2.0, 0.5]))
    np.testing.assert_allclose(limits.acceleration, 0.3 * np.array([12.0, 12.0, 20.0]))
    np.testing.assert_allclose(limits.jerk, 0.3 * np.array([5000.0, 5000.0, 2000.0]))
    np.testing.assert_allclose(limits.low, [-1.85, -1.85, 0.0])  # the gripper closes on its end stop
    np.testing.assert_allclose(limits.high, [1.85, 1.85, 0.08])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 0.0}, "safety.rate_hz is 0; it must be positive"),
        ({"rate_hz": float("nan")}, "safety.rate_hz is nan"),
        ({"rate_hz": 5000.0}, "above 1000"),
        ({"command_every": 0}, "safety.command_every is 0"),
        ({"look_ahead": -0.1}, "safety.look_ahead is -0.1"),
        ({"joint_timeout": float("inf")}, "safety.joint_timeout is inf"),
        ({"rate_hz": 20.0}, r"chunk_horizon 0.15 s is shorter than two command periods \(0.2 s"),
        ({"chunk_timeout": 0.01}, "chunk_timeout 0.01 s is shorter than a command period"),
        ({"chunk_max_age": 0.03}, "chunk_max_age 0.03 s must exceed safety.action_delay"),
        ({"joint_timeout": 0.005}, "joint_timeout 0.005 s is shorter than a tick"),
        ({"joint_stop": 0.1}, r"joint_stop 0.1 s \(STOPPED\) must exceed safety.joint_timeout 0.1 s"),
        ({"deadman_timeout": 0.1}, "deadman_timeout 0.1 s must exceed 0.1 s"),
        ({"estop_required": True, "estop_timeout": 0.05}, "estop_timeout 0.05 s must exceed 0.1 s"),
    ],
)
def test_contradicting_deadlines_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    assert safety_faults(Safety()) == []
    assert any(re.search(message, fault) for fault in safety_faults(dataclasses.replace(Safety(), **changes)))
    with pytest.raises(ConfigError, match=message):
        load_profile(write_profile(tmp_path / "p.yaml", safety=changes))


def test_an_unused_deadman_may_have_any_timeout() -> None:
    assert safety_faults(dataclasses.replace(Safety(), deadman_required=False, deadman_timeout=0.05)) == []


def test_forward_velocity_needs_an_acknowledgement_and_is_warned_of(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.yaml", adapter="forward_velocity", acknowledge_no_timeout=True)
    profile = load_profile(path)
    assert "keeps moving when the bridge dies" in profile_warnings(profile, profile.read_limits())[0]


def test_description_lies_beside_the_profile_and_its_stricter_limits_win(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tiny.urdf").write_text(TINY_URDF)
    (tmp_path / "sub" / "joint_limits.yaml").write_text("joint_limits: {elbow: {max_acceleration: 3.0}}")
    path = write_profile(
        tmp_path / "sub" / "p.yaml",
        description={"urdf": "tiny.urdf", "joint_limits": "joint_limits.yaml", "base": "base"},
        workspace=BOX,
    )
    profile = load_profile(path)
    limits = profile.read_limits()
    np.testing.assert_array_equal(limits.low, [-1.5, -1.9, 0.0])
    np.testing.assert_array_equal(limits.velocity, [1.0, 2.0, 0.5])
    np.testing.assert_array_equal(limits.acceleration, [12.0, 3.0, 20.0])
    assert limits.notes == (
        "shoulder position: tiny.urdf ±1.5, profile tiny ±1.9; ±1.5 is used",
        "shoulder velocity: tiny.urdf 1, profile tiny 2; 1 is used",
        "elbow position: tiny.urdf ±2.5, profile tiny ±1.9; ±1.9 is used",
        "elbow velocity: tiny.urdf 9, profile tiny 2; 2 is used",
        "elbow acceleration: joint_limits.yaml 3, profile tiny 12; 3 is used",
    )
    workspace = profile.read_workspace()
    assert workspace is not None
    assert workspace.outside(np.array([0.0, 0.0, 0.05])) == ""  # with the gripper's joint
    assert "tip leaves the workspace: z is -0.252 m" in workspace.outside(np.array([0.0, 1.0, 0.05]))
    np.testing.assert_allclose(
        profile.read_kinematics(["tip"]).positions(np.array([np.pi / 2, 0.0])), [[0, 0.6, 0]], atol=1e-12
    )


def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.urdf").write_text(TINY_URDF)
    (tmp_path / "other.yaml").write_text("joint_limits: {joint_9: {max_acceleration: 3.0}}")
    description = {"urdf": "tiny.urdf", "base": "base"}
    with pytest.raises(ConfigError, match=r"other\.yaml states limits of joint_9;\nnone is a joint of profile tiny"):
        load_profile(write_profile(tmp_path / "p.yaml", description={"joint_limits": "other.yaml"}))
    with pytest.raises(ConfigError, match=r"no frame 'tipp'\. Did you mean 'tip'"):
        load_profile(write_profile(tmp_path / "p.yaml", description=description, workspace=BOX | {"frames": ["tipp"]}))
    with pytest.raises(ConfigError, match="no frame 'bass'"):
        load_profile(write_profile(tmp_path / "p.yaml", description=description | {"base": "bass"}, workspace=BOX))
    with pytest.raises(ConfigError, match="holds nothing"):
        load_profile(write_profile(tmp_path / "p.yaml", description=description, workspace=BOX | {"margin": 1.0}))


def test_other_description_files_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "tiny.urdf").write_text(TINY_URDF)
    path = write_profile(tmp_path / "p.yaml")
    np.testing.assert_array_equal(load_profile(path).read_limits().high, [1.9, 1.9, 0.08])
    np.testing.assert_array_equal(load_profile(path, tmp_path / "tiny.urdf").read_limits().high, [1.5, 1.9, 0.08])


def _places(value: object, where: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(place for key, child in children for place in _places(child, (*where, key)))]


def test_junk_anywhere_in_a_profile_is_refused_in_three_lines_or_harmless(tmp_path: Path) -> None:
    junk = [None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", "x", [], [[1]], {}, {"a": 1}, {1: 2}]
    whole = yaml.safe_load((PROFILES / "franka-panda.yaml").read_text())
    rng, refusals = random.Random(0), []
    for place in _places(whole)[1::2]:
        broken = copy.deepcopy(whole)
        parent = broken
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = rng.choice(junk)
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(broken))
        try:
            load_profile(tmp_path / "p.yaml")
        except ConfigError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert max(len(text.splitlines()) for text in refusals) <= 3


# ---- the shipped ones


def test_every_shipped_profile_is_tested_here() -> None:
    assert {path.stem for path in PROFILES.glob("*.yaml")} == {*REAL, "panda-mujoco"}


@pytest.mark.parametrize("name", REAL)
def test_real_arms_are_slow_and_need_a_deadman_and_a_stop(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert (profile.limit_scale, profile.position_margin) == (0.3, 0.05)
    assert profile.safety.deadman_required
    assert profile.safety.estop_required
    assert profile.adapter == "jtc"
    assert all(profile.limits[joint]["max_step"] <= 0.1 for joint in profile.joints)
    assert profile.policy.max_lead <= 0.1
    assert profile.safety.tracking_error <= 0.3
    warnings = profile_warnings(profile, profile.read_limits())
    assert not any(word in text for text in warnings for word in ("deadman", "e-stop", "limit_scale", "workspace"))
    box = profile.read_workspace()
    assert box is not None
    assert box.low[2] == 0.01  # nothing below the arm's foot
    assert profile.description.tool in box.kinematics.frames
    assert profile.read_kinematics([profile.description.base]).positions(np.zeros(len(profile.joints))).tolist() == [
        [0, 0, 0]
    ]


@pytest.mark.parametrize(
    ("name", "q", "tool"),
    [
        # Known poses: Franka's ready pose, flange at (0.3069, 0, 0.5903), fingertips 0.1034 m below; the sums of the
        # Denavit-Hartenberg lengths of the UR5e and the xArm7 (206, 0, 120.5 mm, gripper 172 mm) at zero.
        ("franka-panda", [0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4], [0.306891, 0, 0.486882]),
        ("franka-fr3", [0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4], [0.306891, 0, 0.486882]),
        ("ur5e", [0.0] * 6, [0.425 + 0.3922, 0.1333 + 0.0996, 0.1625 - 0.0997]),
        ("xarm7", [0.0] * 7, [0.206, 0.0, 0.1205 - 0.172]),
    ],
)
def test_chains_of_shipped_profiles_lead_to_known_poses(name: str, q: list[float], tool: list[float]) -> None:
    profile = load_profile(name)
    xyz = profile.read_kinematics([profile.description.tool]).positions(np.array(q))[0]
    np.testing.assert_allclose(xyz, tool, atol=1e-5)


@needs_arms
def test_the_pandas_chain_is_that_of_its_urdf() -> None:
    profile, frames = load_profile("franka-panda"), ["panda_link3", "panda_link5", "panda_hand"]
    chain = profile.read_kinematics(frames)
    urdf = dataclasses.replace(profile.description, urdf=str(ARMS / "moveit_panda" / "panda.urdf"))
    other = dataclasses.replace(profile, description=urdf).read_kinematics(frames)
    for q in np.random.default_rng(0).uniform(-2.5, 2.5, (50, 7)):
        np.testing.assert_allclose(chain.positions(q), other.positions(q), atol=1e-9)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"a": 3}, "chain.a is 3"),
        ({"a": {"joint": "shoulder", "xzy": [0, 0, 1]}}, "unknown key 'xzy'.*Did you mean 'xyz'"),
        ({"a": {"joint": "shoulder", "xyz": [0, 0]}}, r"chain.a.xyz is \[0, 0\]; it must be three finite numbers"),
        ({"a": {"joint": "shoulder", "rpy": [0, 0, float("nan")]}}, "chain.a.rpy"),
        ({"a": {"joint": "shoulder"}, "b": {"joint": "shoulder"}}, "joint 'shoulder' is there already"),
        ({"base": {"joint": "shoulder"}}, "starts at description.base"),
        ({"a": {"joint": "shoulder"}, "tip": {}}, "no moving joint 'elbow'"),
    ],
)
def test_broken_chains_say_what_is_broken(tmp_path: Path, chain: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(write_profile(tmp_path / "p.yaml", description={"base": "base", "chain": chain}, workspace=BOX))


@pytest.mark.parametrize("name", [*REAL, "panda-mujoco"])
def test_shipped_profiles_state_every_limit_and_where_numbers_are_from(name: str) -> None:
    profile = load_profile(name)
    assert all(
        set(limits) == {"position", "velocity", "acceleration", "jerk", "max_step"}
        for limits in profile.limits.values()
    )
    text = (PROFILES / f"{name}.yaml").read_text()
    assert "Position" in text or "positions" in text
    assert "docs/robot-profiles.md" in text


@needs_arms
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("franka-panda", ["franka_fer/joint_limits.yaml"]),
        ("panda-mujoco", ["franka_fer/joint_limits.yaml"]),
        ("ur5e", ["ur5e/joint_limits.yaml"]),
    ],
)
def test_no_profile_is_looser_than_its_makers_file(name: str, files: list[str]) -> None:
    for file in files:
        profile = load_profile(name, joint_limits=ARMS / file)
        assert profile.read_limits().notes == ()
        for joint, stated in read_joint_limits(ARMS / file).items():
            mine = next(limits for key, limits in profile.limits.items() if key == joint or key.endswith(f"_{joint}"))
            assert mine["position"][0] >= stated["position"][0] - 1e-4
            assert mine["position"][1] <= stated["position"][1] + 1e-4
            assert mine["velocity"] <= stated["velocity"] + 1e-4


@needs_arms
def test_the_panda_keeps_to_its_urdf_and_may_have_a_workspace(tmp_path: Path) -> None:
    text = (PROFILES / "franka-panda.yaml").read_text()
    data = yaml.safe_load(text)
    data["description"]["urdf"] = str(ARMS / "moveit_panda" / "panda.urdf")
    data["workspace"] = {"low": [0.1, -0.4, 0.05], "high": [0.8, 0.4, 0.9], "frames": ["panda_hand", "panda_link5"]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    profile = load_profile(tmp_path / "p.yaml")
    np.testing.assert_array_equal(profile.read_limits().high, load_profile("franka-panda").read_limits().high)
    workspace = profile.read_workspace()
    assert workspace is not None
    ready = np.array([0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4])
    assert workspace.outside(ready) == ""
    assert "panda_hand leaves the workspace: y is 0.440 m" in workspace.outside(
        np.add(ready, [1, 0.7, 0, 0.9, 0, 0, 0])
    )


# ---- the page


def _blocks() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_yaml_block_of_the_page_loads(tmp_path: Path) -> None:
    """The first is a whole profile, joint_limits is a file of its own, the others change the profile."""
    links = [
        ("base_link", "", "0 0 0"),
        ("l1", "joint_1", "0 0 0.2"),
        ("l2", "joint_2", "0 0 0.2"),
        ("tool0", "joint_3", "0.2 0 0.2"),
    ]
    urdf = ["<robot>", *(f'<link name="{name}"/>' for name, _, _ in links)]
    for (parent, _, _), (child, joint, xyz) in itertools.pairwise(links):
        urdf.append(
            f'<joint name="{joint}" type="revolute"><parent link="{parent}"/><child link="{child}"/><axis xyz="0 1 0"/>'
            f'<origin xyz="{xyz}"/><limit lower="-2" upper="2" velocity="2" effort="1"/></joint>'
        )
    (tmp_path / "my_arm.urdf").write_text("".join([*urdf, "</robot>"]))
    blocks = _blocks()
    files = [block for block in blocks if "\njoint_limits:" in f"\n{block}"]
    assert len(files) == 1
    (tmp_path / "joint_limits.yaml").write_text(files[0])
    whole = yaml.safe_load(blocks[0])
    changes = [yaml.safe_load(block) for block in blocks[1:] if block not in files]
    assert len(changes) >= 2
    for change in ({}, *changes):
        (tmp_path / "my-arm.yaml").write_text(yaml.safe_dump(whole | change))
        limits = load_profile(tmp_path / "my-arm.yaml").read_limits()
        np.testing.assert_allclose(limits.velocity[:3], 0.3 * np.array([1.5, np.radians(80), 2.0]))
        np.testing.assert_allclose(limits.acceleration[:3], 1.5)


def test_the_page_says_what_the_software_is_not_and_names_every_profile_and_adapter() -> None:
    text = PAGE.read_text()
    assert "not a rated safety function" in text
    for name in (*REAL, "panda-mujoco", "jtc", "forward_position", "forward_velocity", "servo_jog", "servo_twist"):
        assert f"`{name}`" in text


def test_unknown_name_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'panda-mujoco'"):
        load_profile("panda-mujco")
    with pytest.raises(ConfigError, match="no file"):
        load_profile(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_profile(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_profile(tmp_path / "c.yaml")


def test_gripper_may_be_absent(tmp_path: Path) -> None:
    limits = {k: v for k, v in PROFILE["limits"].items() if k != "finger"}
    assert load_profile(write_profile(tmp_path / "p.yaml", gripper=None, limits=limits)).all_joints == (
        "shoulder",
        "elbow",
    )
