"""Grippers that the arm's controller does not drive: what they are sent, how often, and what happens when they fail."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from adapter_rig import AdapterRig
from bridge_fixtures import tiny_profile

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.adapter_gripper import STALE, Hysteresis, gripper_goal
from embodied.robot_bridge.command_messages import read_float_array
from embodied.robot_bridge.qos import LATEST
from embodied.robot_bridge.robot_options import RobotOptions, StateStyle
from embodied.robot_bridge.safety import State

TOPIC = "/gripper_controller/commands"
ACTION = "/gripper_controller/gripper_cmd"
GRIPPER = {"joint": "finger", "open": 0.08, "closed": 0.0}
SEPARATE = RobotOptions(style=StateStyle(separate_gripper=True))


def rig_of(folder: Path, adapter: str, options: RobotOptions | None = None, **changes: object) -> AdapterRig:
    gripper = GRIPPER | {"adapter": adapter, "topic": TOPIC if adapter == "forward_position" else ACTION}
    return AdapterRig(folder, tiny_profile(folder, gripper=gripper, **changes), options)


def close(rig: AdapterRig, seconds: float = 1.0) -> None:
    """Chunks whose arm stands still and whose gripper closes at 0.1 m/s."""
    target = np.array(rig.arm.joint_state()[0])
    for _ in range(round(seconds / 0.1)):
        target = np.maximum(target - [0, 0, 0.01], [-9, -9, 0.0])
        rig.offer(target)
        rig.run(0.1)


def test_a_gripper_on_a_topic_closes_smoothly_with_few_messages(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "forward_position").start()
    sent: list[tuple[float, float]] = []
    rig.operator.subscriber(
        TOPIC, m.FLOAT_ARRAY, LATEST, lambda d, _: sent.append((rig.clock.seconds, float(read_float_array(d)[0])))
    )
    close(rig)
    rig.run(0.5)
    assert rig.path[-1][2] == pytest.approx(0.0, abs=2e-3)
    times, values = np.array(sent).T
    assert 10 < len(sent) < 30  # 150 ticks
    assert np.diff(times).min() > 0.039
    assert (np.diff(values) <= 1e-12).all()
    assert values.min() >= 0.0
    assert np.abs(np.diff(values) / np.diff(times)).max() < 0.5  # the joint's velocity limit


def test_the_arm_is_sent_without_the_gripper_and_both_are_recorded(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "forward_position").start()
    close(rig, 0.3)
    assert m.read_joint_trajectory(rig.sent[-1]).names == ("shoulder", "elbow")
    assert rig.commands[-1].names == ("shoulder", "elbow", "finger")


def test_goals_of_an_action_close_the_gripper(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "gripper_command").start()
    rig.before_step = lambda: time.sleep(0.001)  # goals go out on a thread of their own
    close(rig, 1.5)
    assert rig.path[-1][2] == pytest.approx(0.0, abs=2e-3)
    assert rig.safety is not None
    assert rig.safety.commands.gripper_fault == ""


def test_an_absent_action_server_refuses_arming_by_name(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "gripper_command").run(0.2)
    robot = next(t for t in rig.bus.transports if t.node == "robot")
    robot.servers.clear()
    rig.send("arm")
    assert rig.state is State.INACTIVE
    assert any(f"nobody serves the action {ACTION}" in str(event) for event in rig.events)


def test_a_goal_that_is_not_answered_is_said_and_the_arm_goes_on(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "gripper_command").start()
    robot = next(t for t in rig.bus.transports if t.node == "robot")
    robot.servers.clear()
    close(rig, 0.3)
    time.sleep(0.05)
    close(rig, 0.3)
    assert rig.state is State.RUNNING
    assert any(event["event"] == "gripper" and ACTION in event["text"] for event in rig.events)


def test_a_gripper_whose_state_comes_by_itself_has_an_age_of_its_own(tmp_path: Path) -> None:
    """Its driver dies: it is left alone and said so, the arm goes on."""
    rig = rig_of(tmp_path, "forward_position", SEPARATE).start()
    safety = rig.safety
    assert safety is not None
    close(rig, 0.3)
    at = rig.clock.seconds
    update = safety._joints.update

    def without_gripper(sample: m.JointSample, received_at: float) -> bool:
        return update(sample, received_at) if "finger" not in sample.names else False

    safety._joints.update = without_gripper  # type: ignore[method-assign]
    sent: list[float] = []
    rig.operator.subscriber(TOPIC, m.FLOAT_ARRAY, LATEST, lambda d, _: sent.append(rig.clock.seconds))
    close(rig, 1.6)
    assert rig.state is State.RUNNING
    assert sent
    assert max(sent) <= at + STALE + 0.02
    assert "finger" in safety.commands.gripper_fault
    assert any(event["event"] == "gripper" for event in rig.events)


def test_joint_states_of_a_gripper_on_a_topic_of_its_own_are_merged(tmp_path: Path) -> None:
    gripper = GRIPPER | {"adapter": "forward_position", "topic": TOPIC, "joint_states": "/gripper/joint_states"}
    rig = AdapterRig(tmp_path, tiny_profile(tmp_path, gripper=gripper), SEPARATE)
    rig.run(0.3)
    assert rig.safety is not None
    assert rig.safety._joints.missing() == ()
    rig.send("arm")
    assert rig.state is State.ARMED


def test_hysteresis() -> None:
    wise = Hysteresis(step=0.01, period=0.1, again=1.0)
    assert wise.due(0.5, False, 0.0)  # the first
    assert not wise.due(0.505, False, 0.2)  # too little
    assert wise.due(0.505, True, 0.3)  # ... but this is where it stays
    assert not wise.due(0.9, False, 0.35)  # too soon
    assert wise.due(0.9, False, 0.45)
    assert not wise.due(0.9, True, 1.4)
    assert wise.due(0.9, True, 1.5)  # once more


def test_a_goal_carries_position_effort_and_its_identifier() -> None:
    request = m.decode(
        gripper_goal(0.04, 20.0, bytes(range(16))), "control_msgs/action/GripperCommand_SendGoal_Request"
    )
    assert (request.goal.command.position, request.goal.command.max_effort) == (0.04, 20.0)
    assert bytes(request.goal_id.uuid) == bytes(range(16))
