"""Who may move the arm, and what takes that right away: every transition, as a pure function."""

import dataclasses
import itertools

import pytest

from embodied.robot_bridge.machine import (
    MODES,
    Cause,
    Inputs,
    Machine,
    State,
    enter,
    hold,
    request,
    watch,
    why_not_resume,
)
from embodied.robot_bridge.profile import Safety

CONFIG = Safety()
GOOD = Inputs(now=10.0)
S = State


def at(state: State, cause: Cause = Cause.OPERATOR, since: float = 9.9, resumable: bool = False) -> Machine:
    return Machine(state, cause, "test", since, resumable)


@pytest.mark.parametrize(
    ("mode", "granted"),
    [
        ("arm", {S.INACTIVE: S.ARMED, S.ARMED: S.ARMED}),
        ("run", {S.ARMED: S.RUNNING, S.RUNNING: S.RUNNING, S.HOLD: S.RUNNING}),
        ("hold", {S.ARMED: S.HOLD, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ("stop", {S.ARMED: S.STOPPED, S.RUNNING: S.STOPPED, S.HOLD: S.STOPPED}
         | {s: s for s in (S.INACTIVE, S.STOPPED, S.ESTOP)}),
        ("reset", {s: S.INACTIVE for s in State if s is not S.RUNNING}),
        ("fly", {}),
    ],
)  # fmt: skip
def test_what_an_operator_may_do_from_each_state(mode: str, granted: dict[State, State]) -> None:
    for state in State:
        after, refusal = request(at(state), mode, GOOD, CONFIG)
        if state in granted:
            assert (after.state, refusal) == (granted[state], "")
        else:
            assert after.state is state
            assert refusal


@pytest.mark.parametrize(
    ("change", "obstacle", "reason"),
    [
        ({"joint_age": 0.2}, "", "stale"),
        ({"joint_age": float("inf")}, "", "stale"),
        ({"joint_age": float("nan")}, "", "stale"),
        ({"deadman": "the deadman is not held"}, "", "deadman"),
        ({"estop": "the e-stop is pressed"}, "", "e-stop"),
        ({"estop": "the e-stop's heartbeat is missing"}, "", "heartbeat"),
        ({"standing": "a moves at 0.2 rad/s"}, "", "a moves"),
        ({}, "nobody subscribes", "nobody subscribes"),
    ],
)
def test_arming_needs_everything(change: dict, obstacle: str, reason: str) -> None:
    after, refusal = request(at(S.INACTIVE), "arm", dataclasses.replace(GOOD, **change), CONFIG, obstacle)
    assert after.state is S.INACTIVE
    assert reason in refusal


def test_running_needs_the_inputs_and_an_arm_that_follows() -> None:
    for change in ({"joint_age": 0.2}, {"deadman": "x"}, {"estop": "x"}, {"tracking": "x"}):
        for state in (S.ARMED, S.HOLD):
            after, refusal = request(at(state), "run", dataclasses.replace(GOOD, **change), CONFIG)
            assert after.state is state
            assert refusal


def test_a_reset_waits_for_the_arm_and_for_the_estop() -> None:
    for change, reason in (({"moving": True}, "moving"), ({"estop": "the e-stop is pressed"}, "pressed")):
        for state in (S.STOPPED, S.ESTOP, S.HOLD):
            after, refusal = request(at(state), "reset", dataclasses.replace(GOOD, **change), CONFIG)
            assert after.state is state
            assert reason in refusal


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"estop": "pressed"}, {s: S.ESTOP for s in (S.ARMED, S.RUNNING, S.HOLD)}),
        ({"joint_age": 0.11}, {S.ARMED: S.HOLD, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ({"joint_age": 0.51}, {s: S.STOPPED for s in (S.ARMED, S.RUNNING, S.HOLD)}),
        ({"joint_age": float("nan")}, {s: S.STOPPED for s in (S.ARMED, S.RUNNING, S.HOLD)}),
        ({"deadman": "released"}, {S.ARMED: S.HOLD, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ({"tracking": "a lags"}, {S.ARMED: S.HOLD, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ({"policy": "silent"}, {S.ARMED: S.ARMED, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ({"targets": "clamped"}, {S.ARMED: S.ARMED, S.RUNNING: S.HOLD, S.HOLD: S.HOLD}),
        ({}, {}),
    ],
)
def test_what_each_fault_leads_to(change: dict, expected: dict[State, State]) -> None:
    for state in State:
        assert watch(at(state), dataclasses.replace(GOOD, **change), CONFIG).state is expected.get(state, state)


@pytest.mark.parametrize("state", [S.STOPPED, S.ESTOP])
def test_latched_states_need_reset_and_arm_whatever_is_asked(state: State) -> None:
    for first, second in itertools.product(MODES, repeat=2):
        machine = at(state)
        for mode in (first, second):
            machine, _ = request(machine, mode, GOOD, CONFIG)
            machine = watch(machine, GOOD, CONFIG)
        if (first, second) == ("reset", "arm"):
            assert machine.state is S.ARMED
        else:
            assert machine.state in (state, S.INACTIVE)


def test_a_hold_ends_by_itself_only_for_a_cause_that_passes_and_soon() -> None:
    for cause in Cause:
        after = hold(at(S.RUNNING), cause, "x", now=9.9)
        passing = cause in (Cause.JOINTS, Cause.POLICY)
        assert after.resumable == passing
        assert (why_not_resume(after, GOOD, CONFIG) == "") == passing
        assert not hold(at(S.ARMED), cause, "x", now=9.9).resumable  # nothing ran: nothing may start by itself
    waiting = hold(at(S.RUNNING), Cause.POLICY, "x", now=10.0 - CONFIG.hold_resume - 0.01)
    assert "HOLD" in why_not_resume(waiting, GOOD, CONFIG)


def test_a_hold_does_not_end_by_itself_once_the_deadman_was_let_go() -> None:
    held = hold(at(S.RUNNING), Cause.POLICY, "no chunk", now=9.9)
    released = watch(held, dataclasses.replace(GOOD, deadman="the deadman is not held"), CONFIG)
    assert (released.state, released.reason) == (S.HOLD, "the deadman is not held")
    assert why_not_resume(watch(released, GOOD, CONFIG), GOOD, CONFIG)
    for change in ({"joint_age": 0.2}, {"tracking": "a lags"}):
        assert why_not_resume(held, dataclasses.replace(GOOD, **change), CONFIG)


def test_an_arm_that_does_not_follow_is_held_and_then_stopped() -> None:
    lagging = dataclasses.replace(GOOD, tracking="a lags")
    machine = watch(at(S.RUNNING), lagging, CONFIG)
    assert machine.cause is Cause.TRACKING
    later = dataclasses.replace(GOOD, now=10.0 + CONFIG.stop_after_hold + 0.01)
    assert watch(machine, later, CONFIG).state is S.STOPPED
    # Found out during another HOLD, it counts from then on.
    other = watch(at(S.HOLD, Cause.POLICY, since=1.0, resumable=True), lagging, CONFIG)
    assert (other.state, other.cause, other.since, other.resumable) == (S.HOLD, Cause.TRACKING, 10.0, False)
    assert watch(at(S.HOLD, Cause.POLICY, since=1.0), GOOD, CONFIG).state is S.HOLD


def test_an_unknown_mode_is_not_echoed_at_full_length() -> None:
    machine, refusal = request(at(S.RUNNING), "x" * 100_000, GOOD, CONFIG)
    assert machine.state is S.RUNNING
    assert refusal == f"'{'x' * 40}' is none of {', '.join(MODES)}"


def test_a_machine_is_a_value() -> None:
    machine = at(S.RUNNING)
    enter(machine, S.STOPPED, Cause.OPERATOR, "x", 1.0)
    hold(machine, Cause.POLICY, "x", 1.0)
    assert machine == at(S.RUNNING)
