"""What the arm did under faults, judged by the simulator's own log; see bridge_faults.py for the rules."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.robot_log import RobotRecord

STILL, MOVING = 0.03, 0.2  # [rad/s]
CONTROL = 0.004  # of the simulated controller [s]
LATE = 0.015  # a process that comes to its work later than this was not scheduled; 5 ms is a tick [s]
MADE_UP = 2.0  # times a limit, after it
CAUGHT_UP = 0.5  # after a fault of the robot's own, and after physics that was skipped [s]
SETTLED = 0.3  # after a process that was not scheduled: its last command lasts so long, or the next makes up for it [s]
STARVED = 0.2  # of the time
COMMAND_SLACK, MEASURED_SLACK = 1e-3, 0.02  # [rad]


@dataclasses.dataclass
class Trial:
    """One fault and what came of it; times on the monotonic clock [s].

    Attributes:
        bound: at rest so long after `began`; None where the arm need not stop.
        ended: when the fault was over; what the arm does after that is not part of the stop.
    """

    fault: str
    began: float
    bound: float | None
    ended: float = 0.0
    left_running: bool = False
    recovered_in: float | None = None
    recovered_at: float = np.inf
    rest_in: float | None = None
    own: bool = False  # the simulated robot's own
    lost: float = 0.0  # for which the robot's or the safety's process was not scheduled until the arm was at rest [s]


Spans = list[tuple[float, float]]  # on the monotonic clock [s]


def robot_unscheduled(record: RobotRecord) -> Spans:
    """When the robot did not come to its work, by its own clock: from when a step was due until it was made."""
    late = np.flatnonzero(record.late > LATE)
    starts = late[np.diff(late, prepend=-2) > 1]  # a backlog is worked off from its first step on
    return [(float(record.wall[k]), float(record.wall[k] + record.late[k])) for k in starts]


def _covered(spans: Spans, begin: float, end: float) -> float:
    """Seconds of [begin, end] that the spans cover."""
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        total += max(0.0, min(stop, end) - max(start, reached))
        reached = max(reached, stop)
    return total


def judge_stops(record: RobotRecord, trials: list[Trial], arm: int, slack: float, safety_late: Spans) -> list[str]:
    """Sets `rest_in` and `lost` of every trial that must stop the arm; returns what came too late.

    Time for which the robot's or the safety's process was not scheduled is added to the bound, second for second; a
    fault that consists in that gets no such time.
    """
    late = []
    speed = np.abs(record.velocity[:, :arm]).max(axis=1)
    for trial in trials:
        if trial.bound is None:
            continue
        begin, end = np.searchsorted(record.wall, [trial.began, trial.ended])
        moving = begin + np.flatnonzero(speed[begin:end] >= STILL)
        if not len(moving):
            trial.rest_in = 0.0
        elif moving[-1] + 1 < end:
            trial.rest_in = float(record.wall[moving[-1] + 1] - trial.began)
        elif trial.ended - trial.began > trial.bound + slack:
            trial.rest_in = np.inf
        spans = robot_unscheduled(record) + ([] if trial.fault.startswith("safety") else safety_late)
        trial.lost = _covered(spans, trial.began, min(trial.ended, trial.began + (trial.rest_in or 0.0)))
        bound = trial.bound + slack + trial.lost
        if trial.rest_in is not None and trial.rest_in > bound:
            late.append(
                f"{trial.fault}: at rest after {trial.rest_in:.3f} s, not {trial.bound:.3f} + {slack:g} s and "
                f"{trial.lost:.3f} s for which a process was not scheduled"
            )
    return late


def _largest(values: np.ndarray) -> float | None:
    return round(float(values.max()), 4) if len(values) else None


def judge_motion(
    record: RobotRecord, trials: list[Trial], profile: Profile, safety_late: Spans
) -> tuple[dict[str, Any], list[str]]:
    """Positions, speeds and accelerations of every control step against the limits."""
    limits, arm = profile.read_limits(), slice(0, len(profile.joints))
    violations = []
    figures: dict[str, Any] = {"control_steps": len(record.time)}
    for name, values, slack in (
        ("measured", record.position, MEASURED_SLACK),
        ("commanded", record.command, COMMAND_SLACK),
    ):
        outside = np.maximum(limits.low - values, values - limits.high)[:, arm].max(axis=1)
        figures[f"{name}_position_beyond_limit_max_rad"] = round(float(outside.max()), 6)
        if (outside > slack).any():
            violations.append(f"{name} position: {outside.max():.4f} rad beyond its limit")
    steps = round(0.1 / CONTROL)
    skipped = np.flatnonzero(np.diff(record.wall) > 5 * CONTROL)
    own = _marked(record, [(t.began, t.ended) for t in trials if t.own], CAUGHT_UP)
    own |= _marked(record, [(float(record.wall[k]), float(record.wall[k + 1])) for k in skipped], CAUGHT_UP)
    unscheduled = robot_unscheduled(record)
    starved = _marked(record, unscheduled + safety_late, SETTLED) & ~own
    arrivals = np.flatnonzero(np.diff(record.accepted.astype(np.int64)) > 0) + 1
    gaps = arrivals[1:][np.diff(record.wall[arrivals]) > LATE]
    late = _marked(record, [(float(record.wall[k]), float(record.wall[k])) for k in gaps], 0.1) & ~own & ~starved
    figures["control_steps_of_the_robots_own_faults"] = int(own.sum())
    figures["control_steps_after_a_process_was_not_scheduled"] = int(starved.sum())
    figures["control_steps_after_late_commands_otherwise"] = int(late.sum())
    figures["times_the_robot_was_not_scheduled"] = len(unscheduled)
    figures["times_the_robot_lost_time"] = len(skipped)
    figures["times_the_safety_process_was_not_scheduled"] = len(safety_late)
    moved = record.command[steps:, arm] - record.command[:-steps, arm]
    mean_speed = moved / (record.time[steps:] - record.time[:-steps])[:, None]
    gain = (mean_speed[steps:] - mean_speed[:-steps]) / (steps * CONTROL)

    for name, values, limit, factor, span in (
        ("measured_speed", record.velocity[:, arm], limits.velocity[arm], 1.15, 1),
        ("commanded_speed_over_0.1_s", mean_speed, limits.velocity[arm], 1.4, steps + 1),
        ("commanded_acceleration_over_0.1_s", gain, limits.acceleration[arm], 1.4, 2 * steps + 1),
    ):
        ratio = (np.abs(values) / limit).max(axis=1)
        beyond = (np.abs(values) > limit * factor + 0.02).any(axis=1)
        # A step belongs to the first of these kinds that any of the steps behind its value belongs to.
        robots = _over(span, own)
        after = _over(span, starved) & ~robots
        delivered = _over(span, late) & ~robots & ~after
        judged = ~robots & ~after
        figures[f"{name}_over_limit"] = {
            "max": _largest(ratio[judged]),
            "p99_9": round(float(np.quantile(ratio[judged], 0.999)), 4) if judged.any() else None,
            "max_after_late_commands": _largest(ratio[delivered]),
            "max_after_a_process_was_not_scheduled": _largest(ratio[after]),
            "steps_beyond_after_a_process_was_not_scheduled": int((beyond & after).sum()),
            "max_in_the_robots_own_faults": _largest(ratio[robots]),
        }
        if found := int((beyond & judged).sum()):
            violations.append(f"{name}: {found} control steps beyond {factor} times the limit + 0.02")
        if after.any() and ratio[after].max() > MADE_UP:
            violations.append(f"{name}: {ratio[after].max():.2f} times the limit after a process was not scheduled")
    return figures, violations


def _marked(record: RobotRecord, spans: Spans, longer: float) -> np.ndarray:
    """(N,) the control steps within the spans, and for `longer` seconds after each."""
    mask = np.zeros(len(record.wall), bool)
    for begin, end in spans:
        mask[np.searchsorted(record.wall, begin) : np.searchsorted(record.wall, end + longer)] = True
    return mask


def _over(span: int, mask: np.ndarray) -> np.ndarray:
    """Whether any of `span` steps is in the mask."""
    return np.convolve(mask, np.ones(span), "valid") > 0.5


def stood_still(record: RobotRecord, trials: list[Trial], arm: int, safety_late: Spans) -> tuple[list[str], list[str]]:
    """After which faults the bridge said RUNNING, and yet the arm did not move until the next fault.

    Returns:
        What is a violation; and what is not, because processes were not scheduled for a fifth of that time or more.
    """
    found, starved = [], []
    spans = robot_unscheduled(record) + safety_late
    for trial, following in itertools.pairwise(trials):
        begin, end = trial.recovered_at, following.began
        if trial.recovered_in is None or (np.abs(record.between(begin, end).velocity[:, :arm]) > MOVING).any():
            continue
        share = _covered(spans, begin, end) / (end - begin)
        text = f"{trial.fault}: RUNNING again, but the arm stood still"
        (starved if share >= STARVED else found).append(f"{text}; processes not scheduled for {share:.0%} of the time")
    return found, starved


def by_fault(trials: list[Trial]) -> dict[str, Any]:
    table = {}
    for name in sorted({trial.fault for trial in trials}):
        mine = [trial for trial in trials if trial.fault == name]
        rests = [trial.rest_in for trial in mine if trial.rest_in is not None]
        back = [trial.recovered_in for trial in mine if trial.recovered_in is not None]
        table[name] = {
            "count": len(mine),
            "left_running": sum(trial.left_running for trial in mine),
            "must_rest_within_s": round(mine[0].bound, 3) if mine[0].bound is not None else None,
            "at_rest_worst_s": round(max(rests), 3) if rests else None,
            "not_scheduled_worst_s": round(max(trial.lost for trial in mine), 3),
            "at_rest_judged": len(rests),
            "back_to_running_worst_s": round(max(back), 2) if back else None,
            "not_recovered": len(mine) - len(back),
        }
    return table
