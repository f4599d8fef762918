"""Ways to deploy: look only, in the shadow, slowly, with switches, on a robot that somebody has to confirm."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE, write_bundle, write_profile, write_scene

from embodied.contracts.errors import ConfigError, SafetyError
from embodied.deploy import Deploy, _confirm, as_text, deploy, exit_code
from embodied.progress import Progress
from embodied.robot_bridge.deploy import run_deployment
from embodied.robot_bridge.processes import profile_at_speed
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.robot_log import read_robot_log


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("modes")
    safety = {"deadman_required": True, "estop_required": True}
    return {
        "bundle": write_bundle(folder / "bundle", np.array([0.4, -0.3, 0.9]), camera=False),
        "profile": write_profile(folder / "tiny.yaml", safety=safety),
        "scene": write_scene(folder / "scene"),
    }


def test_a_simulation_holds_the_switches_that_its_profile_asks_for(parts: dict[str, Any], tmp_path: Path) -> None:
    result = run_deployment(**parts, horizon_s=0.8, log_folder=tmp_path)
    (episode,) = result.episodes
    assert episode.end == "horizon"
    assert not [check for check in result.checks if check.status == "failed"]
    assert {check.name: check.found for check in result.checks}["deadman"].endswith("Hz")
    record = read_robot_log(tmp_path / "robot.log")
    assert np.abs(record.velocity[:, :2]).max() > 0.25
    assert np.abs(record.velocity[-1]).max() < 0.05


def test_check_only_and_shadow_send_nothing(parts: dict[str, Any], tmp_path: Path) -> None:
    for mode in ("check_only", "shadow"):
        folder = tmp_path / mode
        modes: dict[str, Any] = {mode: True}
        result = run_deployment(**parts, horizon_s=0.8, log_folder=folder, **modes)
        assert not [check for check in result.checks if check.status == "failed"] or mode == "shadow"
        record = read_robot_log(folder / "robot.log")
        assert record.accepted.max() == 0
        assert len(result.episodes) == (mode == "shadow")
        assert result.shadow is (mode == "shadow")


def test_what_is_missing_on_the_graph_is_a_table_and_exit_code_1(parts: dict[str, Any], tmp_path: Path) -> None:
    config = Deploy(parts["bundle"], str(parts["profile"]), check=True, logs=tmp_path, out=tmp_path / "out.json")
    result = deploy(config, Progress(io.StringIO()))
    failed = {check["name"] for check in result["checks"] if check["status"] == "failed"}
    assert failed == {"joint states", "arm command", "deadman", "e-stop"}
    assert exit_code(result) == 1
    text = as_text(result)
    assert "nobody subscribes to /joint_trajectory_controller/joint_trajectory" in text
    assert text.endswith("checks failed; nothing was commanded")
    with pytest.raises(SafetyError, match="Nothing was commanded: preflight failed in joint states"):
        run_deployment(parts["bundle"], parts["profile"], confirm=lambda question: True, log_folder=tmp_path)


def test_a_real_robot_moves_only_when_somebody_says_so(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SafetyError, match="only when somebody confirms"):
        run_deployment(parts["bundle"], parts["profile"])
    config = Deploy(parts["bundle"], str(parts["profile"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("run\n"))
    with pytest.raises(SafetyError, match=r"no terminal to ask on(.|\n)*--yes"):
        deploy(config, Progress(io.StringIO()))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, granted in (("run\n", True), ("\n", False), ("y\n", False), ("", False)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert _confirm(config, Progress(io.StringIO()))("Ready?") is granted


def test_speed_replaces_the_scale_for_every_process(tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text("joint_limits: {shoulder: {has_velocity_limits: true, max_velocity: 1.0}}")
    profile = write_profile(tmp_path / "robot.yaml", description={"joint_limits": "limits.yaml"})
    folder = tmp_path / "logs"
    folder.mkdir()
    copy = profile_at_speed(profile, 0.5, folder)
    assert yaml.safe_load(copy.read_text())["description"]["joint_limits"] == str(tmp_path / "limits.yaml")
    slow, full = load_profile(copy), load_profile(profile)
    assert (slow.limit_scale, full.limit_scale) == (0.5, PROFILE["limit_scale"])
    np.testing.assert_allclose(slow.read_limits().velocity, 0.5 * full.read_limits().velocity)
    assert slow.read_limits().velocity[0] == 0.5
    assert slow.fingerprint != full.fingerprint
    for speed in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--speed"):
            profile_at_speed(profile, speed, folder)
