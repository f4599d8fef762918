"""The simulated robot publishes, takes commands and shows faults as a ros2_control arm does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import CUBE_QPOS, JOINTS, Clock, tiny_profile, write_scene

from embodied.contracts.errors import ConfigError, InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.mujoco_robot import MujocoRobot
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, LATEST, SENSOR_DATA, QosProfile
from embodied.robot_bridge.robot_options import RobotOptions
from embodied.robot_bridge.scene import SceneState, load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, '"schema": 1'),
        ({"jointz": {}}, "unknown key 'jointz'.*Did you mean 'joints'"),
        ({"joints": {"j": {"joint": "m_shoulder"}}}, "'actuator' is missing"),
        ({"render": {"flag": {}}}, "Did you mean 'flags'"),
    ],
)
def test_scene_is_read_strictly(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scene(write_scene(tmp_path, **changes))


def test_scene_that_does_not_fit_its_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scene"):
        load_scene(tmp_path / "nowhere")
    scene = load_scene(write_scene(tmp_path, bodies={"cube": "cub"}))
    with pytest.raises(ConfigError, match=r"do not fit.*cub"):
        SimulatedArm(scene)
    (tmp_path / "scene.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_scene(tmp_path)


def test_arm_reads_the_gripper_as_one_joint_and_holds_its_start(tmp_path: Path) -> None:
    arm = SimulatedArm(load_scene(write_scene(tmp_path)))
    assert arm.names == JOINTS
    position, velocity = arm.joint_state()
    np.testing.assert_allclose(position, [0.1, -0.2, 0.08])
    np.testing.assert_array_equal(velocity, 0.0)
    for _ in range(50):
        arm.advance(arm.target)
    np.testing.assert_allclose(arm.joint_state()[0], [0.1, -0.2, 0.08], atol=1e-6)
    np.testing.assert_allclose(arm.data.ctrl, [0.1, -0.2, 0.04, -0.04], atol=1e-9)
    # ctrl of a state is what is held, even where the joints are elsewhere
    arm.reset(SceneState((*CUBE_QPOS, 0.0, 0.0, 0.02, -0.02), ctrl=(0.3, 0.0, 0.01, -0.01)))
    np.testing.assert_allclose(arm.target, [0.3, 0.0, 0.02], atol=1e-9)
    with pytest.raises(InputError, match="3 numbers in 'qpos'"):
        arm.reset(SceneState((1.0, 2.0, 3.0)))


class Rig:
    """A robot on a memory bus under virtual time."""

    def __init__(self, folder: Path, options: RobotOptions | None = None, **changes: object) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        profile = tiny_profile(folder, **changes)
        self.arm = SimulatedArm(load_scene(write_scene(folder)))
        transport = MemoryTransport(self.bus)
        self.robot = MujocoRobot(self.arm, profile, transport, self.clock.monotonic, self.clock.stamp, options)
        self.seen: dict[str, list[bytes]] = {}
        peer = self._peer = MemoryTransport(self.bus)
        for topic, kind, qos in (
            ("/joint_states", m.JOINT_STATE, LATEST),
            ("/camera/eye/image_raw", m.IMAGE, SENSOR_DATA),
            ("/sim/pose/cube", m.POSE_STAMPED, LATEST),
            ("/sim/pose/tip", m.POSE_STAMPED, LATEST),
            ("/sim/status", m.STRING, LATCHED),
        ):
            self.listen(topic, kind, qos)
        self.command = peer.publisher(profile.topics.command, m.JOINT_TRAJECTORY, COMMAND)
        self.reset = peer.publisher("/sim/reset", m.STRING, DEFAULT)
        self.fault = peer.publisher("/sim/fault", m.STRING, DEFAULT)

    def listen(self, topic: str, kind: str, qos: QosProfile = LATEST) -> list[bytes]:
        self.seen[topic] = []
        self._peer.subscriber(topic, kind, qos, lambda data, _: self.seen[topic].append(data))
        return self.seen[topic]

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.clock.seconds += 0.01
            self.robot.tick()

    def move(self, target: list[float], seconds: float, names: tuple[str, ...] = JOINTS) -> None:
        rows, rest = np.array([target], float), np.zeros((1, len(names)))
        self.command.write(m.joint_trajectory(m.Trajectory(0, "", names, np.array([seconds]), rows, rest)))

    def inject(self, fault: str, **values: object) -> None:
        self.fault.write(m.json_string({"fault": fault, **values}))

    def states(self) -> list[m.JointSample]:
        return [m.read_joint_state(data) for data in self.seen["/joint_states"]]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_robot_publishes_at_its_rates_with_one_stamp_per_moment(rig: Rig) -> None:
    rig.run(100)
    assert len(rig.states()) == 100
    images = [m.read_image(data) for data in rig.seen["/camera/eye/image_raw"]]
    assert abs(len(images) - 10) <= 1
    assert images[0][1].shape == (64, 64, 3)
    assert images[0][1].std() > 1  # not blank
    assert {stamp for stamp, _ in images} <= {state.stamp_ns for state in rig.states()}
    assert abs(len(rig.seen["/sim/pose/cube"]) - 50) <= 1
    np.testing.assert_allclose(m.read_pose_stamped(rig.seen["/sim/pose/cube"][-1])[1], [0.5, 0, 0.5, 0, 0, 0, 1])
    tip = m.read_pose_stamped(rig.seen["/sim/pose/tip"][-1])[1]
    expected_x = 0.3 * np.cos(0.1) + 0.3 * np.cos(0.1 - 0.2)
    np.testing.assert_allclose(tip[0], expected_x, atol=1e-4)


def test_robot_follows_a_trajectory_from_its_arrival(rig: Rig) -> None:
    rig.run(10)
    rig.clock.seconds += 0.006  # between two ticks
    rig.move([0.3, 0.0, 0.02], 0.2)
    rig.clock.seconds -= 0.006
    rig.run(60)
    assert rig.robot.counts["accepted"] == 1
    np.testing.assert_allclose(rig.states()[-1].position, [0.3, 0.0, 0.02], atol=5e-3)
    rig.move([9.0, 0.0], 0.2, names=JOINTS[:2])
    rig.command.write(m.string("garbage"))
    rig.run(20)
    assert rig.robot.counts["rejected"] == 2
    np.testing.assert_allclose(rig.states()[-1].position, [0.3, 0.0, 0.02], atol=5e-3)


def test_reset_starts_a_new_state_and_is_confirmed(rig: Rig) -> None:
    rig.run(5)
    qpos = [0.4, 0.1, 0.6, 1, 0, 0, 0, -0.5, 0.5, 0.01, -0.01]
    rig.reset.write(m.json_string({"id": "r1", "qpos": qpos}))
    rig.run(30)
    assert json.loads(m.read_string(rig.seen["/sim/status"][-1]))["reset"] == "r1"
    np.testing.assert_allclose(rig.states()[-1].position, [-0.5, 0.5, 0.02], atol=1e-4)
    rig.reset.write(m.json_string({"id": "r2"}))  # the scene's own state
    rig.run(1)
    np.testing.assert_allclose(rig.states()[-1].position, [0.1, -0.2, 0.08], atol=1e-4)


def test_faults(rig: Rig) -> None:
    rig.run(20)
    counts = {}
    for fault in ("freeze_state", "freeze_cameras", "nan", "none"):
        rig.fault.write(m.json_string({"fault": fault}))
        before = len(rig.seen["/joint_states"]), len(rig.seen["/camera/eye/image_raw"])
        rig.run(40)
        counts[fault] = (
            len(rig.seen["/joint_states"]) - before[0],
            len(rig.seen["/camera/eye/image_raw"]) - before[1],
        )
        if fault == "nan":
            assert np.isnan(rig.states()[-1].position).all()
    assert counts["freeze_state"][0] == 0
    assert counts["freeze_cameras"][1] == 0
    assert counts["none"][0] == 40
    rig.fault.write(m.json_string({"fault": "explode"}))
    rig.run(1)
    assert rig.robot.counts["rejected"] == 1


def test_lost_time_is_skipped_not_simulated_in_a_burst(rig: Rig) -> None:
    rig.run(5)
    before = rig.arm.data.time
    rig.clock.seconds += 3.0
    rig.robot.tick()
    assert rig.arm.data.time - before < 0.3
    assert rig.robot.counts["skipped_s"] == pytest.approx(3.0, abs=0.05)
