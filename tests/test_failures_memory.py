"""The failure table under virtual time: what the simulated arm did, in milliseconds. See tests/failure_rig.py."""

import ast
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import PROFILE, write_profile
from failure_rig import MOVING, ROWS, STILL, Rig

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.messages import Trajectory
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import DEFAULT, QosProfile
from embodied.robot_bridge.safety_node import CLOCK_SILENCE
from embodied.robot_bridge.transport import choose
from embodied.robot_bridge.transport_memory import Fault

BRAKE = 0.15  # from full speed to rest with the tiny arm's limits and the servo's lag [s]


def test_every_row_of_the_table_has_a_test() -> None:
    here = Path(__file__).parent
    for row, (where, _) in ROWS.items():
        for medium in where.split(", "):
            tree = ast.parse((here / f"test_failures_{medium}.py").read_text())
            names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            assert any(name.startswith(f"test_{row}") for name in names), f"no test of '{row}' on {medium}"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path).moving()


def test_an_undisturbed_run_reaches_its_speed_within_the_limits(rig: Rig) -> None:
    rig.run(1.0)
    assert rig.state == "RUNNING"
    assert rig.speed == pytest.approx(0.5, abs=0.1)
    rig.assert_within_limits()


# ---- what the robot sends


def test_joint_states_stale(rig: Rig) -> None:
    safety, since = rig.profile.safety, rig.now
    rig.inject("freeze_state")
    rig.run(2.0)
    assert rig.entered("HOLD", since) == pytest.approx(safety.joint_timeout, abs=0.03)
    assert rig.entered("STOPPED", since) == pytest.approx(safety.joint_stop, abs=0.03)
    assert rig.still_after(since) < safety.joint_timeout + BRAKE
    rig.inject("none")  # the states come back: latched all the same
    rig.run(1.0)
    assert rig.state == "STOPPED"
    assert rig.speed < STILL
    rig.assert_within_limits()


def test_joint_states_stale_for_a_moment_resumes_by_itself(rig: Rig) -> None:
    since = rig.now
    rig.inject("freeze_state")
    rig.run(0.25)
    assert rig.state == "HOLD"
    rig.inject("none")
    rig.policy.go_on(rig.rows[-1][3])  # type: ignore[union-attr]
    rig.run(0.5)
    assert [name for t, name, _ in rig.states if t > since] == ["HOLD", "RUNNING"]
    rig.assert_within_limits()


@pytest.mark.parametrize("speed", [0.4, 1.6])
@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_joint_states_stale_because_the_robot_hangs(tmp_path: Path, speed: float, seconds: float) -> None:
    """It stands still and hears nothing; what waits for it when it wakes was planned for an arm that had gone on."""
    rig = Rig(tmp_path)
    rig.policy.speed = speed  # type: ignore[union-attr]
    rig.moving()
    since = rig.now
    ahead = rig.hang(seconds)[0]
    assert rig.state == ("HOLD" if seconds < 0.5 else "STOPPED")
    rig.policy.change = lambda chunk: None  # type: ignore[union-attr]
    rig.run(1.0)
    assert rig.counts["reseeded"] == "1"
    # It brakes from where it is: the way to a stop at 12 rad/s², and what the servos were behind.
    assert rig.distance_after(since) < min(speed**2 / 24 + 0.03 * speed, 0.6 * ahead)
    assert rig.speed < STILL
    rig.assert_within_limits()


def test_joint_states_stale_because_a_robot_that_takes_positions_hangs(tmp_path: Path) -> None:
    """Its controller steps to the newest command; it is called back as soon as it says where it is."""
    topics = {**PROFILE["topics"], "command": "/forward/commands"}
    rig = Rig(tmp_path, adapter="forward_position", topics=topics).moving()
    since = rig.now
    ahead = rig.hang(1.0)[0]
    rig.run(1.0)
    assert rig.counts["reseeded"] == "1"
    assert rig.distance_after(since) < 0.8 * ahead
    assert rig.speed < STILL


def test_joint_states_of_nan_count_as_stale(rig: Rig) -> None:
    since = rig.now
    rig.inject("nan")
    rig.run(1.0)
    assert rig.entered("HOLD", since) < rig.profile.safety.joint_timeout + 0.03
    assert rig.state == "STOPPED"
    assert rig.still_after(since) < rig.profile.safety.joint_timeout + BRAKE


def test_image_stale(tmp_path: Path) -> None:
    rig = Rig(tmp_path, camera_policy=True).moving()
    policy, safety, since = rig.profile.policy, rig.profile.safety, rig.now
    rig.inject("freeze_cameras")
    rig.run(2.5)
    silent = policy.image_timeout + safety.chunk_horizon + safety.chunk_timeout
    assert rig.entered("HOLD", since) < silent + 0.1
    assert rig.still_after(since) < silent + BRAKE
    assert rig.state == "HOLD"
    assert rig.reason == "no chunk from the policy"
    rig.inject("none")  # pictures again, long after hold_resume: it waits for an operator
    rig.run(1.0)
    assert rig.state == "HOLD"
    assert rig.speed < STILL
    rig.request("run")
    rig.run(0.6)
    assert rig.speed > MOVING
    rig.assert_within_limits()


# ---- chunks


def test_policy_silent_stops_the_arm_until_an_operator_says_run(rig: Rig) -> None:
    policy, since, safety = rig.policy, rig.now, rig.profile.safety
    rig.policy = None
    rig.run(2.0)
    assert rig.entered("HOLD", since) <= 0.1 + safety.chunk_horizon + safety.chunk_timeout + 0.03
    assert rig.still_after(since) < 0.1 + safety.chunk_horizon + BRAKE
    rig.policy = policy
    policy.start(rig.rows[-1][3])  # type: ignore[union-attr]
    rig.run(1.0)
    assert rig.state == "HOLD"
    assert rig.speed < STILL
    policy.start(rig.rows[-1][3])  # type: ignore[union-attr]
    rig.request("run")
    rig.run(0.5)
    assert rig.speed > MOVING
    rig.assert_within_limits()


def _not_a_number(chunk: Trajectory) -> Trajectory:
    positions = chunk.positions.copy()
    positions[1, 0] = np.nan
    return dataclasses.replace(chunk, positions=positions)


MALFORMED: dict[str, Callable[[Trajectory], Trajectory]] = {
    "nan": _not_a_number,
    "infinite": lambda c: dataclasses.replace(c, positions=c.positions * np.inf),
    "wrong_length": lambda c: dataclasses.replace(c, names=c.names[:2], positions=c.positions[:, :2]),
    "wrong_names": lambda c: dataclasses.replace(c, names=("shoulder", "elbow", "thumb")),
    "no_points": lambda c: dataclasses.replace(c, times=c.times[:0], positions=c.positions[:0]),
    "times_that_fall": lambda c: dataclasses.replace(c, times=c.times[::-1].copy()),
}


@pytest.mark.parametrize("how", MALFORMED)
def test_malformed_chunk(rig: Rig, how: str) -> None:
    assert rig.policy is not None
    rejected, since = int(rig.counts["rejected"]), rig.now
    rig.policy.change = MALFORMED[how]
    rig.run(1.5)
    assert int(rig.counts["rejected"]) > rejected
    assert rig.state == "HOLD"
    assert any("rejected" in event for event in rig.events)
    assert rig.entered("HOLD", since) < 0.15
    assert rig.still_after(since) < 0.1 + BRAKE
    rig.assert_within_limits()


def test_nan_in_unused_fields(rig: Rig) -> None:
    """joint_state_broadcaster fills what a joint lacks with NaN: that is no fault."""
    assert rig.safety is not None
    states = rig.transport("another_driver").publisher("/joint_states", m.JOINT_STATE, DEFAULT)
    message = m.decode(m.joint_state(0, rig.limits.names, np.zeros(3), np.zeros(3)), m.JOINT_STATE)
    rig.inject("freeze_state")  # from now on the states below are the only ones
    for _ in range(50):
        position, _ = rig.arm.joint_state()
        message.header = m.header(rig.clock.stamp())
        message.position, message.velocity, message.effort = position, np.full(3, np.nan), np.full(3, np.nan)
        states.write(m.encode(message))
        rig.run(0.01)
    assert rig.state == "RUNNING"
    assert rig.speed > MOVING


def test_jump_between_chunks(rig: Rig) -> None:
    assert rig.policy is not None
    back_and_forth = iter([1.0, -1.0] * 100)

    def jump(chunk: Trajectory) -> Trajectory:
        return dataclasses.replace(chunk, positions=chunk.positions + next(back_and_forth))

    rig.policy.change = jump
    rig.run(0.6)
    assert int(rig.counts["clamped"]) > 0
    rig.run(3.0)
    assert rig.state == "HOLD"
    assert "clamped" in rig.reason
    assert rig.speed < STILL
    rig.assert_within_limits()


def test_late_chunk(rig: Rig) -> None:
    assert rig.policy is not None
    rejected, since = int(rig.counts["rejected"]), rig.now
    old = round((rig.profile.safety.chunk_max_age + 0.1) * 1e9)
    rig.policy.change = lambda chunk: dataclasses.replace(chunk, stamp_ns=chunk.stamp_ns - old)
    rig.run(1.5)
    assert int(rig.counts["rejected"]) > rejected
    assert rig.state == "HOLD"
    assert rig.still_after(since) < 0.1 + rig.profile.safety.chunk_horizon + BRAKE
    rig.assert_within_limits()


def test_duplicate_or_reordered_chunk(rig: Rig) -> None:
    assert rig.policy is not None
    before, sent = int(rig.counts["chunks"]), rig.policy.sequence
    old: list[Trajectory] = []
    policy = rig.policy

    def repeat(chunk: Trajectory) -> Trajectory:
        old.append(chunk)
        policy.send(chunk)
        policy.send(old[0])  # the first of them, ever again
        return chunk

    rig.policy.change = repeat
    rig.run(1.0)
    assert rig.state == "RUNNING"
    assert rig.speed == pytest.approx(0.5, abs=0.1)  # as if each had come once
    assert int(rig.counts["chunks"]) - before == rig.policy.sequence - sent
    rig.assert_within_limits()


# ---- clocks


def test_clock_skew(rig: Rig) -> None:
    assert rig.policy is not None
    since = rig.now
    ahead = round((rig.profile.safety.clock_skew_max + 0.2) * 1e9)
    rig.policy.change = lambda chunk: dataclasses.replace(chunk, stamp_ns=chunk.stamp_ns + ahead)
    rig.run(1.5)
    assert any("future" in event for event in rig.events)
    assert rig.state == "HOLD"
    assert rig.still_after(since) < 0.1 + rig.profile.safety.chunk_horizon + BRAKE
    rig.assert_within_limits()


def test_clock_jumps_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path, sim_time=True).moving()
    since = rig.now
    rig.inject("clock_jump", seconds=-3.0)
    rig.run(1.5)
    assert any("clock_jumped" in event for event in rig.events)
    assert rig.entered("HOLD", since) < 0.1
    assert rig.still_after(since) < 0.1 + rig.profile.safety.chunk_horizon + BRAKE
    assert rig.state in ("HOLD", "STOPPED")  # the policy's chunks go on, and do not end it
    assert rig.speed < STILL
    rig.assert_within_limits()


def test_clock_stops(tmp_path: Path) -> None:
    rig = Rig(tmp_path, sim_time=True).moving()
    since = rig.now
    rig.inject("clock_stop")
    rig.run(3.0)
    assert rig.entered("HOLD", since) < CLOCK_SILENCE + 0.1
    assert rig.reason == "/clock stands still"
    # With time at a standstill no trajectory is sent; the last one ends at rest.
    assert rig.still_after(since) < CLOCK_SILENCE + BRAKE
    assert rig.speed < STILL
    rig.assert_within_limits()


# ---- the graph


def _rig_before_arming(folder: Path, listen: QosProfile | None) -> Rig:
    """The robot's controller is replaced by a subscription with another profile, or by nobody."""
    rig = Rig(folder)
    topic = rig.profile.topics.command
    robot = rig.bus.subscribers(topic)[0]  # made first
    next(t for t in rig.bus.transports if robot in t.subscribers).subscribers.remove(robot)
    if listen is not None:
        rig.transport("controller").subscriber(topic, m.JOINT_TRAJECTORY, listen, lambda data, at: None)
    rig.run(0.2)
    return rig


def test_qos_mismatch(tmp_path: Path) -> None:
    rig = _rig_before_arming(tmp_path, QosProfile(depth=10, reliable=True, latched=True))
    rig.request("arm")
    assert rig.state == "INACTIVE"
    (refusal,) = [event for event in rig.events if "arm refused" in event]
    assert "volatile" in refusal
    assert "transient local" in refusal
    assert rig.profile.topics.command in refusal
    rig.run(0.5)
    assert rig.still_after(0.0) == 0.0


def test_missing_subscriber(tmp_path: Path) -> None:
    rig = _rig_before_arming(tmp_path, None)
    rig.request("arm")
    assert rig.state == "INACTIVE"
    assert any(f"nobody subscribes to {rig.profile.topics.command}" in event for event in rig.events)


def test_two_command_publishers_refuse_to_arm(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.run(0.2)
    rig.transport("teleop").publisher(rig.profile.topics.command, m.JOINT_TRAJECTORY, DEFAULT)
    rig.request("arm")
    assert rig.state == "INACTIVE"
    assert any("other publisher" in event for event in rig.events)


def test_two_command_publishers_stop_a_running_arm(rig: Rig) -> None:
    since = rig.now
    rig.transport("teleop").publisher(rig.profile.topics.command, m.JOINT_TRAJECTORY, DEFAULT)
    rig.run(2.0)
    assert rig.entered("STOPPED", since) <= 1.05  # looked for once a second
    assert rig.reason == f"1 other publisher on {rig.profile.topics.command}"
    assert rig.still_after(since) < 1.05 + BRAKE
    rig.assert_within_limits()


# ---- people


def test_deadman_released(tmp_path: Path) -> None:
    rig = Rig(tmp_path, safety={"deadman_required": True})
    rig.deadman = True
    rig.moving()
    since = rig.now
    rig.deadman = False
    rig.run(1.0)
    assert rig.entered("HOLD", since) < 0.1  # said, not waited for
    assert rig.still_after(since) < 0.1 + BRAKE
    rig.assert_within_limits()


def test_deadman_silent(tmp_path: Path) -> None:
    rig = Rig(tmp_path, safety={"deadman_required": True})
    rig.deadman = True
    rig.moving()
    since = rig.now
    rig.deadman = None
    rig.run(2.0)
    timeout = rig.profile.safety.deadman_timeout
    assert rig.entered("HOLD", since) <= timeout + 0.03
    assert rig.still_after(since) < timeout + BRAKE
    rig.deadman = True  # held again, long after: an operator must say `run`
    rig.run(1.0)
    assert rig.state == "HOLD"
    assert rig.speed < STILL
    rig.assert_within_limits()


def test_deadman_not_held_refuses_to_arm(tmp_path: Path) -> None:
    rig = Rig(tmp_path, safety={"deadman_required": True})
    rig.run(0.3)
    rig.request("arm")
    assert rig.state == "INACTIVE"


def test_estop_pressed(rig: Rig) -> None:
    since = rig.now
    rig.press_estop(True)
    rig.run(1.0)
    assert rig.entered("ESTOP", since) <= 0.02
    assert rig.still_after(since) < BRAKE
    accepted = rig.robot.counts["accepted"]
    rig.run(0.5)
    assert rig.robot.counts["accepted"] == accepted  # silent after the braking
    for mode in ("run", "arm", "reset"):  # none of them gets past a pressed e-stop
        rig.request(mode)
        assert rig.state == "ESTOP"
    rig.press_estop(False)
    rig.request("run")  # an old `run` does not resume either
    rig.run(0.5)
    assert rig.state == "ESTOP"
    assert rig.speed < STILL
    rig.request("reset")
    assert rig.state == "INACTIVE"
    rig.assert_within_limits()


def test_estop_heartbeat_lost(tmp_path: Path) -> None:
    rig = Rig(tmp_path, safety={"deadman_required": False, "estop_required": True})
    rig.estop_heartbeat = True
    rig.moving()
    since = rig.now
    rig.estop_heartbeat = False
    rig.run(1.5)
    timeout = rig.profile.safety.estop_timeout
    assert rig.entered("ESTOP", since) <= timeout + 0.05
    assert rig.still_after(since) < timeout + BRAKE
    rig.estop_heartbeat = True
    rig.request("run")
    rig.run(0.5)
    assert rig.state == "ESTOP"
    rig.assert_within_limits()


# ---- the arm does not do what it is told


@pytest.fixture
def watchful(tmp_path: Path) -> Rig:
    """Its tracking error trips below max_step, up to which the step clamp lets the command run ahead of the arm."""
    return Rig(tmp_path, safety={"deadman_required": False, "tracking_error": 0.2}).moving()


def test_tracking_error(watchful: Rig) -> None:
    rig = watchful
    since, safety = rig.now, rig.profile.safety
    rig.inject("reject_commands")  # the controller goes to the end of its last trajectory, and no further
    rig.run(4.0)
    assert rig.entered("HOLD", since) < safety.tracking_error / 0.5 + safety.tracking_time + 0.3
    assert rig.state == "STOPPED"
    assert rig.still_after(since) < 0.25 + BRAKE
    assert rig.distance_after(since) < 0.12
    rig.assert_within_limits()


def test_contact(watchful: Rig) -> None:
    rig = watchful
    since, safety = rig.now, rig.profile.safety
    rig.inject("contact", joint="shoulder")
    rig.run(4.0)
    assert rig.entered("HOLD", since) < safety.tracking_error / 0.5 + safety.tracking_time + 0.2
    assert rig.entered("STOPPED", since) < rig.entered("HOLD", since) + safety.stop_after_hold + 0.1
    rig.inject("none")  # the obstacle goes: the arm may not jump after it
    rig.run(1.0)
    assert rig.state == "STOPPED"
    assert rig.still_after(rig.now - 0.5) == 0.0
    rig.assert_within_limits()


# ---- before anything starts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shoulder": None}, "'shoulder' has no limits"),
        ({"shoulder": {"acceleration": None}}, "shoulder.*acceleration"),
        ({"shoulder": {"position": [1.0, -1.0]}}, "low < high"),
        ({"shoulder": {"velocity": float("nan")}}, "finite"),
    ],
)
def test_limits_file(tmp_path: Path, change: dict, message: str) -> None:
    limits = {name: dict(entry) for name, entry in PROFILE["limits"].items()}  # type: ignore[attr-defined]
    for joint, entry in change.items():
        limits[joint] = limits[joint] | (entry or {})
        limits[joint] = {key: value for key, value in limits[joint].items() if value is not None}
        if entry is None:
            del limits[joint]
    with pytest.raises(ConfigError, match=message):
        load_profile(write_profile(tmp_path / "p.yaml", limits=limits)).read_limits()


def test_limits_file_missing(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.yaml", description={"joint_limits": "no_such_file.yaml"})
    with pytest.raises(ConfigError, match="no_such_file"):
        load_profile(path).read_limits()
    assert yaml.safe_load(path.read_text())["description"] == {"joint_limits": "no_such_file.yaml"}


def test_malformed_cdr(rig: Rig) -> None:
    """Garbage on every input: dropped, counted, and as good as silence."""
    since = rig.now
    for topic in (rig.profile.topics.joint_states, "/bridge/chunk"):
        rig.bus.inject(topic, Fault(cut=1.0))
    rig.run(1.5)
    assert rig.state == "STOPPED"
    assert int(rig.counts["malformed"]) > 10
    assert rig.still_after(since) < rig.profile.safety.joint_timeout + BRAKE
    rig.assert_within_limits()


def test_rclpy_missing() -> None:
    with pytest.raises(ConfigError, match="cannot import rclpy"):
        choose("rclpy")
    assert choose("auto")[0] == "dds"
