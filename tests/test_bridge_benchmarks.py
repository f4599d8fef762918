"""What the benchmark under random faults counts as a violation, on made-up records of the arm."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
import bridge_faults_verdict as verdict  # pyright: ignore[reportMissingImports]
from bridge_faults_operator import life  # pyright: ignore[reportMissingImports]
from bridge_faults_verdict import CONTROL, Trial  # pyright: ignore[reportMissingImports]
from bridge_parts import MIDDLE, REACH, swinging_profile  # pyright: ignore[reportMissingImports]

from embodied.robot_bridge.profile import Profile, load_profile
from embodied.robot_bridge.robot_log import RobotRecord

SECONDS, SPEED = 20.0, 0.5  # [s], [rad/s]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return load_profile(swinging_profile(tmp_path_factory.mktemp("faults") / "tiny.yaml", "jtc", {}))


def swinging(**changes: Any) -> RobotRecord:
    """The shoulder swings within its limits, a command every 10 ms; `changes` replace arrays."""
    time = CONTROL * np.arange(1, round(SECONDS / CONTROL))
    phase = SPEED / 0.5 * time
    position = np.stack([MIDDLE[0] + 0.5 * np.sin(phase), np.full(len(time), MIDDLE[1]), np.zeros(len(time))], axis=1)
    velocity = np.stack([SPEED * np.cos(phase), np.zeros(len(time)), np.zeros(len(time))], axis=1)
    arrays = {
        "time": time,
        "wall": time.copy(),
        "late": np.full(len(time), 0.004),
        "stamp_ns": np.round(time * 1e9).astype(np.int64),
        "position": position,
        "velocity": velocity,
        "command": position.copy(),
        "ctrl": np.zeros((len(time), 4)),
        "accepted": np.floor(time / 0.01).astype(np.uint32),
        "contacts": np.zeros(len(time), np.uint16),
        "fault": np.full(len(time), "none"),
    }
    return RobotRecord(("shoulder", "elbow", "finger"), **arrays | changes)


def violations(record: RobotRecord, profile: Profile, trials: list[Trial] | None = None) -> list[str]:
    return verdict.judge_motion(record, trials or [], profile, [])[1]


def test_a_swing_within_limits_passes(profile: Profile) -> None:
    figures, found = verdict.judge_motion(swinging(), [], profile, [])
    assert found == []
    assert figures["measured_speed_over_limit"]["max"] == pytest.approx(SPEED / 0.7, abs=1e-3)
    assert figures["control_steps_after_late_commands_otherwise"] == 0
    assert figures["control_steps_after_a_process_was_not_scheduled"] == 0
    assert figures["measured_position_beyond_limit_max_rad"] == pytest.approx(0.5 - REACH, abs=1e-3)


def test_a_position_beyond_its_limit_is_never_excused(profile: Profile) -> None:
    record = swinging()
    record.position[2500, 0] = MIDDLE[0] + REACH + 0.03
    trial = Trial("contact", 9.0, None, 11.0, own=True)
    assert violations(record, profile, [trial]) == ["measured position: 0.0300 rad beyond its limit"]


def test_a_speed_beyond_its_limit_counts_unless_the_robot_made_it(profile: Profile) -> None:
    record = swinging()
    record.velocity[2500, 1] = 0.9  # at 10 s
    assert violations(record, profile) == ["measured_speed: 1 control steps beyond 1.15 times the limit + 0.02"]
    assert violations(record, profile, [Trial("contact", 9.0, None, 9.8, own=True)]) == []
    assert violations(record, profile, [Trial("estop", 9.0, 1.0, 9.8)]) != []
    assert violations(record, profile, [Trial("contact", 9.0, None, 9.4, own=True)]) != []


def test_a_speed_after_a_late_command_is_shown_but_counts(profile: Profile) -> None:
    record = swinging()
    record.velocity[2510, 1] = 0.9
    record.accepted[2495:2505] = record.accepted[2494]  # 40 ms of silence until 10.02 s
    figures, found = verdict.judge_motion(record, [], profile, [])
    assert found == ["measured_speed: 1 control steps beyond 1.15 times the limit + 0.02"]
    assert figures["measured_speed_over_limit"]["max_after_late_commands"] == pytest.approx(0.9 / 0.7, abs=1e-3)


@pytest.mark.parametrize("who", ["robot", "safety"])
def test_a_speed_after_a_process_was_not_scheduled_is_counted_apart_and_bounded(profile: Profile, who: str) -> None:
    record = swinging()
    record.velocity[2510, 1] = 0.9
    spans = [(9.9, 10.0)] if who == "safety" else []
    if who == "robot":
        record.late[2490:2500] = np.linspace(0.06, 0.02, 10)  # due at 9.964 s, made at 10.024 s
        assert verdict.robot_unscheduled(record) == [(pytest.approx(9.964), pytest.approx(10.024))]
    figures, found = verdict.judge_motion(record, [], profile, spans)
    assert found == []
    about = figures["measured_speed_over_limit"]
    assert about["steps_beyond_after_a_process_was_not_scheduled"] == 1
    assert about["max_after_a_process_was_not_scheduled"] == pytest.approx(0.9 / 0.7, abs=1e-3)
    record.velocity[2510, 1] = 1.5
    assert verdict.judge_motion(record, [], profile, spans)[1] == [
        "measured_speed: 2.14 times the limit after a process was not scheduled"
    ]
    record.velocity[2510, 1] = 0.0
    record.velocity[2600, 1] = 0.9  # 0.36 s later
    assert len(verdict.judge_motion(record, [], profile, spans)[1]) == 1


def test_a_command_that_steps_is_a_violation(profile: Profile) -> None:
    record = swinging()
    record.command[2500:, 1] += 0.15  # in one control step
    found = violations(record, profile)
    assert len(found) == 2
    assert found[0].startswith("commanded_speed_over_0.1_s")
    assert found[1].startswith("commanded_acceleration_over_0.1_s")


@pytest.mark.parametrize(("still_from", "rest_in"), [(10.3, 0.3), (10.6, 0.6), (12.0, np.inf)])
def test_a_stop_is_timed_from_the_fault(still_from: float, rest_in: float) -> None:
    record = swinging()
    moving = np.where(record.wall < still_from, 0.3, 0.0)
    record.velocity[:, 0] = moving
    trial = Trial("estop", 10.0, 0.35, 12.0)
    late = verdict.judge_stops(record, [trial], 2, 0.15, [])
    assert trial.rest_in == pytest.approx(rest_in, abs=2 * CONTROL)
    assert bool(late) == (rest_in > 0.5)


def test_time_without_scheduling_extends_the_time_for_a_stop_second_for_second() -> None:
    record = swinging()
    record.velocity[:, 0] = np.where(record.wall < 10.6, 0.3, 0.0)
    for lost, late in ((0.2, False), (0.05, True)):
        trial = Trial("estop", 10.0, 0.35, 12.0)
        spans = [(10.1, 10.1 + lost), (10.1, 10.1 + lost / 2), (11.0, 11.5)]
        assert bool(verdict.judge_stops(record, [trial], 2, 0.1, spans)) == late
        assert trial.lost == pytest.approx(lost)
    stopped = Trial("safety_stopped", 10.0, 0.35, 12.0)  # that is the fault
    assert verdict.judge_stops(record, [stopped], 2, 0.1, [(10.0, 11.9)])


def test_an_arm_that_stands_still_though_running_is_found() -> None:
    record = swinging()
    trials = [Trial("estop", 2.0, 0.3, 4.0, recovered_in=0.1, recovered_at=5.0), Trial("nan", 8.0, None)]
    assert verdict.stood_still(record, trials, 2, []) == ([], [])
    record.velocity[:] = 0
    still = "estop: RUNNING again, but the arm stood still; processes not scheduled for"
    assert verdict.stood_still(record, trials, 2, [(5.0, 5.3)]) == ([f"{still} 10% of the time"], [])
    assert verdict.stood_still(record, trials, 2, [(5.0, 6.5)]) == ([], [f"{still} 50% of the time"])


def test_growth_is_that_after_the_warm_up() -> None:
    def samples(rss: np.ndarray) -> list[tuple[float, int, int, int]]:
        return [(float(t), int(kib), 7, 9) for t, kib in enumerate(rss)]

    warming = np.concatenate([np.linspace(1e4, 1e5, 50), np.full(450, 1e5)])
    assert life(samples(warming), 60.0)["rss_ratio"] == 1.0
    leaking = np.linspace(1e5, 1.1e5, 500)
    figures = life(samples(leaking), 60.0)
    assert figures["rss_ratio"] > 1.07
    assert figures["rss_kib_per_hour"] == pytest.approx(1e4 / 499 * 3600, rel=1e-2)
    assert not life(samples(leaking[:100]), 60.0)["judged"]
