"""The processes over the wire: an episode with its bag, and what happens when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import CUBE_QPOS, write_bundle, write_profile, write_scene

from embodied.contracts.errors import ConfigError, EmbodiedError, InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.bag_recover import read_metadata, read_records
from embodied.robot_bridge.deploy import run_deployment
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.processes import Child, free_domain
from embodied.robot_bridge.qos import LATEST

ACTION = np.array([0.4, -0.3, 0.9])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("deploy")
    return {
        "bundle": write_bundle(folder / "bundle", ACTION),
        "profile": write_profile(folder / "tiny.yaml"),
        "scene": write_scene(folder / "scene"),
    }


def test_two_episodes_are_run_and_recorded(parts: dict[str, Any], tmp_path: Path) -> None:
    states = [None, {"qpos": [*CUBE_QPOS, -0.5, 0.4, 0.04, -0.04]}]
    result = run_deployment(
        **parts,
        initial_states=states,
        horizon_s=1.2,
        # The tip sinks as the shoulder turns; only the first episode starts high enough to show it soon.
        success=lambda poses: bool(poses["tip"][2] < -0.12),
        record=tmp_path / "bags",
        log_folder=tmp_path / "logs",
    )
    first, second = result.episodes
    assert (first.success, first.end) == (True, "success")
    assert (second.success, second.end) == (False, "horizon")
    assert 9 <= second.steps <= 15
    assert second.duration_s == pytest.approx(1.2, abs=0.2)
    assert result.control_dt == 0.1
    assert len(result.observation_to_chunk_s) >= first.steps + second.steps
    chunk, command = np.median(result.observation_to_chunk_s), np.median(result.observation_to_command_s)
    assert 0 < chunk < command < 0.15
    json.dumps(result.to_json())

    assert second.bag is not None
    path = Path(second.bag) / "episode_0001_0.mcap"
    assert (path.parent / "metadata.yaml").exists()
    assert read_metadata(path)["embodied_contract"]["joint_names"] == ["shoulder", "elbow"]
    records = list(read_records(path))
    events = [m.read_json(data) for topic, _, data, _ in records if topic == "/bridge/event"]
    assert events[0]["event"] == "episode_start"
    assert events[-1]["event"] == "episode_end"
    assert events[-1]["success"] is False
    states_seen = [m.read_joint_state(d) for topic, _, d, _ in records if topic == "/joint_states"]
    np.testing.assert_allclose(states_seen[0].select(["shoulder", "elbow"])[0], [-0.5, 0.4], atol=0.02)
    commands = np.array([m.read_joint_trajectory(d).positions[0] for t, _, d, _ in records if t == "/bridge/command"])
    # Executed: 0.04 and -0.03 rad per step from the start, the gripper closed.
    travelled = commands[-1] - commands[0]
    if int(result.safety["holds"]) == int(result.safety["rejected"]) == 0:  # else a busy machine lost some of the steps
        assert travelled[0] == pytest.approx(0.04 * second.steps, abs=0.05)
        assert travelled[1] == pytest.approx(-0.03 * second.steps, abs=0.05)
    assert commands[-1][2] == pytest.approx(0.0, abs=1e-3)
    assert {topic for topic, *_ in records} >= {
        "/joint_states",
        "/camera/eye/image_raw",
        "/bridge/chunk",
        "/bridge/command",
        "/bridge/state",
        "/bridge/event",
        "/sim/pose/cube",
        "/sim/pose/tip",
    }


@pytest.fixture(scope="module")
def deployment(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(**parts, log_folder=tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture
def speeds(deployment: Deployment) -> list[tuple[float, float]]:
    """(monotonic s, joint speed [rad/s]) as the robot reports them; the arm is moving."""
    found: list[tuple[float, float]] = []

    def keep(data: bytes, at: int) -> None:
        found.append((at * 1e-9, float(np.abs(m.read_joint_state(data).velocity[:2]).max())))

    deployment.transport.subscriber("/joint_states", m.JOINT_STATE, LATEST, keep)
    deployment.reset(None)
    deployment.request("arm", "ARMED")
    deployment.request("run", "RUNNING")
    end = time.monotonic() + 20
    while (not found or found[-1][1] < 0.25) and time.monotonic() < end:
        if deployment.state["state"] == "HOLD":  # a busy machine was late with something
            deployment.request("run", "RUNNING")
        time.sleep(0.02)
    assert found[-1][1] >= 0.25
    return found


def assert_stops_within_300_ms(speeds: list[tuple[float, float]], since: float) -> None:
    after = [(t - since, speed) for t, speed in speeds if t > since]
    assert len(after) > 30
    assert max(speed for t, speed in after if t > 0.3) < 0.03


def test_a_killed_safety_process_stops_the_arm_within_300_ms(deployment: Deployment, speeds: list) -> None:
    killed_at = time.monotonic()
    os.kill(deployment.children["safety_node"].process.pid, signal.SIGKILL)
    time.sleep(0.7)
    assert_stops_within_300_ms(speeds, killed_at)
    deployment.restart("safety_node")
    assert deployment.state["state"] == "INACTIVE"


def test_ending_the_safety_process_politely_brakes_and_exits_zero(deployment: Deployment, speeds: list) -> None:
    ended_at = time.monotonic()
    deployment.children["safety_node"].end()
    assert deployment.children["safety_node"].process.returncode == 0
    time.sleep(0.5)
    assert_stops_within_300_ms(speeds, ended_at)
    deployment.restart("safety_node")


def test_a_killed_policy_process_stops_the_arm_within_300_ms(deployment: Deployment, speeds: list) -> None:
    killed_at = time.monotonic()
    os.kill(deployment.children["policy_node"].process.pid, signal.SIGKILL)
    time.sleep(0.7)
    assert_stops_within_300_ms(speeds, killed_at)
    assert deployment.state["state"] == "HOLD"
    with pytest.raises(EmbodiedError, match="The policy_node process ended"):
        deployment.request("run", "NEVER", timeout=2.0)


def test_a_child_that_cannot_start_is_quoted(parts: dict[str, Any], tmp_path: Path) -> None:
    other = write_scene(tmp_path / "other", gripper=None)
    with pytest.raises(EmbodiedError, match=r"mujoco_robot process ended(.|\n)*has joints shoulder, elbow, finger"):
        Deployment(parts["bundle"], parts["profile"], other, log_folder=tmp_path)


def test_wrong_arguments_start_nothing(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no policy bundle"):
        Deployment(tmp_path / "none", parts["profile"])
    with pytest.raises(ConfigError, match="no scene"):
        Deployment(parts["bundle"], parts["profile"], tmp_path)


def test_children_end_when_their_parent_is_gone(parts: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from embodied.robot_bridge.processes import Child\n"
        f"c = Child('safety_node', ['--profile', {str(parts['profile'])!r}, '--domain', '{free_domain()}'],"
        f" Path({str(tmp_path)!r}))\n"
        "print(c.process.pid, flush=True); import time; time.sleep(1.5); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    pid = int(done.stdout)
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]:
        assert time.monotonic() < end, "the orphan still runs"
        time.sleep(0.1)


def test_a_child_is_ended_by_its_own_id(parts: dict[str, Any], tmp_path: Path) -> None:
    flags = ["--profile", str(parts["profile"]), "--domain", str(free_domain())]
    one, two = (Child("safety_node", flags, tmp_path) for _ in range(2))
    time.sleep(2.0)
    one.end()
    assert one.process.returncode is not None
    two.check()
    two.end()
