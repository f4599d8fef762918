"""Processes that the host does not schedule, and messages that take their time: what the arm was asked for and did.

The bounds are in the test's own terms: `LateRig`'s limits, deadlines and the lag of its servos. See docs/deployment.md.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE
from lateness_rig import (
    BRAKING,
    LIMIT,
    PERIOD,
    SERVO,
    VELOCITY,
    LateRig,
    asked_acceleration,
    asked_speed,
    measured_speed,
)

FORWARD = {"adapter": "forward_position", "topics": {**PROFILE["topics"], "command": "/forward/commands"}}  # type: ignore[dict-item]


@pytest.mark.parametrize("fault", ["freeze_state", "nan", "drop"])
@pytest.mark.parametrize("adapter", ["jtc", "forward_position"])
def test_an_arm_whose_joints_are_not_heard_is_at_rest_in_time(tmp_path: Path, fault: str, adapter: str) -> None:
    rig = LateRig(tmp_path, **(FORWARD if adapter != "jtc" else {}))
    rig.moving()
    since = rig.now
    rig.inject(fault)
    rig.run(1.5)
    assert rig.state == "STOPPED"
    assert rig.still_after(since) < rig.profile.safety.joint_timeout + BRAKING + SERVO


@pytest.mark.parametrize("seconds", [0.03, 0.07, 0.1, 0.12, 0.2])
@pytest.mark.parametrize("adapter", ["jtc", "forward_position"])
def test_joint_states_that_come_late_do_not_pull_the_command_back(tmp_path: Path, seconds: float, adapter: str) -> None:
    """They show an arm that follows where it was, as if it had hung."""
    rig = LateRig(tmp_path, **(FORWARD if adapter != "jtc" else {}))
    rig.moving()
    rig.run(0.5)
    rig.inject("delay", of="joint_states", seconds=seconds)
    rig.run(0.4)
    rig.inject("none")
    rig.run(0.5)
    assert rig.state in ("RUNNING", "HOLD")
    record = rig.record()
    assert asked_speed(record).max() < (1.15 if adapter == "jtc" else 1.3)  # steps of a tick in control steps of 4 ms
    assert measured_speed(record).max() < 1.15
    assert asked_acceleration(record).max() < 1.2


@pytest.mark.parametrize("by", [0.15, 0.5, -0.15, -0.5])
def test_an_encoder_that_jumps_does_not_send_the_arm_past_its_limit(tmp_path: Path, by: float) -> None:
    """It looks like an arm that is far behind: a trajectory that is given long to its first point may overshoot."""
    rig = LateRig(tmp_path, joint=LIMIT | {"position": [-1.9, 0.8]}, safety={"tracking_error": 0.08})
    rig.moving()
    rig.run(0.2)
    rig.inject("joint_jump", joint="shoulder", by=by)
    since = rig.now
    rig.run(2.0)
    assert rig.still_after(since) < rig.profile.safety.tracking_time + 0.3 + BRAKING + SERVO
    record = rig.record()
    assert record.command[:, 0].max() < 0.8 + 1e-3
    assert asked_speed(record).max() < 1.15


@pytest.mark.parametrize("seconds", [0.03, 0.06, 0.09, 0.15, 0.3])
def test_a_robot_that_was_not_scheduled_does_not_hurry_afterwards(tmp_path: Path, seconds: float) -> None:
    rig = LateRig(tmp_path)
    rig.moving()
    rig.stand_still("robot", seconds)
    rig.run(seconds + 1.0)
    record = rig.record()
    assert asked_speed(record).max() < 1.15
    assert measured_speed(record).max() < 1.15
    assert asked_acceleration(record).max() < 1.1


@pytest.mark.parametrize("seconds", [0.03, 0.06, 0.09, 0.15, 0.3])
def test_a_safety_process_that_was_not_scheduled_does_not_make_the_arm_hurry(tmp_path: Path, seconds: float) -> None:
    rig = LateRig(tmp_path)
    rig.moving()
    rig.stand_still("safety", seconds)
    rig.run(seconds + 0.5)
    record = rig.record()
    assert asked_speed(record).max() < 1.15
    assert asked_acceleration(record).max() < 1.1


@pytest.mark.parametrize(("seconds", "most"), [(0.02, 1.3), (0.05, 1.2), (0.1, 1.5)])
def test_commands_that_are_late_no_more_are_not_made_up_for_in_a_hurry(
    tmp_path: Path, seconds: float, most: float
) -> None:
    """Starting on arrival, the next trajectory would ask for (SOONEST + lateness) / SOONEST of the speed: 3 at 0.1 s.

    Stamped ones make up for what the arm braked since the commands were due: up to 0.05 s nothing.
    """
    rig = LateRig(tmp_path)
    rig.moving()
    rig.late_commands(seconds)
    rig.run(0.5)
    rig.late_commands(0.0)
    rig.run(0.5)
    record = rig.record()
    assert asked_speed(record).max() < most
    assert measured_speed(record).max() < 1.2


def test_commands_that_take_now_more_now_less_ask_for_little_more_than_the_limit(tmp_path: Path) -> None:
    rig = LateRig(tmp_path)
    rig.moving()
    rig.late_commands(0.0, jitter=0.05)
    rig.run(1.0)
    record = rig.record()
    assert asked_speed(record).max() < 1.35
    assert measured_speed(record).max() < 1.25
    assert asked_acceleration(record).max() < 1.1


@pytest.mark.parametrize("velocity", [0.7, 1.2])
def test_a_robot_of_positions_that_hangs_is_told_no_more_than_a_short_stop_ahead(
    tmp_path: Path, velocity: float
) -> None:
    """It takes up its newest command at once when it wakes: that step is what the arm would have gone blindly."""
    limit = PROFILE["limits"]["shoulder"] | {"velocity": velocity, "acceleration": 12.0}  # type: ignore[index]
    rig = LateRig(tmp_path, joint=limit, **FORWARD)
    assert rig.policy is not None
    rig.policy.speed = 0.98 * velocity
    rig.moving()
    assert rig.safety is not None
    measured = rig.arm.joint_state()[0]
    lag = rig.safety.filter.motion.position[0] - measured[0]  # type: ignore[union-attr]
    rig.stand_still("robot", 0.4)
    ahead = []
    for _ in range(80):
        rig.run(PERIOD)
        ahead.append(rig.safety.filter.motion.position[0] - measured[0])  # type: ignore[union-attr]
    quiet = rig.profile.safety.joint_timeout / 2 + 3 * PERIOD  # until it is noticed, and two ticks are committed
    blind = velocity * quiet + velocity**2 / (2 * 12.0) + velocity * 12.0 / (2 * limit["jerk"])
    assert max(ahead) < lag + blind
    assert max(ahead) < limit["max_step"]
    assert max(ahead) == pytest.approx(ahead[-1], abs=1e-6)  # it stands, and goes no further


def test_missed_ticks_are_no_step_for_a_robot_of_positions(tmp_path: Path) -> None:
    rig = LateRig(tmp_path, **FORWARD)
    rig.moving()
    before = asked_of(rig)
    for _ in range(10):
        rig.stand_still("safety", 0.02)
        rig.run(0.1)
        assert rig.state == "RUNNING"
    record = rig.record()
    assert before > 0.9
    assert asked_speed(record).max() < 1.3  # a tick of 5 ms falls into a control step of 4


def asked_of(rig: LateRig) -> float:
    """Speed of the newest command over the limit."""
    assert rig.safety is not None
    assert rig.safety.filter.motion is not None
    return float(np.abs(rig.safety.filter.motion.velocity[:2]).max()) / VELOCITY
