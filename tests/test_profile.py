"""A profile is read strictly."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE, write_profile

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.profile import load_profile


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
        ({"adapter": "servo"}, "adapter 'servo'"),
        ({"limits": {}}, "'shoulder' has no limits"),
        ({"joints": ["shoulder", "shoulder"]}, "must differ"),
        ({"gripper": {"joint": "finger"}}, "'gripper.open' is missing"),
    ],
)
def test_wrong_profiles_say_what_and_where(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(write_profile(tmp_path / "p.yaml", **changes))


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
