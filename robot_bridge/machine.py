"""The safety process's state machine, as pure functions: a state and what is known go in, the next state comes out.

    INACTIVE --arm--> ARMED --run--> RUNNING <--> HOLD --stop--> STOPPED (latched) --reset--> INACTIVE
                                        any state --e-stop--> ESTOP (latched) --reset--> INACTIVE

HOLD keeps commanding the position at which the arm came to rest. It ends by itself only if RUNNING led to it, its
cause is one that passes (joint states or the policy were late) and is gone within `hold_resume`, and the deadman stayed
held; else an operator must say `run`. STOPPED holds until reset and arm. ESTOP falls silent after braking, until the
e-stop is clear, then reset and arm. This is software, not a rated safety function: it must sit behind the robot's own
limits and a physical stop.
"""

import dataclasses
import enum

from embodied.robot_bridge.profile import Safety


class State(enum.StrEnum):
    INACTIVE = "INACTIVE"
    ARMED = "ARMED"
    RUNNING = "RUNNING"
    HOLD = "HOLD"
    STOPPED = "STOPPED"
    ESTOP = "ESTOP"


class Cause(enum.StrEnum):
    """What a state was entered for."""

    OPERATOR = "operator"
    JOINTS = "joint states"
    DEADMAN = "deadman"
    POLICY = "policy"
    TRACKING = "tracking"
    WORKSPACE = "workspace"
    TARGETS = "targets"
    CLOCK = "clock"
    RIVAL = "another commands the robot"
    ESTOP = "e-stop"
    BUG = "bug"


ACTIVE = (State.ARMED, State.RUNNING, State.HOLD)
_PASSING = (Cause.JOINTS, Cause.POLICY)
MODES = ("arm", "run", "hold", "stop", "reset")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the machine stands.

    Attributes:
        reason: why, in words.
        since: when the state, or the cause of a HOLD, began [s].
        resumable: a HOLD that may end by itself.
    """

    state: State = State.INACTIVE
    cause: Cause = Cause.OPERATOR
    reason: str = "started"
    since: float = 0.0
    resumable: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known at `now` [s]. Texts say what is wrong; empty means nothing is.

    Attributes:
        joint_age: of the newest usable joint state [s]; infinite before the first.
        deadman: it is not held, though required.
        estop: it is pressed, or its heartbeat is lost though required.
        tracking: which joint has not followed for too long.
        policy: it has been silent for too long.
        targets: they had to be clamped for too long.
        standing: the arm cannot be armed as it stands: it moves, or is outside its limits or workspace.
        moving: the commanded arm is not at rest.
    """

    now: float
    joint_age: float = 0.0
    deadman: str = ""
    estop: str = ""
    tracking: str = ""
    policy: str = ""
    targets: str = ""
    standing: str = ""
    moving: bool = False


def enter(machine: Machine, state: State, cause: Cause, reason: str, now: float) -> Machine:
    """The machine in `state`; HOLD can resume only out of RUNNING and for a cause that passes."""
    resumable = state is State.HOLD and machine.state is State.RUNNING and cause in _PASSING
    return Machine(state, cause, reason, now, resumable)


def hold(machine: Machine, cause: Cause, reason: str, now: float) -> Machine:
    """HOLD, from ARMED or RUNNING. A HOLD that could end by itself gets a cause that cannot; else nothing changes."""
    if machine.state in (State.ARMED, State.RUNNING) or (machine.resumable and cause not in _PASSING):
        return enter(machine, State.HOLD, cause, reason, now)
    return machine


def input_fault(inputs: Inputs, config: Safety) -> tuple[Cause, str] | None:
    """The first of the inputs without which nothing may move."""
    if inputs.estop:
        return Cause.ESTOP, inputs.estop
    if inputs.deadman:
        return Cause.DEADMAN, inputs.deadman
    if not inputs.joint_age <= config.joint_timeout:
        return Cause.JOINTS, "joint states are stale"
    return None


def watch(machine: Machine, inputs: Inputs, config: Safety) -> Machine:
    """Faults lead from an active state to HOLD, STOPPED or ESTOP."""
    if machine.state not in ACTIVE:
        return machine
    now = inputs.now
    if inputs.estop:
        return enter(machine, State.ESTOP, Cause.ESTOP, inputs.estop, now)
    if not inputs.joint_age <= config.joint_stop:
        return enter(machine, State.STOPPED, Cause.JOINTS, f"no joint states for {config.joint_stop} s", now)
    if machine.state is State.HOLD and machine.cause is Cause.TRACKING and now - machine.since > config.stop_after_hold:
        return enter(machine, State.STOPPED, Cause.TRACKING, machine.reason, now)
    if fault := input_fault(inputs, config):
        return hold(machine, *fault, now)
    if inputs.tracking:
        if machine.state is State.HOLD and machine.cause is not Cause.TRACKING:
            return enter(machine, State.HOLD, Cause.TRACKING, inputs.tracking, now)  # its clock starts now
        return hold(machine, Cause.TRACKING, inputs.tracking, now)
    if machine.state is State.RUNNING and inputs.policy:
        return hold(machine, Cause.POLICY, inputs.policy, now)
    if machine.state is State.RUNNING and inputs.targets:
        return hold(machine, Cause.TARGETS, inputs.targets, now)
    return machine


def why_not_resume(machine: Machine, inputs: Inputs, config: Safety) -> str:
    """Why a HOLD does not end by itself now that a chunk came; empty if it does."""
    if not machine.resumable or inputs.now - machine.since > config.hold_resume:
        return f"the state is {machine.state}"
    fault = input_fault(inputs, config)
    return fault[1] if fault else inputs.tracking


def request(machine: Machine, mode: str, inputs: Inputs, config: Safety, obstacle: str = "") -> tuple[Machine, str]:
    """An operator's wish: the machine after it, and why it is refused (empty if granted).

    Args:
        obstacle: why the caller cannot drive the robot (nobody subscribes, another commands it, ...); refuses `arm`.
    """
    if mode == "arm":
        return _arm(machine, inputs, config, obstacle)
    if mode == "run":
        return _run(machine, inputs, config)
    if mode == "hold":
        if machine.state not in ACTIVE:
            return machine, f"the state is {machine.state}"
        return hold(machine, Cause.OPERATOR, "operator", inputs.now), ""
    if mode == "stop":
        if machine.state in ACTIVE:
            machine = enter(machine, State.STOPPED, Cause.OPERATOR, "operator", inputs.now)
        return machine, ""
    if mode == "reset":
        if machine.state is State.RUNNING or inputs.moving:
            return machine, "the arm is moving; stop it first"
        if inputs.estop:
            return machine, inputs.estop
        return enter(machine, State.INACTIVE, Cause.OPERATOR, "operator", inputs.now), ""
    return machine, f"'{mode[:40]}' is none of {', '.join(MODES)}"


def _arm(machine: Machine, inputs: Inputs, config: Safety, obstacle: str) -> tuple[Machine, str]:
    if machine.state is State.ARMED:
        return machine, ""
    if machine.state is not State.INACTIVE:
        return machine, f"the state is {machine.state}, not INACTIVE"
    fault = input_fault(inputs, config)
    if refusal := obstacle or (fault[1] if fault else inputs.standing):
        return machine, refusal
    return enter(machine, State.ARMED, Cause.OPERATOR, "operator", inputs.now), ""


def _run(machine: Machine, inputs: Inputs, config: Safety) -> tuple[Machine, str]:
    if machine.state is State.RUNNING:
        return machine, ""
    if machine.state not in ACTIVE:
        return machine, f"the state is {machine.state}, not ARMED or HOLD"
    fault = input_fault(inputs, config)
    if refusal := fault[1] if fault else inputs.tracking:
        return machine, refusal
    return enter(machine, State.RUNNING, Cause.OPERATOR, "operator", inputs.now), ""
