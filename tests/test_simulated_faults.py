"""Faults do what they say: others see them, or the arm feels them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import RobotRig

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.robot_options import RobotOptions


@pytest.fixture
def rig(tmp_path: Path) -> RobotRig:
    return RobotRig(tmp_path)


# ---- faults: what the others see, and what the arm does


def test_joint_faults_change_what_is_reported_and_not_the_arm(rig: RobotRig) -> None:
    rig.run(5)
    rig.inject("joint_jump", joint="elbow", by=0.4)
    rig.run(5)
    np.testing.assert_allclose(rig.states()[-1].position, [0.1, 0.2, 0.08], atol=1e-6)
    rig.inject("nan", joint="shoulder")
    rig.run(5)
    assert np.isnan(rig.states()[-1].position).tolist() == [True, False, False]
    np.testing.assert_allclose(rig.arm.joint_state()[0], [0.1, -0.2, 0.08], atol=1e-6)
    rig.inject("none")
    rig.run(1)
    np.testing.assert_allclose(rig.states()[-1].position, [0.1, -0.2, 0.08], atol=1e-6)


def test_messages_are_lost_and_delayed(rig: RobotRig) -> None:
    rig.inject("drop", of="joint_states", probability=0.5)
    rig.run(200)
    assert 70 < len(rig.states()) < 130
    rig.inject("delay", of="joint_states", seconds=0.2, for_s=1.0)
    rig.run(5)
    before = len(rig.states())
    rig.run(40)
    late = rig.clock.stamp() - rig.states()[-1].stamp_ns
    assert late == pytest.approx(0.2e9, abs=0.02e9)
    assert len(rig.states()) - before == pytest.approx(25, abs=3)
    rig.run(100)  # it ended by itself
    assert rig.clock.stamp() - rig.states()[-1].stamp_ns < 5e6


def test_commands_are_lost_delayed_and_refused(rig: RobotRig) -> None:
    rig.inject("drop", of="command")
    rig.run(1)
    rig.move([0.4, -0.2, 0.08], 0.1)
    rig.run(40)
    np.testing.assert_allclose(rig.states()[-1].position[0], 0.1, atol=1e-3)
    rig.inject("reject_commands")
    rig.run(1)
    rig.move([0.4, -0.2, 0.08], 0.1)
    rig.run(40)
    assert rig.robot.counts == {"accepted": 0, "rejected": 1, "skipped_s": 0.0}
    rig.inject("delay", of="command", seconds=0.3)
    rig.run(1)
    rig.move([0.4, -0.2, 0.08], 0.1)
    rig.run(29)
    assert rig.robot.counts["accepted"] == 0
    rig.run(40)
    assert rig.robot.counts["accepted"] == 1
    np.testing.assert_allclose(rig.states()[-1].position[0], 0.4, atol=5e-3)


def test_black_pictures(rig: RobotRig) -> None:
    rig.inject("camera_black", camera="eye")
    rig.run(15)
    assert not m.read_image(rig.seen["/camera/eye/image_raw"][-1])[1].any()
    rig.inject("camera_black", camera="another")
    rig.run(15)
    assert m.read_image(rig.seen["/camera/eye/image_raw"][-1])[1].any()


def test_the_clock_jumps_and_stops(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, RobotOptions(use_sim_time=True))
    clocks = rig.listen("/clock", m.CLOCK)
    rig.run(50)
    rig.inject("clock_jump", seconds=-0.3)
    rig.run(10)
    assert m.read_clock(clocks[-1]) * 1e-9 == pytest.approx(1.0 + 0.6 - 0.3, abs=0.01)
    rig.inject("clock_stop")
    count, stamp = len(clocks), rig.states()[-1].stamp_ns
    rig.run(20)
    assert len(clocks) == count
    assert rig.states()[-1].stamp_ns == pytest.approx(stamp, abs=5e6)
    assert len({s.stamp_ns for s in rig.states()[-19:]}) == 1
    rig.inject("none")
    rig.run(1)
    assert m.read_clock(clocks[-1]) * 1e-9 == pytest.approx(1.81, abs=0.01)


def test_contact_holds_or_pushes_a_joint(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path)
    rig.run(5)
    rig.inject("contact", joint="shoulder")
    rig.run(1)
    rig.move([0.6, 0.3, 0.08], 0.3)
    rig.run(80)
    np.testing.assert_allclose(rig.states()[-1].position[:2], [0.1, 0.3], atol=2e-3)  # 0.5 rad behind its command
    assert rig.states()[-1].velocity[0] == 0.0
    rig.inject("none")
    rig.run(50)
    np.testing.assert_allclose(rig.states()[-1].position[:2], [0.6, 0.3], atol=5e-3)
    rig.inject("contact", joint="elbow", torque=100.0)  # against 2000 N·m/rad
    rig.run(100)
    np.testing.assert_allclose(rig.states()[-1].position[:2], [0.6, 0.35], atol=5e-3)
    rig.reset.write(m.json_string({}))
    rig.run(30)
    np.testing.assert_allclose(rig.states()[-1].position[:2], [0.1, -0.2], atol=1e-3)  # a reset lets go
    assert json.loads(m.read_string(rig.seen["/sim/status"][-1]))["fault"] == "none"


@pytest.mark.parametrize(
    "wish",
    [
        {"fault": "explode"},
        {},
        {"fault": "nan", "joint": "knee"},
        {"fault": "nan", "joints": "elbow"},
        {"fault": "drop", "of": "everything"},
        {"fault": "drop", "probability": "often"},
        {"fault": "joint_jump", "by": None},
        {"fault": "contact", "joint": "finger"},
        {"fault": "delay", "seconds": -1.0},
    ],
)
def test_a_wrong_fault_is_refused_and_changes_nothing(rig: RobotRig, wish: dict) -> None:
    rig.fault.write(m.json_string(wish))
    rig.run(2)
    assert rig.robot.counts["rejected"] == 1
    assert json.loads(m.read_string(rig.seen["/sim/status"][-1]))["fault"] == "none"
