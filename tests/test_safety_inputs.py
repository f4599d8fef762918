"""What the safety filter makes of its other inputs: operators, heartbeats, clocks, the workspace, measurements."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.machine import Cause
from embodied.robot_bridge.profile import Safety
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick

NAMES = ("a", "b")
LIMITS = Limits(
    NAMES,
    low=np.array([-1.0, -2.0]),
    high=np.array([1.0, 2.0]),
    velocity=np.array([2.0, 1.0]),
    acceleration=np.array([10.0, 5.0]),
    jerk=np.array([2000.0, 1000.0]),
    max_step=np.array([0.3, 0.3]),
)
CONFIG = Safety(deadman_required=False)
DT = 1 / CONFIG.rate_hz


class Arm:
    """A filter, a robot that follows it unless told not to, and an operator; time passes in `tick` only."""

    def __init__(self, config: Safety = CONFIG, **more: Any) -> None:
        self.filter, self.now, self.sequence = SafetyFilter(LIMITS, config, **more), 10.0, 0
        self.measured, self.follows, self.held = np.zeros(2), True, config.deadman_required
        self.heartbeat = config.estop_required
        self.ticks: list[Tick] = []

    def hear(self) -> None:
        self.filter.measure(self.measured, np.zeros(2), self.now)
        if self.held:
            self.filter.set_deadman(True, self.now)
        if self.heartbeat:
            self.filter.set_estop(False, self.now)

    def run(self) -> "Arm":
        self.hear()
        assert self.filter.request("arm", self.now) == ""
        assert self.filter.request("run", self.now) == ""
        return self

    def offer(self, target: float, **changes: Any) -> str:
        self.sequence += 1
        rows = np.array([[target, 0.0], [target, 0.0]])
        chunk = Chunk("r", self.sequence, self.now, self.now, NAMES, np.array([0.1, 0.2]), rows)
        return self.filter.offer(dataclasses.replace(chunk, **changes), self.now)

    def tick(self, count: int = 1, hear: bool = True) -> Tick:
        for _ in range(count):
            self.now += DT
            if hear:
                self.hear()
            tick = self.filter.tick(self.now)
            self.ticks.append(tick)
            if self.follows and tick.motion is not None:
                self.measured = tick.motion.position
        return self.ticks[-1]

    def moving(self) -> "Arm":
        """Joint a at about 1 rad/s."""
        for k in range(1, 5):
            assert self.offer(float(self.measured[0]) + 0.1 + 0.01 * k) == ""
            self.tick(8)
        assert self.filter.motion is not None
        assert self.filter.motion.velocity[0] > 0.5
        return self

    @property
    def state(self) -> State:
        return self.filter.state


def test_a_lost_heartbeat_of_a_required_estop_latches() -> None:
    arm = Arm(dataclasses.replace(CONFIG, estop_required=True))
    arm.heartbeat = False
    arm.hear()
    assert "heartbeat" in arm.filter.request("arm", arm.now)
    arm.heartbeat = True
    arm.run().moving()
    arm.heartbeat = False
    arm.tick(round(CONFIG.estop_timeout / DT) + 1)
    assert (arm.state, arm.filter.reason) == (State.ESTOP, "the e-stop's heartbeat is missing")
    assert "heartbeat" in arm.filter.request("reset", arm.now)
    arm.heartbeat = True
    arm.tick(60)
    assert arm.state is State.ESTOP
    assert arm.filter.request("run", arm.now)
    assert arm.filter.request("reset", arm.now) == arm.filter.request("arm", arm.now) == ""


def test_a_press_between_two_ticks_is_not_lost() -> None:
    arm = Arm().run().moving()
    arm.filter.set_estop(True, arm.now)
    arm.filter.set_estop(False, arm.now)
    arm.tick(60)
    assert arm.state is State.ESTOP
    assert arm.filter.motion is not None
    assert arm.filter.motion.at_rest
    assert arm.tick().motion is None
    last = [tick.motion for tick in arm.ticks if tick.motion is not None][-1]
    assert last.at_rest  # whoever is sent one motion after another has been told to stand still
    assert arm.filter.request("run", arm.now)
    assert "ESTOP" in arm.offer(0.1)


def test_a_deadman_let_go_during_a_hold_needs_the_operator() -> None:
    arm = Arm(dataclasses.replace(CONFIG, deadman_required=True)).run().moving()
    arm.tick(35)
    assert (arm.state, arm.filter.cause) == (State.HOLD, Cause.POLICY)
    arm.held = False
    arm.filter.set_deadman(False, arm.now)
    arm.tick()
    arm.held = True
    arm.tick()
    assert "HOLD" in arm.offer(arm.measured[0])
    assert arm.filter.request("run", arm.now) == ""


def test_a_silent_deadman_holds_within_its_timeout_and_the_brake() -> None:
    arm = Arm(dataclasses.replace(CONFIG, deadman_required=True)).run()
    arm.held = False
    silent = arm.now
    while arm.state is State.RUNNING:
        arm.offer(float(arm.measured[0]) + 0.05)
        arm.tick()
    assert arm.now - silent == pytest.approx(CONFIG.deadman_timeout, abs=1.5 * DT)
    arm.tick(20)
    assert arm.filter.motion is not None
    assert arm.filter.motion.at_rest


def test_only_the_same_policy_ends_a_hold_and_a_replaced_one_stays_out() -> None:
    arm = Arm().run().moving()
    arm.tick(35)
    assert arm.state is State.HOLD
    assert "another policy" in arm.offer(float(arm.measured[0]), run="new")
    assert arm.offer(float(arm.measured[0])) == ""
    assert arm.state is State.RUNNING
    assert arm.offer(float(arm.measured[0]), run="new") == ""
    assert "replaced" in arm.offer(float(arm.measured[0]), run="r", sequence=99)


def test_the_first_target_may_be_a_step_and_the_initial_error_away() -> None:
    reach = LIMITS.max_step[0] + CONFIG.arm_max_initial_error
    assert "too far" in Arm().run().offer(reach + 0.001)
    assert Arm().run().offer(reach - 0.001) == ""


def test_a_clock_that_jumps_back_holds_and_forgets() -> None:
    arm = Arm(dataclasses.replace(CONFIG, deadman_required=True)).run().moving()
    arm.now -= 5.0
    tick = arm.tick(hear=False)
    assert (tick.state, tick.reason) == (State.HOLD, "the clock jumped back")
    assert "HOLD" in arm.offer(float(arm.measured[0]))
    assert "deadman" in arm.filter.request("run", arm.now)
    speeds = [abs(arm.tick().motion.velocity[0]) for _ in range(30)]  # type: ignore[union-attr]
    assert speeds[-1] == 0.0
    assert max(speeds[:3]) > 0.1  # it brakes, it does not freeze
    assert arm.filter.counts["clock_jumps"] == 1
    assert arm.filter.request("run", arm.now) == ""
    # Nothing that came after the jump: stale at last.
    silent = Arm().run()
    silent.tick()
    silent.now -= 5.0
    silent.tick(60, hear=False)
    assert silent.state is State.STOPPED


class Wall:
    """The tool may not go beyond a = 0.3."""

    def outside(self, q: np.ndarray) -> str:
        return f"the tool is at {q[0]:.3f} m" if q[0] > 0.3 else ""


def test_the_arm_comes_to_rest_inside_the_workspace() -> None:
    arm = Arm(workspace=Wall()).run()
    for _ in range(40):
        arm.offer(float(arm.measured[0]) + 0.15)
        arm.tick(3)
    assert arm.state is State.HOLD
    assert (arm.filter.cause, arm.filter.counts["workspace"]) == (Cause.WORKSPACE, 1)
    assert "the tool is at" in arm.filter.reason
    assert 0.25 < arm.measured[0] <= 0.3
    assert all(t.plan.positions[:, 0].max() <= 0.3 + 1e-9 for t in arm.ticks if t.plan is not None)
    assert arm.filter.request("run", arm.now) == ""  # back is allowed
    assert arm.offer(0.1) == ""
    arm.tick(10)
    assert arm.state is State.RUNNING


def test_an_arm_outside_the_workspace_is_not_armed() -> None:
    arm = Arm(workspace=Wall())
    arm.measured = np.array([0.5, 0.0])
    arm.hear()
    assert "the tool is at 0.500" in arm.filter.request("arm", arm.now)


def test_a_blocked_arm_is_relieved_then_stopped() -> None:
    arm = Arm(dataclasses.replace(CONFIG, tracking_error=0.1)).run()
    arm.follows = False
    while arm.state is State.RUNNING:
        arm.offer(0.2)
        arm.tick(2)
    held_at = arm.now
    assert (arm.state, arm.filter.cause) == (State.HOLD, Cause.TRACKING)
    assert "a does not follow" in arm.filter.reason
    arm.tick(50)
    assert arm.filter.motion is not None
    assert abs(arm.filter.motion.position[0]) < 1e-6  # the command is back at the arm: it does not push
    assert arm.filter.motion.at_rest
    while arm.state is State.HOLD:
        arm.tick()
    assert arm.state is State.STOPPED
    assert arm.now - held_at == pytest.approx(CONFIG.stop_after_hold, abs=3 * DT)


def test_a_jump_of_the_measurement_does_not_pull_the_arm_along() -> None:
    arm = Arm().run()
    arm.follows = False
    arm.measured = np.array([0.9, 0.0])  # an encoder slips
    for _ in range(60):
        arm.offer(-0.05)
        arm.tick()
    path = [t.motion.position[0] for t in arm.ticks if t.motion is not None]
    assert max(path) <= 1e-9
    assert arm.filter.cause is Cause.TRACKING
    assert abs(path[-1]) < 0.06  # nor does the hold go there: it is further away than a contact explains


@pytest.mark.parametrize("streaming", [False, True])
def test_an_arm_that_comes_back_elsewhere_is_sent_nothing_before_it_is_armed_again(streaming: bool) -> None:
    """A driver that was restarted: to hold where the other one was would be a jump."""
    arm = Arm(streaming=streaming).run().moving()
    arm.follows = False
    arm.tick(round(CONFIG.joint_timeout / DT) + 3, hear=False)
    arm.measured = arm.measured - 1.0
    tick = arm.tick()
    assert arm.state is State.STOPPED
    assert arm.filter.reason == "the arm is not where it was left"
    assert tick.plan is None
    assert tick.motion is None
    arm.measured = arm.measured * 0
    arm.follows = True
    arm.hear()
    assert arm.filter.request("reset", arm.now) == arm.filter.request("arm", arm.now) == ""
    tick = arm.tick()
    assert tick.motion is not None
    np.testing.assert_allclose(tick.motion.position, 0.0, atol=1e-9)


def test_shadow_starts_at_the_measured_joints_with_every_chunk() -> None:
    arm = Arm(dataclasses.replace(CONFIG, tracking_error=0.05), shadow=True).run()
    arm.follows = False
    for k in range(30):
        arm.measured = np.array([0.02 * k, 0.0])  # somebody else moves the arm
        arm.hear()
        assert arm.offer(0.02 * k + 0.05) == ""
        assert arm.filter.tick(arm.now + DT).plan is not None
        arm.tick(4)
        assert arm.filter.motion is not None
        assert arm.filter.motion.position[0] == pytest.approx(0.02 * k, abs=0.03)
    assert arm.state is State.RUNNING
    assert arm.filter.counts["violations"] == 0


def test_a_pause_of_the_caller_is_taken_up_where_the_robot_is() -> None:
    for streaming in (False, True):
        arm = Arm(streaming=streaming).run().moving()
        before = arm.filter.motion
        last = next(t.plan for t in reversed(arm.ticks) if t.plan is not None)
        arm.now += 0.3
        tick = arm.tick(hear=False)
        assert tick.motion is not None
        assert before is not None
        assert tick.motion.at_rest
        # A controller with a plan has finished it; one that is told each position has waited at the last.
        expected = before.position if streaming else last.positions[-1]
        np.testing.assert_allclose(tick.motion.position, expected, atol=1e-9)
        assert arm.filter.counts["missed_ticks"] == 30


def test_ticks_that_come_a_little_late_keep_to_the_grid() -> None:
    arm = Arm().run()
    due, plans = arm.now, []
    for k in range(200):
        due += DT
        arm.now = due + (0.004 if k % 3 == 1 else 0.0) - DT
        if k % 5 == 0:
            arm.offer(0.1 * np.sin(k / 30))
        tick = arm.tick()
        if tick.plan is not None:
            plans.append((arm.now, tick.plan))
    assert arm.filter.counts["missed_ticks"] == 0
    for at, plan in plans:
        ticks = (at + plan.times - 10.0) / DT
        np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-6)
        assert plan.times[0] > 0.005


@pytest.mark.parametrize("what", ["measure", "velocity", "shape", "text", "chunk", "now", "names"])
def test_nothing_that_arrives_raises(what: str) -> None:
    arm = Arm().run()
    nonsense: Any = {"not": "an array"}
    if what == "measure":
        arm.filter.measure(nonsense, nonsense, arm.now)
    elif what == "velocity":
        arm.filter.measure(np.zeros(2), np.full(2, np.nan), arm.now)
    elif what == "shape":
        arm.filter.measure(np.zeros(3), np.zeros(3), arm.now)
    elif what == "text":
        arm.filter.measure(np.array(["x", "y"]), np.zeros(2), arm.now)
    elif what == "chunk":
        assert arm.offer(0.0, positions=nonsense)
        assert arm.filter.counts["malformed_chunks"] == 1
    elif what == "names":
        assert arm.offer(0.0, names=None)
    elif what == "now":
        tick = arm.filter.tick(float("nan"))
        assert (tick.state, tick.plan) == (State.STOPPED, None)
        assert tick.reason.startswith("bug: ValueError")
    arm.tick(5)


def test_a_bug_in_the_tick_stops_the_arm_on_its_last_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm().run().moving()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(arm.filter.filter, "follow", broken)
    tick = arm.tick(2)
    assert (tick.state, tick.reason, tick.plan) == (State.STOPPED, "bug: ZeroDivisionError: oops", None)
    assert arm.filter.counts["bugs"] >= 1
    arm.tick(60)
    assert arm.filter.motion is not None
    assert arm.filter.motion.at_rest


def test_an_excess_found_by_the_check_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm().run().moving()
    monkeypatch.setattr(arm.filter.filter, "violation", lambda path: "velocity limit of a")
    arm.offer(float(arm.measured[0]))
    tick = arm.tick()
    assert (tick.state, tick.reason, tick.plan) == (
        State.STOPPED,
        "bug: the filter broke the velocity limit of a",
        None,
    )
    assert arm.filter.counts["violations"] == 1
