"""`embodied robot check` shows limits in use and their sources, warns, and refuses."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE, write_profile

from embodied.cli import main
from embodied.robot_bridge.profile import PROFILES

SHIPPED = ("franka-panda", "franka-fr3", "ur5e", "xarm7", "so101", "panda-mujoco")
ARMS = Path(__file__).resolve().parents[2] / "shared" / "data" / "arm-descriptions"
needs_arms = pytest.mark.skipif(not ARMS.is_dir(), reason=f"{ARMS} is absent")


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    code = main(["robot", "check", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_passes_and_says_what_it_is_not(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "check", name]) == 0
    text = capsys.readouterr().out
    assert f"{name} (" in text
    assert "No rated safety function" in text
    assert ("warning: no workspace" in text) == (name == "panda-mujoco")
    assert max(len(line) for line in text.splitlines()) < 240


def test_numbers_are_those_in_use_and_braking_is_computed_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_profile(tmp_path / "p.yaml", limit_scale=0.5, position_margin=0.1)
    code, result = _json(capsys, str(path))
    assert code == 0
    shoulder, _, finger = result["joints"]
    assert shoulder["position"] == pytest.approx([-1.8, 1.8])
    assert finger["position"] == pytest.approx([0.0, 0.08])
    assert (shoulder["velocity"], shoulder["acceleration"], shoulder["jerk"]) == pytest.approx((1.0, 6.0, 2500.0))
    assert shoulder["stop_time"] == pytest.approx(1.0 / 6.0 + 6.0 / 2500.0)  # v/a + a/j
    assert shoulder["stop_distance"] == pytest.approx(shoulder["stop_time"] / 2)
    assert shoulder["sources"]["velocity"] == [["profile tiny", 2.0]]
    assert result["disagreements"] == []
    main(["robot", "check", str(path)])
    text = capsys.readouterr().out
    assert "shoulder  -1.8000 to 1.8000  1         6       2500  0.3       0.169 s   0.085" in text
    assert "Every limit comes from profile tiny." in text
    assert "No two sources disagree." in text


def test_sources_disagreement_and_winner_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = tmp_path / "joint_limits.yaml"
    limits.write_text(
        "joint_limits: {elbow: {min_position: -3.0, max_position: 1.0, max_velocity: 1.5, max_acceleration: 20.0}}"
    )
    path = write_profile(tmp_path / "p.yaml")
    assert main(["robot", "check", str(path), "--joint-limits", str(limits)]) == 0
    text = capsys.readouterr().out
    assert "  elbow velocity: joint_limits.yaml 1.5, profile tiny 2; 1.5 is used\n" in text
    assert "  elbow acceleration: joint_limits.yaml 20, profile tiny 12; 12 is used\n" in text
    assert "  shoulder, finger\n    position      profile tiny\n" in text
    assert "    position      * joint_limits.yaml and profile tiny\n" in text  # an end from each
    assert "    velocity      * joint_limits.yaml\n    acceleration  * profile tiny\n" in text


def test_warnings_and_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_profile(tmp_path / "p.yaml", estimated={"jerk": "mine"}, safety={"chunk_horizon": 0.06})
    code, result = _json(capsys, str(path))
    text = "\n".join(result["warnings"])
    assert code == 0
    for part in (
        "no workspace",
        "no e-stop",
        "limit_scale 1",
        "no position_margin",
        "jerk is an estimate: mine",
        "four",
    ):
        assert part in text
    assert "no deadman" not in text
    assert _json(capsys, str(path), "--strict")[0] == 1


def test_a_careful_profile_has_no_warning_and_passes_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.urdf").write_text(
        '<robot><link name="base"/><link name="a"/><link name="b"/>'
        '<joint name="shoulder" type="revolute"><parent link="base"/><child link="a"/>'
        '<limit lower="-1" upper="1" velocity="1" effort="1"/></joint>'
        '<joint name="elbow" type="revolute"><parent link="a"/><child link="b"/>'
        '<limit lower="-1" upper="1" velocity="1" effort="1"/></joint></robot>'
    )
    path = write_profile(
        tmp_path / "p.yaml",
        limit_scale=0.3,
        position_margin=0.05,
        safety={"estop_required": True},
        description={"urdf": "a.urdf"},
        workspace={"low": [-1, -1, -1], "high": [1, 1, 1], "frames": ["b"]},
    )
    code, result = _json(capsys, str(path), "--strict")
    assert (code, result["warnings"]) == (0, [])
    assert result["workspace"]["frames"] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits": {k: v for k, v in PROFILE["limits"].items() if k != "elbow"}}, "'elbow' has no limits"),
        ({"safety": {"joint_stop": 0.01}}, "joint_stop"),
        ({"adapter": "forward_velocity"}, "no timeout"),
        ({"workspace": {"low": [0, 0, 0], "high": [1, 1, 1], "frames": ["hand"]}}, "needs description.urdf"),
    ],
)
def test_refusals_are_short_and_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    assert main(["robot", "check", str(write_profile(tmp_path / "p.yaml", **changes))]) == 2
    out, err = capsys.readouterr()
    error = err[err.index("error: ") :]
    assert out == ""
    assert message in error
    assert len(error.splitlines()) <= 3


@needs_arms
def test_the_panda_with_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load((PROFILES / "franka-panda.yaml").read_text())
    data["workspace"]["frames"] = ["panda_hand"]  # MoveIt's older URDF has no panda_hand_tcp
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    folder = ARMS / "moveit_panda"
    files = ["--urdf", str(folder / "panda.urdf"), "--joint-limits", str(folder / "joint_limits.yaml")]
    assert main(["robot", "check", "franka-panda", *files]) == 2
    assert "panda.urdf has no frame 'panda_hand_tcp'. Did you mean 'panda_hand'?" in capsys.readouterr().err
    code, result = _json(capsys, str(tmp_path / "p.yaml"), *files)
    assert code == 0
    first = result["joints"][0]
    assert first["acceleration"] == pytest.approx(0.3 * 3.75)  # MoveIt plans with a quarter of Franka's 15
    assert (
        "panda_joint1 acceleration: joint_limits.yaml 3.75, profile franka-panda 15; 3.75 is used"
        in result["disagreements"]
    )
    assert any(note.startswith("panda_joint1 position: panda.urdf ±2.9671, ") for note in result["disagreements"])
