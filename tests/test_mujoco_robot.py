"""The simulated robot takes commands as a ros2_control arm does, whichever controller it runs."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import CUBE_QPOS, JOINTS, RobotRig, write_scene

from embodied.contracts.errors import ConfigError, InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.adapter_gripper import gripper_goal
from embodied.robot_bridge.command_messages import Twist, float_array, twist_stamped
from embodied.robot_bridge.gripper_controller import ACTION
from embodied.robot_bridge.mujoco_robot import parser, read_options
from embodied.robot_bridge.qos import COMMAND
from embodied.robot_bridge.scene import SceneState, load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm


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


@pytest.fixture
def rig(tmp_path: Path) -> RobotRig:
    return RobotRig(tmp_path)


def test_robot_publishes_at_its_rates_with_one_stamp_per_moment(rig: RobotRig) -> None:
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


def test_robot_follows_a_trajectory_from_its_arrival(rig: RobotRig) -> None:
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


def test_reset_starts_a_new_state_and_is_confirmed(rig: RobotRig) -> None:
    rig.run(5)
    qpos = [0.4, 0.1, 0.6, 1, 0, 0, 0, -0.5, 0.5, 0.01, -0.01]
    rig.reset.write(m.json_string({"id": "r1", "qpos": qpos}))
    rig.run(30)
    assert json.loads(m.read_string(rig.seen["/sim/status"][-1]))["reset"] == "r1"
    np.testing.assert_allclose(rig.states()[-1].position, [-0.5, 0.5, 0.02], atol=1e-4)
    rig.reset.write(m.json_string({"id": "r2"}))  # the scene's own state
    rig.run(1)
    np.testing.assert_allclose(rig.states()[-1].position, [0.1, -0.2, 0.08], atol=1e-4)


def test_faults(rig: RobotRig) -> None:
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


def test_lost_time_is_skipped_not_simulated_in_a_burst(rig: RobotRig) -> None:
    rig.run(5)
    before = rig.arm.data.time
    rig.clock.seconds += 3.0
    rig.robot.tick()
    assert rig.arm.data.time - before < 0.3
    assert rig.robot.counts["skipped_s"] == pytest.approx(3.0, abs=0.05)


def write_urdf(path: Path) -> Path:
    """The arm of the scene as a URDF: two links of 0.3 m that turn about y."""
    joints = ""
    for name, kind, parent, child, x in (
        ("shoulder", "revolute", "base", "upper", 0.0),
        ("elbow", "revolute", "upper", "lower", 0.3),
        ("end", "fixed", "lower", "tip", 0.3),
    ):
        joints += f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>'
        joints += (
            f'<origin xyz="{x} 0 0"/><axis xyz="0 1 0"/><limit lower="-2" upper="2" effort="9" velocity="9"/></joint>'
        )
    links = "".join(f'<link name="{name}"/>' for name in ("base", "upper", "lower", "tip"))
    path.write_text(f'<robot name="tiny">{links}{joints}</robot>')
    return path


# ---- the other controllers, by the same profile with another adapter


def test_the_same_profile_with_other_topic_names_drives_a_trajectory_or_a_forward_controller(tmp_path: Path) -> None:
    """The acceptance of the drop-in: only names and the adapter differ; the arm ends in the same place."""
    ends = {}
    for adapter, topic in (
        ("jtc", "/other_arm/joint_trajectory"),
        ("forward_position", "/position_controller/commands"),
        ("forward_velocity", "/velocity_controller/commands"),
    ):
        extra: dict[str, Any] = {"acknowledge_no_timeout": True} if adapter == "forward_velocity" else {}
        topics = {"joint_states": "/arm/joint_states", "command": topic}
        rig = RobotRig(tmp_path / adapter, adapter=adapter, topics=topics, **extra)
        states = rig.listen("/arm/joint_states", m.JOINT_STATE)
        rig.run(5)
        start = m.read_joint_state(states[-1]).position
        for k in range(1, 41):
            if adapter == "jtc":
                rig.move(list(start + np.array([0.01 * k, 0, 0])), 0.02)
            else:
                speed = np.array([0.01 / 0.02 if k < 40 else 0.0, 0, 0])
                position = start + np.array([0.01 * k, 0, 0])
                rig.array.write(float_array(position if adapter == "forward_position" else speed))
            rig.run(2)
        rig.run(30)
        assert rig.robot.counts["rejected"] == 0, adapter
        assert rig.robot.counts["accepted"] == 40
        ends[adapter] = m.read_joint_state(states[-1]).position
    np.testing.assert_allclose(ends["jtc"], [0.5, -0.2, 0.08], atol=3e-3)
    np.testing.assert_allclose(ends["forward_position"], ends["jtc"], atol=3e-3)
    np.testing.assert_allclose(ends["forward_velocity"], ends["jtc"], atol=0.015)


def test_velocity_goes_on_when_the_sender_is_gone_and_a_trajectory_does_not(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path / "v", adapter="forward_velocity", acknowledge_no_timeout=True)
    rig.run(5)
    rig.array.write(float_array(np.array([0.3, 0.0, 0.0])))
    rig.run(400)
    np.testing.assert_allclose(rig.states()[-1].position[0], 0.1 + 4 * 0.3, atol=0.05)
    np.testing.assert_allclose(rig.states()[-1].velocity[0], 0.3, atol=0.01)
    rig = RobotRig(tmp_path / "t")
    rig.run(5)
    rig.move([0.16, -0.2, 0.08], 0.2)
    rig.run(400)
    np.testing.assert_allclose(rig.states()[-1].velocity[0], 0.0, atol=1e-3)


def test_servo_twist_moves_the_tool_along_the_base_axis_and_stops(tmp_path: Path) -> None:
    description = {"urdf": str(write_urdf(tmp_path / "tiny.urdf")), "base": "base", "tool": "tip"}
    gripper = {"joint": "finger", "open": 0.08, "closed": 0.0, "adapter": "forward_position", "topic": "/grip/commands"}
    changes = {"adapter": "servo_twist", "description": description, "gripper": gripper, "servo": {"frame": "base"}}
    rig = RobotRig(tmp_path, scene={"tool": "tip"}, **changes)
    grip = rig.peer.publisher("/grip/commands", m.FLOAT_ARRAY, COMMAND)
    rig.reset.write(m.json_string({"qpos": [*CUBE_QPOS, 0.5, 0.8, 0.02, -0.02]}))
    rig.run(10)
    before = rig.arm.tool_in_base()[0].copy()
    grip.write(float_array(np.array([0.06])))
    for _ in range(50):
        twist = Twist(rig.clock.stamp(), "base", np.array([0.0, 0.0, 0.1]), np.zeros(3))
        rig.twist.write(twist_stamped(twist))
        rig.run(2)
    moved = rig.arm.tool_in_base()[0] - before
    # two joints in a plane: z is followed as well as six axes wanted by two joints can be
    assert moved[2] > 0.01
    rig.run(30)
    np.testing.assert_allclose(rig.states()[-1].velocity[:2], 0.0, atol=1e-3)
    np.testing.assert_allclose(rig.states()[-1].position[2], 0.06, atol=1e-3)


def test_a_gripper_action_reaches_stalls_and_is_replaced(tmp_path: Path) -> None:
    gripper = {"joint": "finger", "open": 0.08, "closed": 0.0, "adapter": "gripper_command", "topic": "/hand/cmd"}
    rig = RobotRig(tmp_path, gripper=gripper)
    rig.run(5)

    def send(position: float, identifier: bytes) -> bool:
        request = gripper_goal(position, 0.0, identifier)
        answer = rig.peer.call("/hand/cmd/_action/send_goal", f"{ACTION}_SendGoal", request, 1.0)
        return m.decode(answer, f"{ACTION}_SendGoal_Response").accepted

    def result(identifier: bytes) -> tuple:
        uuid = m.new("unique_identifier_msgs/msg/UUID", np.frombuffer(identifier, np.uint8))
        request = m.encode(m.new(f"{ACTION}_GetResult_Request", uuid))
        answer = rig.peer.call("/hand/cmd/_action/get_result", f"{ACTION}_GetResult", request, 1.0)
        message = m.decode(answer, f"{ACTION}_GetResult_Response")
        return message.status, message.result.stalled, message.result.reached_goal

    first, second, third = (bytes([k] * 16) for k in (1, 2, 3))
    assert send(0.02, first)
    rig.run(1)
    assert result(first) == (2, False, False)  # on its way
    rig.run(60)
    assert result(first) == (4, False, True)
    np.testing.assert_allclose(rig.states()[-1].position[2], 0.02, atol=1e-3)
    assert send(-0.2, second)  # beyond the joint's end: it stands still elsewhere
    rig.run(40)
    assert result(second)[0] == 2
    rig.run(120)
    assert result(second) == (6, True, False)
    assert send(0.05, third)
    assert send(0.07, first)
    assert result(third)[0] == 5  # replaced
    assert not send(np.nan, third)
    assert rig.robot.counts["rejected"] == 0


def test_flags_are_checked() -> None:
    flags = parser().parse_args(["--profile", "x", "--scene", "y", "--state-style", "nan-effort", "--seed", "4"])
    options = read_options(flags)
    assert (options.style.nan_effort, options.style.shuffled, options.seed) == (True, False, 4)
    flags.real_time_factor = float("nan")
    with pytest.raises(ConfigError, match="--real-time-factor is nan"):
        read_options(flags)
