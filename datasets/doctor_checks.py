"""Checks of `data doctor` on clocks, ends and lengths. Pure: arrays in, findings out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embodied.contracts.specs import DatasetSpec
from embodied.datasets.finding import Finding

LATE = 0.2  # of the control period: a step that is off by more is irregular
IRREGULAR_SHARE = 0.05  # of an episode's steps
GAP = 1.8  # periods: from here on frames are missing in between
DRIFT = 0.02  # of the control period
SHORT_FRAMES = 3
NAMES_SHOWN = 8


def listed(items: Sequence[object], most: int = NAMES_SHOWN) -> str:
    """`a, b, c and 5 more`."""
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


# ---- clocks --------------------------------------------------------------------------------------


def clock_findings(episode: int, timestamp: np.ndarray, control_dt: float) -> Iterator[Finding]:
    """Stamps that go back or stand still, gaps, jitter, and a rate other than declared. timestamp: (n,) [s]."""
    steps = np.diff(timestamp)
    if len(steps) < 2 or not np.isfinite(steps).all() or not timestamp.any():
        return
    if (steps < 0).any():
        row = int(np.argmax(steps < 0)) + 1
        yield Finding(
            "clock-backwards",
            "error",
            f"timestamps go back at frame {row}, by {-steps[row - 1]:.3g} s",
            "Frames are out of order, or two clocks are mixed: sort the source by one clock and import again.",
            episode,
        )
        return
    if still := int((steps < 1e-6).sum()):
        yield Finding(
            "clock-repeats",
            "warning",
            f"{still} of {len(steps)} steps take no time at all",
            "The recorder stamped several frames alike; the same picture may be there twice.",
            episode,
        )
    typical = float(np.median(steps))
    period = control_dt or typical
    if period <= 0 or typical <= 0:
        return
    gaps = np.flatnonzero(steps > GAP * period) if abs(typical / period - 1) < 0.5 else np.empty(0, np.int64)
    if len(gaps):
        lost = int(np.round(steps[gaps] / period - 1).sum())
        yield Finding(
            "clock-gap",
            "warning",
            f"{len(gaps)} gaps, the longest {steps[gaps].max():.3g} s at frame {int(gaps[np.argmax(steps[gaps])])}: "
            f"about {lost} frames of {period:.3g} s were dropped",
            "A step over a gap is longer than the policy's; leave such episodes out if there are many.",
            episode,
        )
    even = np.delete(steps, gaps)
    off = float(np.mean(np.abs(even - typical) > LATE * typical)) if len(even) else 0.0
    if off > IRREGULAR_SHARE:
        yield Finding(
            "clock-irregular",
            "warning",
            f"{100 * off:.0f} % of its steps are more than {100 * LATE:.0f} % off the usual {typical:.3g} s",
            "Align the recording on an even clock when importing, or accept that a step is no fixed time.",
            episode,
        )
    mean = float(even.mean()) if len(even) else typical
    if control_dt > 0 and abs(mean / control_dt - 1) > DRIFT:
        yield Finding(
            "clock-drift",
            "warning",
            f"a step takes {mean:.4g} s by its timestamps, {control_dt:.4g} s by the declared control period "
            f"({100 * (mean / control_dt - 1):+.1f} %)",
            "Find out which is right before deploying at that rate; the declared one is a claim.",
            episode,
        )


# ---- ends ----------------------------------------------------------------------------------------


def end_findings(episode: int, rows: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Flags of one episode that contradict each other or its length."""
    terminated, truncated, valid = rows["terminated"], rows["truncated"], rows["step_valid"]
    if both := np.flatnonzero(terminated & truncated).tolist():
        yield Finding(
            "terminal-and-timeout",
            "error",
            f"frame {listed(both)} is both terminated and truncated",
            "Terminal beats timeout: --repair clears 'truncated' there.",
            episode,
        )
    ends = np.flatnonzero(terminated | truncated)
    # The row after an end is its final observation, unless it ends something itself.
    last = len(valid) - (1 if len(ends) and ends[-1] == len(valid) - 1 else 2)
    if early := [int(row) for row in ends if row < last]:
        yield Finding(
            "end-inside",
            "error",
            f"it ends at frame {listed(early)} and goes on to frame {len(valid) - 1}",
            "Two episodes were joined, or an end is set too early: --repair cuts there.",
            episode,
        )
    if valid[-1] and not terminated[-1]:
        yield Finding(
            "no-successor",
            "error",
            "its last frame is step_valid, but nothing follows it and it is not terminal",
            "--repair marks that step as not valid.",
            episode,
        )
    if len(valid) < SHORT_FRAMES or not valid.any():
        yield Finding(
            "short-episode",
            "warning",
            f"it has {len(valid)} frames and {int(valid.sum())} valid steps",
            "Too short to learn from: --repair leaves episodes without a valid step out.",
            episode,
        )


@dataclasses.dataclass
class Ends:
    """Per-episode facts that only mean something side by side."""

    has_action: bool
    lengths: list[int] = dataclasses.field(default_factory=list)
    terminated: list[bool] = dataclasses.field(default_factory=list)
    truncated: list[bool] = dataclasses.field(default_factory=list)
    # Steps by (reward at its maximum, terminated), of rewards with two values.
    paid_not_terminal: int = 0
    terminal_not_paid: int = 0
    paid_and_terminal: int = 0

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        self.lengths.append(len(rows["step_valid"]))
        self.terminated.append(bool(rows["terminated"].any()))
        self.truncated.append(bool(rows["truncated"].any()))

    def add_reward(self, rows: Mapping[str, np.ndarray], highest: float) -> None:
        paid, terminal = rows["reward"] == highest, rows["terminated"] & rows["step_valid"]
        self.paid_not_terminal += int((paid & ~terminal & rows["step_valid"]).sum())
        self.terminal_not_paid += int((terminal & ~paid).sum())
        self.paid_and_terminal += int((terminal & paid).sum())

    def findings(self, success: np.ndarray) -> Iterator[Finding]:
        lengths, terminated, truncated = map(np.array, (self.lengths, self.terminated, self.truncated))
        if not self.has_action:
            return
        if not terminated.any() and not truncated.any():
            yield Finding(
                "no-ends",
                "warning",
                f"none of {len(lengths)} episodes says how it ended: neither terminated nor truncated is set",
                "Learners bootstrap past every last step: right for endless tasks only. Set ends in the source.",
            )
        if terminated.all() and len(lengths) > 1 and len(set(lengths.tolist())) == 1:
            yield Finding(
                "terminated-at-limit",
                "warning",
                f"all {len(lengths)} episodes are terminated, and all after {lengths[0]} frames",
                "These look like timeouts: as terminals they cut the bootstrap. Mark them truncated in the source.",
            )
        yield from self._success_findings(terminated, success)
        if self.paid_and_terminal and min(self.paid_not_terminal, self.terminal_not_paid) > 0:
            yield Finding(
                "reward-terminal",
                "warning",
                f"the highest reward is paid at {self.paid_not_terminal} steps that are not terminal, and "
                f"{self.terminal_not_paid} terminal steps do not get it ({self.paid_and_terminal} do)",
                "Reward and terminals follow different rules; relabel one from the other.",
            )

    def _success_findings(self, terminated: np.ndarray, success: np.ndarray) -> Iterator[Finding]:
        succeeded, failed = success == 1, success == 0
        if int((succeeded & terminated).sum()) and not (failed & terminated).any():
            yield Finding(
                "terminal-at-success",
                "note",
                f"episodes terminate at success ({int((succeeded & terminated).sum())} of {int(succeeded.sum())})",
                "With rewards that are mostly positive, ending early costs reward: the agent learns not to finish. "
                "Shift the rewards below zero, or do not terminate at success.",
            )
        ended = int((succeeded & terminated).sum())
        if 0 < ended < int(succeeded.sum()):
            yield Finding(
                "success-ends-differ",
                "warning",
                f"{ended} of {int(succeeded.sum())} successful episodes are terminated, the others are not",
                "Two conventions are mixed: the same state is worth two things. Set the ends alike in the source.",
            )
        if int((failed & terminated).sum()):
            yield Finding(
                "terminal-at-failure",
                "note",
                f"{int((failed & terminated).sum())} of {int(failed.sum())} failed episodes are terminated",
                "With rewards that are mostly negative, failing early pays. Make a failure worth less than going on.",
            )
        if (success < 0).all():
            yield Finding(
                "success-unknown",
                "note",
                f"none of {len(success)} episodes says whether it succeeded",
                "Nothing can be filtered by success, and labels cannot be compared with it.",
            )
        elif len(success) > 1 and len(set(success.tolist())) == 1:
            yield Finding(
                "success-constant",
                "note",
                f"all {len(success)} episodes {'succeed' if success[0] else 'fail'}",
                "A reward or value learned from these alone has seen no other outcome.",
            )


# ---- the dataset as a whole ------------------------------------------------------------------------


def spec_findings(spec: DatasetSpec, period: float | None) -> Iterator[Finding]:
    """What the spec does not say. period: of the timestamps, if they have one [s]."""
    if spec.control_dt == 0 and spec.action is not None:
        measured = f"; its timestamps say {period:.4g} s" if period else ""
        yield Finding(
            "control-dt-unknown",
            "note",
            f"the control period is not declared{measured}",
            "A policy needs it to run on a robot.",
        )


def length_findings(lengths: np.ndarray) -> Iterator[Finding]:
    """Episodes ten times longer or shorter than the usual one."""
    if len(lengths) < 5:
        return
    usual = float(np.median(lengths))
    for what, odd in (("shorter", lengths * 10 < usual), ("longer", lengths > usual * 10)):
        if odd.any():
            episodes = np.flatnonzero(odd).tolist()
            yield Finding(
                "length-outlier",
                "note",
                f"{len(episodes)} of {len(lengths)} episodes: over ten times {what} than the usual {usual:.0f} frames: "
                f"{listed(episodes)}",
                "Aborted attempts, or a recorder left on? Look at one: embodied data view STORE --episode N --out FILE",
            )
