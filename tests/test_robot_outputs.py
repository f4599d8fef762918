"""The simulated robot exposes what ros2_control does: names, QoS, frames, pictures, time."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, RobotRig

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.parameters import get_remote, set_remote
from embodied.robot_bridge.qos import LATCHED, SENSOR_DATA, QosProfile
from embodied.robot_bridge.robot_messages import CONTROLLER_STATE
from embodied.robot_bridge.robot_options import RobotOptions, StateStyle
from embodied.robot_bridge.transport_memory import MemoryTransport

mujoco = pytest.importorskip("mujoco")


@pytest.fixture
def rig(tmp_path: Path) -> RobotRig:
    return RobotRig(tmp_path)


# ---- what ros2_control exposes


def test_joint_states_in_every_style_a_robot_may_have(tmp_path: Path) -> None:
    style = StateStyle(separate_gripper=True, nan_effort=True, no_velocity=True, shuffled=True)
    rig = RobotRig(tmp_path, RobotOptions(style=style, seed=3))
    rig.run(4)
    raw = [m.decode(data, m.JOINT_STATE) for data in rig.seen["/joint_states"]]
    assert {tuple(sorted(message.name)) for message in raw} == {("elbow", "shoulder"), ("finger",)}
    assert len(raw) == 8
    assert all(np.isnan(message.effort).all() and len(message.velocity) == 0 for message in raw)
    by_name = {n: p for message in raw[-2:] for n, p in zip(message.name, message.position, strict=True)}
    np.testing.assert_allclose([by_name[n] for n in JOINTS], [0.1, -0.2, 0.08], atol=1e-6)
    orders = set()
    for seed in range(8):
        rig = RobotRig(tmp_path, RobotOptions(style=StateStyle(shuffled=True), seed=seed))
        rig.run(1)
        state = rig.states()[-1]
        orders.add(state.names)
        np.testing.assert_allclose(state.select(JOINTS)[0], [0.1, -0.2, 0.08], atol=1e-6)
    assert len(orders) > 1


def test_qos_is_that_of_ros2_control(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path)
    offered = {e.topic: e.qos for e in MemoryTransport(rig.bus).graph().endpoints if e.publishes}
    assert offered["/joint_states"] == QosProfile(depth=10)
    assert offered["/camera/eye/image_raw"] == SENSOR_DATA == offered["/camera/eye/camera_info"]
    assert offered["/tf"] == QosProfile(depth=100)
    for latched in ("/tf_static", "/robot_description", "/sim/status"):
        assert offered[latched] == LATCHED, latched
    requested = {e.topic: e.qos for e in MemoryTransport(rig.bus).graph().endpoints if not e.publishes}
    assert requested["/joint_trajectory_controller/joint_trajectory"].reliable


def test_a_latecomer_gets_the_description_and_the_static_frames(rig: RobotRig) -> None:
    rig.run(5)
    description = rig.listen("/robot_description", m.STRING, LATCHED)
    assert "m_shoulder" in m.read_string(description[0])
    frames = m.read_transforms(rig.listen("/tf_static", m.TF_MESSAGE, LATCHED)[0])
    assert {(f.parent, f.child) for f in frames} == {("world", "base_link"), ("base_link", "eye_optical_frame")}


def test_tool_frame_follows_the_arm(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, scene={"tool": "tip", "base": "upper"})
    frames = rig.listen("/tf", m.TF_MESSAGE, QosProfile(depth=100))
    rig.run(10)
    tool = m.read_transforms(frames[-1])[0]
    assert (tool.parent, tool.child) == ("base_link", "tool0")
    # in the frame of the upper link only the elbow counts: 0.3 m on, then 0.3 m turned by -0.2 rad about y
    np.testing.assert_allclose(tool.position_m, [0.3 + 0.3 * np.cos(0.2), 0, 0.3 * np.sin(0.2)], atol=1e-4)
    np.testing.assert_allclose(tool.quat_xyzw, [0, np.sin(-0.1), 0, np.cos(0.1)], atol=1e-4)


def test_controller_state_says_reference_feedback_and_error(rig: RobotRig) -> None:
    states = rig.listen("/joint_trajectory_controller/controller_state", CONTROLLER_STATE)
    rig.run(2)
    rig.move([0.3, 0.0, 0.08], 0.5)
    rig.run(25)
    state = m.decode(states[-1], CONTROLLER_STATE)
    assert tuple(state.joint_names) == JOINTS
    np.testing.assert_allclose(state.reference.positions[0], 0.2, atol=0.02)  # half-way
    np.testing.assert_allclose(state.error.positions, state.reference.positions - state.feedback.positions)
    assert 0.001 < abs(state.error.positions[0]) < 0.03  # the servo lags
    np.testing.assert_allclose(state.reference.velocities[0], 0.2 / 0.5 * 1.5, rtol=0.1)


def test_a_camera_topic_that_ends_in_compressed_is_compressed(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, topics={"cameras": {"eye": "/camera/eye/image_raw/compressed"}})
    pictures = rig.listen("/camera/eye/image_raw/compressed", m.COMPRESSED_IMAGE, SENSOR_DATA)
    info = rig.listen("/camera/eye/camera_info", m.CAMERA_INFO, SENSOR_DATA)
    rig.run(30)
    _, pixels = m.read_compressed_image(pictures[-1])
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 1
    assert m.read_camera_info(info[-1]).width == 64


def test_camera_info_and_frames_project_a_known_point_to_its_pixel(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, scene={"cameras": {"eye": {"camera": "eye", "width": 160, "height": 120}}})
    info = rig.listen("/camera/eye/camera_info", m.CAMERA_INFO, SENSOR_DATA)
    for x, z in ((0.5, 0.5), (-0.4, 0.2), (0.3, -0.1)):
        rig.reset.write(m.json_string({"qpos": [x, 0, z, 1, 0, 0, 0, 2.0, 0, 0, 0]}))  # the arm points down
        rig.run(15)
        _, pixels = m.read_image(rig.seen["/camera/eye/image_raw"][-1])
        red = (pixels[..., 0] > 60) & (pixels[..., 1] < 30)
        rows, columns = np.nonzero(red)
        frames = m.read_transforms(rig.listen("/tf_static", m.TF_MESSAGE, LATCHED)[0])
        frame = next(f for f in frames if f.child == "eye_optical_frame")
        x0, y0, z0, w0 = frame.quat_xyzw
        quat = np.array([w0, x0, y0, z0])
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quat)
        in_camera = matrix.reshape(3, 3).T @ (np.array([x, 0, z]) - frame.position_m)
        assert in_camera[2] > 1  # z looks forward
        u, v, w = m.read_camera_info(info[-1]).intrinsics @ in_camera
        assert abs(u / w - columns.mean()) < 0.75, (x, z)
        assert abs(v / w - rows.mean()) < 0.75, (x, z)


# ---- time


def test_simulated_time_is_stamped_published_and_may_run_fast(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, RobotOptions(use_sim_time=True, real_time_factor=2.0))
    clocks = rig.listen("/clock", m.CLOCK)
    rig.run(100)
    times = np.array([m.read_clock(data) for data in clocks]) * 1e-9
    assert times[-1] - times[0] == pytest.approx(2 * 0.99, abs=0.02)
    assert (np.diff(times) > 0).all()
    assert [s.stamp_ns for s in rig.states()] == [m.read_clock(data) for data in clocks]
    assert rig.arm.data.time == pytest.approx(2.0, abs=0.02)


def test_stamps_are_of_the_simulated_moment(rig: RobotRig) -> None:
    rig.run(30)
    steps = np.diff([s.stamp_ns for s in rig.states()])
    assert set(np.round(steps / 1e6).astype(int)) <= {8, 12}  # whole control steps of 4 ms, 10 on average
    assert abs(steps.mean() - 1e7) < 4e5
    assert abs(rig.states()[-1].stamp_ns - rig.clock.stamp()) <= 4_000_001


def test_parameters_say_what_may_change_and_change_it(rig: RobotRig) -> None:
    peer = MemoryTransport(rig.bus, "peer")
    node = rig.transport.full_name
    names = ("use_sim_time", "real_time_factor", "state_rate", "seed")
    assert get_remote(peer, node, names, 1.0) == [False, 1.0, 100.0, 0]
    answers = set_remote(peer, node, {"real_time_factor": 3.0, "use_sim_time": True, "state_rate": -1.0}, 1.0)
    assert answers["real_time_factor"] == ""
    assert "fixed" in answers["use_sim_time"]
    assert "between" in answers["state_rate"]
    before = rig.arm.data.time
    rig.run(50)
    assert rig.arm.data.time - before == pytest.approx(1.5, abs=0.02)
    assert rig.robot.tick_hz == 300.0
