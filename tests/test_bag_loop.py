"""The loop closes: what the MuJoCo robot did, recorded and imported, is what its log says and what was executed."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, write_profile
from failure_rig import Rig

from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets.importer import import_dataset
from embodied.datasets.read_rosbag import read
from embodied.policies.bundle import PolicyContract
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.policy_node import PolicyNode
from embodied.robot_bridge.qos import DEFAULT, EVENTS
from embodied.robot_bridge.recorder import Recorder, recording_metadata
from embodied.robot_bridge.robot_log import read_robot_log

SCALES = {
    "joint_position_delta": (0.05, 0.05, 0.04),
    "joint_position": (2.0, 2.0, 0.08),
    "joint_velocity": (0.5, 0.5, 0.04),
}
DT = 0.1


class WavingPolicy:
    """Moves both joints and the gripper by a law of the step's number, in any control mode; keeps what it was shown."""

    control_dt = DT

    def __init__(self, mode: str) -> None:
        shapes = {"joint_position": JOINTS[:2], "joint_velocity": JOINTS[:2], "gripper_position": JOINTS[2:]}
        low_high: dict[str, Any] = {"low": (0.0,), "high": (0.08,)}
        self.observation_spec = {
            key: ArraySpec((len(names),), names=names, **(low_high if key == "gripper_position" else {}))
            for key, names in (shapes | {"joint_target": JOINTS}).items()
        }
        self.image_spec = {"eye": ArraySpec((64, 64, 3), "uint8")}
        self.action_spec = ActionSpec((3,), names=JOINTS, control_mode=mode, scale=SCALES[mode])
        self.shown: list[Mapping[str, np.ndarray]] = []

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        k = len(self.shown)
        self.shown.append(observation)
        if self.action_spec.control_mode == "joint_position":
            return np.array([[0.05 + 0.06 * np.sin(0.5 * (k + j)), -0.1, 0.3 + 0.2 * np.cos(k)] for j in range(3)])
        return np.array([[0.8 * np.sin(0.5 * (k + j)), -0.3, 1.0 if (k // 6) % 2 else -1.0] for j in range(3)])


class Loop:
    """A rig with a recorder; `commands` and `chunks` are what an independent subscriber heard."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.rig, self.folder = Rig(folder), folder
        self.rig.policy = None
        self.policy = WavingPolicy(mode)
        self.rig.camera_policy = PolicyNode(
            self.policy,
            self.rig.profile,
            self.rig.transport("policy"),
            self.rig.clock.stamp,  # type: ignore[arg-type]
        )
        peer = self.rig.transport("peer")
        self.commands: list[m.Trajectory] = []
        self.chunks: list[m.Trajectory] = []
        for topic, kept in (("/bridge/command", self.commands), ("/bridge/chunk", self.chunks)):
            peer.subscriber(
                topic, m.JOINT_TRAJECTORY, DEFAULT, lambda d, _, kept=kept: kept.append(m.read_joint_trajectory(d))
            )
        self._events = peer.publisher("/bridge/event", m.STRING, EVENTS)
        profile = write_profile(folder / "about.yaml")
        self.recorder = Recorder(
            self.rig.profile,
            self.rig.transport("recorder"),
            folder / "bags",
            about=recording_metadata(self.rig.profile, profile),
            epoch_ns=lambda: round(1.7e18),
        )

    def record(self) -> "Loop":
        action, images = self.policy.action_spec, self.policy.image_spec
        contract = PolicyContract(self.policy.observation_spec, images, action, DT, {}, JOINTS[:2], "tiny").to_json()
        self._events.write(
            m.json_string({"event": "episode_start", "bag": "e0", "contract": contract, "instruction": "wave"})
        )
        self.rig.run(0.2)
        self.rig.request("arm")
        assert self.rig.state == "ARMED", self.rig.states
        self.rig.request("run")
        self.rig.run(3.0)
        assert self.rig.state == "RUNNING", self.rig.states
        self._events.write(m.json_string({"event": "episode_end", "success": True}))
        self.recorder.step()
        self.rig.robot.close()
        return self


@pytest.mark.parametrize("mode", list(SCALES))
def test_an_episode_of_the_robot_comes_back_with_its_joints_and_what_was_executed(tmp_path: Path, mode: str) -> None:
    loop = Loop(tmp_path, mode).record()
    store = import_dataset(tmp_path / "bags", tmp_path / "store")
    episode = store.episode(0)
    assert episode.action is not None
    assert (store.num_episodes, store.instructions, store.success.tolist()) == (1, ["wave"], [1])
    steps = int(np.asarray(episode.step_valid).sum())
    assert 25 <= steps <= 31

    # The measured joints are those of the simulator's own log, at the stamps of the observations.
    log = read_robot_log(tmp_path / "robot.log")
    stamps = np.array([chunk.stamp_ns for chunk in loop.chunks])[:steps]
    at = np.searchsorted(log.stamp_ns, stamps)
    assert (np.abs(log.stamp_ns[at] - stamps) <= 1000).all()  # the same simulated moments
    order = [log.joints.index(name) for name in JOINTS]
    measured = log.position[at][:, order]
    np.testing.assert_allclose(episode.observations["joint_position"][:steps], measured[:, :2], atol=1e-6, rtol=0)
    np.testing.assert_allclose(episode.observations["gripper_position"][:steps], measured[:, 2:], atol=1e-6, rtol=0)
    velocity = log.velocity[at][:, order[:2]]
    np.testing.assert_allclose(episode.observations["joint_velocity"][:steps], velocity, atol=1e-5, rtol=0)
    assert np.ptp(measured[:, 0]) > 0.05  # it moved

    # So did the policy see them, and the pictures.
    shown = loop.policy.shown[:steps]
    np.testing.assert_array_equal(episode.observations["joint_position"][:steps], [o["joint_position"] for o in shown])
    np.testing.assert_array_equal(np.asarray(episode.images["eye"])[:steps], [o["images/eye"] for o in shown])
    assert (episode.observations["age_joints"][:steps] < 0.011).all()

    # The actions are what /bridge/command says was executed on behalf of each chunk, not what the policy asked for.
    frames = [chunk.frame_id for chunk in loop.chunks]
    last_of = {command.frame_id: command.positions[-1] for command in loop.commands}
    executed = np.stack([last_of[frame] for frame in frames[:steps]])
    scale = np.array(SCALES[mode])
    if mode == "joint_position":
        np.testing.assert_allclose(episode.action[:steps] * scale, executed, atol=1e-6, rtol=0)
    else:
        size = scale[:2] * (DT if mode == "joint_velocity" else 1.0)
        wanted = np.diff(executed[:, :2], axis=0) / size
        assert (np.abs(wanted) <= 1.001).all()
        np.testing.assert_allclose(episode.action[1:steps, :2], np.clip(wanted, -1, 1), atol=1e-5, rtol=0)
        gripper = np.sign(np.diff(executed[:, 2]))
        moved = np.abs(np.diff(executed[:, 2])) > 0.05 * scale[2]
        np.testing.assert_array_equal(episode.action[1:steps, 2][moved], -gripper[moved])
    asked = np.stack([chunk.positions[0] for chunk in loop.chunks[:steps]])
    assert np.abs(asked - executed)[:, :2].max() > 1e-4  # the filter had its say


def test_the_store_says_which_robot_and_limits_it_came_from(tmp_path: Path) -> None:
    Loop(tmp_path, "joint_position_delta").record()
    attributes = read(tmp_path / "bags", {}).attributes
    assert attributes["recording"]["joints"] == list(JOINTS)
    assert len(attributes["recording"]["limits_sha256"]) == 64
    assert attributes["recording"]["code_version"]
    (calibration,) = attributes["calibrations"].values()
    assert (calibration["width"], calibration["height"]) == (64, 64)
    assert calibration["k"][0] > 0
