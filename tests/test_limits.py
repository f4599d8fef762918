"""Limits are complete or refused; of several sources the strictest holds and disagreement is said."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.kinematics import description_limits
from embodied.robot_bridge.limits import Limits, LimitSource, match_joints, read_limits
from embodied.robot_bridge.read_joint_limits import load_yaml, read_joint_limits

GOOD = {"position": [-1.0, 2.0], "velocity": 2.0, "acceleration": 4, "jerk": 100.0, "max_step": 0.1}
ARMS = Path(__file__).resolve().parents[2] / "shared" / "data" / "arm-descriptions"
needs_arms = pytest.mark.skipif(not ARMS.is_dir(), reason=f"{ARMS} is absent")


def test_scale_applies_to_rates_only_and_order_is_that_of_the_names() -> None:
    limits = read_limits(["b", "a"], {"a": GOOD, "b": GOOD | {"velocity": 3.0}}, 0.5, "f")
    np.testing.assert_array_equal(limits.velocity, [1.5, 1.0])
    np.testing.assert_array_equal(limits.acceleration, [2.0, 2.0])
    np.testing.assert_array_equal(limits.jerk, [50.0, 50.0])
    np.testing.assert_array_equal(limits.max_step, [0.1, 0.1])
    np.testing.assert_array_equal(limits.clip_position(np.array([9.0, -9.0])), [2.0, -1.0])


@pytest.mark.parametrize(
    ("table", "scale", "message"),
    [
        ({}, 1.0, "'a' has no limits"),
        ({"a": {k: v for k, v in GOOD.items() if k != "acceleration"}}, 1.0, "'a' has no 'acceleration' limit"),
        ({"a": {k: v for k, v in GOOD.items() if k != "jerk"}}, 1.0, r"jerk: <rad/s³>"),
        (
            {"a": {k: v for k, v in GOOD.items() if k != "position"}},
            1.0,
            r"add it: limits: {a: {position: \[low, high\]",
        ),
        ({"a": GOOD | {"acceleraton": 1}}, 1.0, "acceleraton.*Did you mean 'acceleration'"),
        ({"a": GOOD | {"position": [1.0, 1.0]}}, 1.0, "low < high"),
        ({"a": GOOD | {"position": [-1.0, 0.0, 1.0]}}, 1.0, "low < high"),
        ({"a": GOOD | {"velocity": 0.0}}, 1.0, "positive"),
        ({"a": GOOD | {"jerk": float("inf")}}, 1.0, "finite"),
        ({"a": GOOD | {"position": [-1.0, float("nan")]}}, 1.0, "finite"),
        ({"a": GOOD | {"velocity": "fast"}}, 1.0, "numbers"),
        ({"a": [1, 2]}, 1.0, "must be a mapping"),
        ({"a": GOOD, "b": GOOD}, 1.0, "'b', which is no joint"),
        ({"a": GOOD}, 1.5, "limit_scale 1.5"),
        ({"a": GOOD}, 0.0, "limit_scale 0"),
        ({"a": GOOD}, math.nan, "limit_scale nan"),
    ],
)
def test_incomplete_limits_are_refused(table: dict, scale: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_limits(["a"], table, scale, "f")


def test_the_stricter_source_wins_for_each_quantity_and_end_and_is_named() -> None:
    urdf = LimitSource("arm.urdf", {"arm_a": {"position": (-2.9671, 2.9671), "velocity": 1.0}})
    yaml_file = LimitSource("joint_limits.yaml", {"arm_a": {"position": (-2.8973, 2.8973), "acceleration": 3.0}})
    mine = {"arm_a": {"position": [-3.0, 1.0], "velocity": 2.0, "acceleration": 4.0, "jerk": 100.0}}
    limits = read_limits(["arm_a"], mine, 1.0, "profile arm", [urdf, yaml_file])
    np.testing.assert_array_equal([limits.low[0], limits.high[0]], [-2.8973, 1.0])  # one end from each
    np.testing.assert_array_equal([limits.velocity[0], limits.acceleration[0], limits.jerk[0]], [1.0, 3.0, 100.0])
    assert limits.notes == (
        "arm_a position: arm.urdf ±2.9671, joint_limits.yaml ±2.8973, profile arm [-3, 1]; [-2.8973, 1] is used",
        "arm_a velocity: arm.urdf 1, profile arm 2; 1 is used",
        "arm_a acceleration: joint_limits.yaml 3, profile arm 4; 3 is used",
    )
    assert limits.sources["arm_a"]["jerk"] == (("profile arm", 100.0),)
    assert limits.sources["arm_a"]["max_step"] == (("default", 0.1),)


def test_no_source_is_ever_exceeded_whatever_the_sources_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        sources = [
            LimitSource(
                f"s{i}",
                {
                    "j": {
                        "position": (float(-rng.uniform(0.5, 3)), float(rng.uniform(0.5, 3))),
                        **{key: float(rng.uniform(0.1, 9)) for key in ("velocity", "acceleration", "jerk")},
                    }
                },
            )
            for i in range(3)
        ]
        scale = float(rng.uniform(0.05, 1.0))
        limits = read_limits(["j"], {}, scale, "p", sources)
        for source in sources:
            entry = source.joints["j"]
            assert limits.low[0] >= entry["position"][0]
            assert limits.high[0] <= entry["position"][1]
            assert limits.velocity[0] <= entry["velocity"] * scale
            assert limits.acceleration[0] <= entry["acceleration"] * scale
            assert limits.jerk[0] <= entry["jerk"] * scale


def test_sources_that_exclude_each_other_are_refused_with_their_values() -> None:
    other = LimitSource("arm.urdf", {"a": {"position": (3.0, 4.0)}})
    with pytest.raises(ConfigError, match=r"low < high; stated are arm.urdf \[3, 4\], f \[-1, 2\]"):
        read_limits(["a"], {"a": GOOD}, 1.0, "f", [other])


def test_margin_narrows_and_refuses_an_empty_box() -> None:
    limits = read_limits(["a", "b"], {"a": GOOD, "b": GOOD}, 1.0, "f")
    narrowed = limits.narrowed(np.array([0.5, 0.0]))
    np.testing.assert_array_equal([narrowed.low, narrowed.high], [[-0.5, -1.0], [1.5, 2.0]])
    with pytest.raises(ConfigError, match=r"'b' may move from -1 to 2;\na position_margin of 1.5 .* leaves nothing"):
        limits.narrowed(np.array([0.0, 1.5]))


@pytest.mark.parametrize("speed", [0.0, 0.001, 0.3, 2.0])
def test_braking_agrees_with_ruckig(speed: float) -> None:
    ruckig = pytest.importorskip("ruckig")
    limits = read_limits(["a"], {"a": GOOD}, 1.0, "f")
    time, distance = limits.braking(np.array([speed]))
    given, path = ruckig.InputParameter(1), ruckig.Trajectory(1)
    given.control_interface = ruckig.ControlInterface.Velocity
    given.current_velocity, given.target_velocity = [speed], [0.0]
    given.max_acceleration, given.max_jerk = limits.acceleration.tolist(), limits.jerk.tolist()
    ruckig.Ruckig(1).calculate(given, path)
    np.testing.assert_allclose(time[0], path.duration, atol=1e-9)
    np.testing.assert_allclose(distance[0], path.at_time(path.duration)[0][0], atol=1e-9)


def test_joints_match_with_one_prefix_more_or_less_but_never_by_guessing() -> None:
    arm = ["panda_joint1", "panda_joint2", "panda_finger_joint1"]
    assert match_joints(arm, ["joint1", "joint2"]) == {"panda_joint1": "joint1", "panda_joint2": "joint2"}
    assert match_joints(["joint1"], ["panda_joint1", "panda_joint11"]) == {"joint1": "panda_joint1"}
    assert match_joints(["joint1"], ["joint1", "left_joint1"]) == {"joint1": "joint1"}
    assert match_joints(["joint1"], ["my_joint10"]) == {}
    with pytest.raises(ConfigError, match="'joint1' may be left_joint1 or right_joint1"):
        match_joints(["joint1", "joint2"], ["left_joint1", "right_joint1", "left_joint2", "right_joint2"])


def test_a_fingers_limits_are_not_taken_from_a_joint_of_the_arm() -> None:
    names = ["panda_joint1", "panda_joint2", "panda_finger_joint1"]
    table = {name: GOOD for name in names[:2]}
    source = LimitSource("fer.yaml", {key: {"acceleration": 15.0} for key in ("joint1", "joint2")})
    finger = {k: v for k, v in GOOD.items() if k != "acceleration"}
    with pytest.raises(ConfigError, match="'panda_finger_joint1' has no 'acceleration'"):
        read_limits(names, table | {"panda_finger_joint1": finger}, 1.0, "f", [source])


def _file(folder: Path, text: str) -> Path:
    (folder / "joint_limits.yaml").write_text(text)
    return folder / "joint_limits.yaml"


def test_moveit_form_with_its_flags(tmp_path: Path) -> None:
    limits = read_joint_limits(
        _file(
            tmp_path,
            """
            default_velocity_scaling_factor: 0.1
            joint_limits:
              a: {has_velocity_limits: true, max_velocity: 2, has_acceleration_limits: false, max_acceleration: 0,
                  has_jerk_limits: true, max_jerk: 300.0}
              b: {has_position_limits: true, min_position: -1.0, max_position: 1.5, max_velocity: 1.0}
              c: {has_position_limits: false, min_position: -1.0, max_position: 1.0, has_velocity_limits: false,
                  max_velocity: 9.0, max_acceleration: 4.0}
            """,
        )
    )
    assert limits == {
        "a": {"velocity": 2.0, "jerk": 300.0},
        "b": {"position": (-1.0, 1.5), "velocity": 1.0},
        "c": {"acceleration": 4.0},
    }


def test_degrees_are_read_by_a_safe_loader_and_nothing_else_is(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "joint_limits:\n  a: {has_position_limits: true, min_position: !degrees -180.0, max_position: !degrees 90,\n"
        "      max_velocity: !radians 1.5}\n",
    )
    assert read_joint_limits(path) == {"a": {"position": (-math.pi, math.pi / 2), "velocity": 1.5}}
    with pytest.raises(yaml.YAMLError):  # the tag is ours alone
        yaml.safe_load("a: !degrees 1")
    for text in ("a: !!python/object/apply:os.getcwd []", "a: !degrees [1]", "a: !degrees many", "a: [", "a: &b [*b"):
        with pytest.raises(ConfigError, match="not YAML"):
            load_yaml(_file(tmp_path, text))


def test_franka_form(tmp_path: Path) -> None:
    path = _file(tmp_path, "joint1:\n  limit: {lower: -2.7437, upper: 2.7437, velocity: 2.62, effort: 87.0}\n")
    assert read_joint_limits(path) == {"joint1": {"position": (-2.7437, 2.7437), "velocity": 2.62}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no joint limits"),
        ("- 1", "no joint limits"),
        ("joint_limits: 3", "must map joints"),
        ("joint_limits: {a: {}}", "states no limit"),
        ("joint_limits: {a: {max_velocity: fast}}", "'a' has the limit 'fast'"),
        ("joint_limits: {a: {max_velocity: .inf}}", "finite"),
        ("joint1: {limit: {lower: yes, upper: 2}}", "finite"),
    ],
)
def test_wrong_joint_limits_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_joint_limits(_file(tmp_path, text))


def test_absent_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml is no file"):
        read_joint_limits(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"b.yaml is not (a text file|YAML)"):
        read_joint_limits(tmp_path / "b.yaml")


# ---- the makers' own files, which disagree


@needs_arms
def test_the_pandas_sources_disagree_and_the_stricter_is_used() -> None:
    joints = [f"panda_joint{i}" for i in range(1, 8)]
    urdf = description_limits(ARMS / "moveit_panda" / "panda.urdf")
    assert [source.name for source in urdf] == ["panda.urdf", "panda.urdf safety_controller"]
    sources = [
        *urdf[:1],
        LimitSource("moveit", read_joint_limits(ARMS / "moveit_panda" / "hard_joint_limits.yaml")),
        LimitSource("fer", read_joint_limits(ARMS / "franka_fer" / "joint_limits.yaml")),
    ]
    limits = read_limits(joints, {}, 1.0, "p", sources)
    np.testing.assert_allclose(limits.high, [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
    np.testing.assert_allclose(limits.low, [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
    np.testing.assert_allclose(limits.velocity, [2.175] * 4 + [2.61] * 3)
    np.testing.assert_allclose(limits.acceleration, [15, 7.5, 10, 12.5, 15, 20, 20])
    assert "panda_joint1 position: panda.urdf ±2.9671, fer ±2.8973; ±2.8973 is used" in limits.notes
    assert "panda_joint1 velocity: panda.urdf 2.3925, moveit 2.175, fer 2.175; 2.175 is used" in limits.notes
    assert len([note for note in limits.notes if " position: " in note]) == 7
    # The soft limits of the URDF are stricter than its hard ones, and looser than Franka's at joint 4.
    soft = read_limits(joints, {}, 1.0, "p", [*urdf, *sources[1:]])
    np.testing.assert_array_equal(soft.high, limits.high)
    assert any("safety_controller [-3.0718, 0.0175]" in note for note in soft.notes)


@needs_arms
def test_a_ur5e_states_no_acceleration_and_is_refused_until_somebody_does() -> None:
    stated = read_joint_limits(ARMS / "ur5e" / "joint_limits.yaml")
    assert all(set(entry) == {"position", "velocity"} for entry in stated.values())
    np.testing.assert_allclose(stated["elbow_joint"]["position"], (-math.pi, math.pi))
    np.testing.assert_allclose(stated["wrist_3_joint"]["position"], (-2 * math.pi, 2 * math.pi))
    source = LimitSource("joint_limits.yaml", stated)
    with pytest.raises(ConfigError, match="'elbow_joint' has no 'acceleration' limit, neither in joint_limits"):
        read_limits(["elbow_joint"], {}, 0.3, "ur", [source])
    mine = {name: {"acceleration": 5.0, "jerk": 50.0} for name in stated}
    limits = read_limits(list(stated), mine, 0.3, "ur", [source])
    np.testing.assert_allclose(limits.velocity, 0.3 * math.pi)
    assert limits.notes == ()


def test_limits_arrays_line_up() -> None:
    limits = read_limits(["a"], {"a": GOOD}, 1.0, "f")
    assert isinstance(limits, Limits)
    arrays = (limits.low, limits.high, limits.velocity, limits.acceleration, limits.jerk, limits.max_step)
    assert all(one.shape == two.shape == (1,) for one, two in itertools.pairwise(arrays))
